"""Nests of tensors: a tensor, or tuples, lists and dicts of nests, and their shape as integers."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = [
    "Nest",
    "Structure",
    "count_tensors",
    "describe",
    "flatten",
    "is_differentiable",
    "leaves",
    "map_tensors",
    "to_device",
    "to_double",
    "total_bytes",
    "unflatten",
]

Nest: TypeAlias = "Tensor | tuple[Nest, ...] | list[Nest] | dict[str, Nest] | None"
Structure: TypeAlias = tuple[int, ...]
"""A nest without its tensors, in preorder; it travels in a message's header as it is."""

DEEPEST = 100
"""Levels of a nest that travels: whoever reads one that never ends would run out of stack."""

_TENSOR, _NONE, _TUPLE, _LIST, _DICT = range(5)


def flatten(nest: Nest) -> tuple[list[Tensor], Structure]:
    """Give a nest's tensors in order, and the structure that `unflatten` needs.

    Raises:
        TypeError: something in the nest is neither a tensor nor a plain tuple, list or dict.
        ValueError: it never ends, or nearly so.
    """
    tensors: list[Tensor] = []
    structure: list[int] = []
    try:
        _walk(nest, tensors, structure)
    except RecursionError:
        raise ValueError(_too_deep()) from None
    return tensors, tuple(structure)


def _walk(nest: Nest, tensors: list[Tensor], structure: list[int]) -> None:
    if isinstance(nest, Tensor):
        structure.append(_TENSOR)
        tensors.append(nest)
    elif nest is None:
        structure.append(_NONE)
    elif type(nest) is tuple or type(nest) is list:
        structure += (_TUPLE if type(nest) is tuple else _LIST, len(nest))
        for item in nest:
            _walk(item, tensors, structure)
    elif isinstance(nest, dict) and all(isinstance(key, str) for key in nest):
        structure += (_DICT, len(nest))
        for key, item in nest.items():
            name = key.encode()
            structure += (len(name), *name)
            _walk(item, tensors, structure)
    else:
        text = " ".join(repr(nest).split())[:60]
        raise TypeError(
            f"found a {type(nest).__name__} ({text}) where a tensor was expected: between "
            "layers, and from a loader, only tensors travel, and plain tuples, lists and dicts "
            "(with string keys) of tensors; make it a tensor, or keep it inside a layer"
        )


def count_tensors(structure: Structure) -> int:
    """How many tensors a nest of this structure has.

    Raises:
        ValueError: it is the structure of no nest, or of one that is too deep.
    """
    codes = iter(structure)
    try:
        count = _count(codes, DEEPEST)
    except StopIteration:
        raise ValueError("a nest's structure ends too early") from None
    if next(codes, None) is not None:
        raise ValueError("a nest's structure goes on after its end")
    return count


def _count(codes: Iterator[int], levels: int) -> int:
    code = next(codes)
    if code in (_TENSOR, _NONE):
        return int(code == _TENSOR)
    if code not in (_TUPLE, _LIST, _DICT):
        raise ValueError(f"a nest's structure has the code {code}, which is none")
    if not levels:
        raise ValueError(_too_deep())
    names, total = set[str](), 0
    size = next(codes)
    if size < 0:
        raise ValueError(f"a nest's structure has a size of {size}")
    # Each item takes a code at least, so a size beyond them ends with them.
    for k in range(size):
        if code == _DICT:
            names.add(_read_name(codes))
            if len(names) <= k:
                raise ValueError("a nest's structure has a key twice")
        total += _count(codes, levels - 1)
    return total


def _read_name(codes: Iterator[int]) -> str:
    size = next(codes)
    name = bytes(islice(codes, size))
    if len(name) < size:
        raise StopIteration
    return name.decode()


def _too_deep() -> str:
    return f"a nest of tensors that is more than {DEEPEST} levels deep: pass a flatter one"


def unflatten(tensors: Sequence[Tensor], structure: Structure) -> Nest:
    """Put tensors back into the nest they came from: the inverse of `flatten`."""
    return _rebuild(iter(tensors), iter(structure))


def _rebuild(tensors: Iterator[Tensor], codes: Iterator[int]) -> Nest:
    code = next(codes)
    if code == _TENSOR:
        return next(tensors)
    if code == _NONE:
        return None
    size = next(codes)
    if code == _DICT:
        result: dict[str, Nest] = {}
        for _ in range(size):
            key = _read_name(codes)
            result[key] = _rebuild(tensors, codes)
        return result
    items = [_rebuild(tensors, codes) for _ in range(size)]
    return tuple(items) if code == _TUPLE else items


def leaves(nest: Nest) -> list[Tensor]:
    """Give a nest's tensors in order."""
    return [nest] if isinstance(nest, Tensor) else flatten(nest)[0]


def map_tensors(function: Callable[[Tensor], Tensor], nest: Nest) -> Nest:
    """Apply a function to every tensor of a nest."""
    if isinstance(nest, Tensor):
        return function(nest)
    tensors, structure = flatten(nest)
    return unflatten([function(tensor) for tensor in tensors], structure)


def describe(nest: Nest) -> str:
    """Say a nest's types and shapes in a few words, for messages: `float32[32, 10]`."""
    if isinstance(nest, Tensor):
        return f"{str(nest.dtype).removeprefix('torch.')}{list(nest.shape)}"
    if isinstance(nest, dict):
        return "{" + ", ".join(f"{key}: {describe(item)}" for key, item in nest.items()) + "}"
    if isinstance(nest, tuple | list):
        return "(" + ", ".join(describe(item) for item in nest) + ")"
    return "None" if nest is None else type(nest).__name__


def is_differentiable(tensor: Tensor) -> bool:
    """Whether a gradient with respect to this tensor can exist."""
    return tensor.is_floating_point() or tensor.is_complex()


def to_double(tensor: Tensor) -> Tensor:
    """It in float64, if its numbers are not whole ones."""
    return tensor.double() if tensor.is_floating_point() else tensor


def total_bytes(nest: Nest) -> int:
    """The bytes of a nest's tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in leaves(nest))


def to_device(nest: Nest, device: torch.device, copy: bool = False) -> Nest:
    """Move a nest to a device; `copy` even if it is there already."""
    # To the CPU the host waits: it would otherwise read what has not arrived.
    goes_on = device.type != "cpu"
    return map_tensors(lambda t: t.to(device, non_blocking=goes_on, copy=copy), nest)
