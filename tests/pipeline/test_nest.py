"""A nest of tensors must come back from its structure as it was, and say what it cannot hold."""

from collections import OrderedDict, namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from headrace.pipeline.nest import (
    Nest,
    describe,
    flatten,
    is_differentiable,
    leaves,
    map_tensors,
    to_device,
    total_bytes,
    unflatten,
)

A, B, C = torch.arange(3.0), torch.ones(2, 2, dtype=torch.int64), torch.tensor(True)

NESTS: list[Any] = [
    A,
    None,
    (),
    [],
    {},
    (A,),
    [A, B],
    (A, None, [B, (C,)]),
    {"x": A, "": {"ключ": [B, None]}, "a b": ()},
    ((((A,),),),),
]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a is b
    if isinstance(a, dict):
        return type(b) is dict and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, tuple | list):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a is None and b is None


@pytest.mark.parametrize("nest", NESTS, ids=describe)
def test_round_trip(nest: Any) -> None:
    tensors, structure = flatten(nest)
    assert all(isinstance(code, int) for code in structure)
    assert same(nest, unflatten(tensors, structure))
    assert [id(t) for t in leaves(nest)] == [id(t) for t in tensors]


def test_a_structure_says_nothing_of_the_values() -> None:
    assert flatten((A, [B]))[1] == flatten((C, [A]))[1]
    assert flatten((A, [B]))[1] != flatten((A, (B,)))[1]
    assert flatten({"a": A})[1] != flatten({"b": A})[1]


def test_a_kind_of_dict_comes_back_as_a_dict() -> None:
    tensors, structure = flatten(OrderedDict(x=A, y=B))
    assert same({"x": A, "y": B}, unflatten(tensors, structure))


Pair = namedtuple("Pair", ["left", "right"])


@pytest.mark.parametrize(
    ("nest", "kind"),
    [
        (3, "int"),
        ((A, 2.5), "float"),
        ({"x": "text"}, "str"),
        (np.zeros(2), "ndarray"),
        ({1: A}, "dict"),
        (Pair(A, B), "Pair"),
        ([A, {A}], "set"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_tensor_is_named(nest: Any, kind: str) -> None:
    with pytest.raises(TypeError, match=f"found a {kind} .* where a tensor was expected"):
        flatten(nest)


def test_map_tensors_keeps_the_shape_of_the_nest() -> None:
    nest: Nest = {"x": (A, None), "y": [B]}
    doubled = map_tensors(lambda t: t * 2, nest)
    assert describe(doubled) == describe(nest)
    assert [t.tolist() for t in leaves(doubled)] == [[0, 2, 4], [[2, 2], [2, 2]]]


def test_describe() -> None:
    nest: Any = {"x": (A, None), "y": [B, 3]}
    assert describe(nest) == "{x: (float32[3], None), y: (int64[2, 2], int)}"


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, True), (torch.complex64, True), (torch.int64, False), (torch.bool, False)],
)
def test_is_differentiable(dtype: torch.dtype, expected: bool) -> None:
    assert is_differentiable(torch.zeros(1, dtype=dtype)) is expected


def test_total_bytes() -> None:
    assert total_bytes((A, [B, C])) == 3 * 4 + 4 * 8 + 1


def test_to_device_copies_if_asked_to() -> None:
    cpu = torch.device("cpu")
    assert to_device(A, cpu) is A
    copy = to_device([A], cpu, copy=True)
    assert torch.equal(leaves(copy)[0], A)
    assert leaves(copy)[0].data_ptr() != A.data_ptr()
