"""Cutting a mini-batch, and joining outputs: sizes, order, and what cannot be cut."""

from typing import Any

import pytest
import torch

from headrace.pipeline import InputError
from headrace.pipeline.microbatch import join, samples, split
from headrace.pipeline.nest import leaves


def numbered(size: int) -> Any:
    x = torch.arange(size)
    return ({"x": x, "y": x.unsqueeze(1).expand(size, 3)}, [x * 10])


@pytest.mark.parametrize(
    ("size", "parts", "sizes"),
    [
        (8, 1, [8]),
        (8, 4, [2, 2, 2, 2]),
        (7, 3, [3, 2, 2]),
        (5, 4, [2, 1, 1, 1]),
        (3, 8, [1, 1, 1]),
        (1, 1, [1]),
    ],
)
def test_sizes_differ_by_one_at_most_and_none_is_empty(
    size: int, parts: int, sizes: list[int]
) -> None:
    pieces = split(numbered(size), parts)
    assert [samples(piece) for piece in pieces] == sizes
    for joined, whole in zip(leaves(join(pieces)), leaves(numbered(size)), strict=True):
        assert torch.equal(joined, whole)


def test_pieces_are_views_not_copies() -> None:
    x = torch.zeros(6, 2)
    pieces = [leaves(piece)[0] for piece in split((x, None), 3)]
    assert {p.untyped_storage().data_ptr() for p in pieces} == {x.untyped_storage().data_ptr()}


def test_a_target_may_be_missing() -> None:
    assert samples((torch.zeros(4, 2), None)) == 4


@pytest.mark.parametrize(
    "nest",
    [
        (torch.zeros(4, 2), torch.zeros(3)),
        (torch.zeros(4), torch.tensor(1.0)),
        torch.tensor(1.0),
        (),
        None,
    ],
    ids=["unlike", "scalar beside", "scalar", "empty", "none"],
)
def test_samples_must_be_in_dimension_0(nest: Any) -> None:
    with pytest.raises(InputError, match="must all have the samples in dimension 0"):
        samples(nest)


def test_a_mini_batch_without_samples_is_refused() -> None:
    with pytest.raises(InputError, match=r"no samples: \(float32\[0, 2\], int64\[0\]\)"):
        split((torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64)), 2)


def test_outputs_of_unlike_shapes_cannot_be_joined() -> None:
    with pytest.raises(InputError, match=r"cannot be .*0: float32\[2, 3\] and float32\[2, 4\]"):
        join([torch.zeros(2, 3), torch.zeros(2, 4)])
    with pytest.raises(InputError, match=r"cannot be .*0: \(float32\[2\], float32\[\]\)"):
        join([(torch.zeros(2), torch.tensor(1.0))])
