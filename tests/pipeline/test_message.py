"""A message must come out of its frame as it went in, whatever it carries."""

import math
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from headrace.pipeline.message import (
    REMEMBERED,
    SMALL,
    Kind,
    Message,
    Note,
    complete,
    decode,
    encode,
    frame_bytes,
)
from headrace.pipeline.nest import describe, flatten, leaves

DTYPES = (
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128,
)  # fmt: skip


def travel(message: Message, near: bool = False) -> Message:
    """What a receiver makes of what a sender sends; large tensors follow the frame, or are `near`,
    which means: placed where a note in the frame says.
    """
    placed: list[Tensor] = []

    def place(tensor: Tensor) -> Note:
        placed.append(tensor)
        return Note(1000, 7, 4096, len(placed) - 1)

    frame, following = encode(message, place if near else None)
    assert frame_bytes(frame) == len(frame)
    assert not (following if near else placed)
    bare, structure, parts = decode(frame)
    assert bare.body is None
    rest = iter(placed or following)
    tensors = []
    for spec, part in parts:
        if isinstance(part, Tensor):
            tensors.append((spec, part))
        else:
            assert part is None or (near and placed[part.slot].shape == spec.shape)
            tensor = next(rest)
            assert (tensor.dtype, tuple(tensor.shape)) == (spec.dtype, spec.shape)
            assert spec.bytes == tensor.numel() * tensor.element_size()
            tensors.append((spec, tensor.clone()))
    assert next(rest, None) is None
    return complete(bare, structure, tensors)


def assert_same(got: Message, wanted: Message) -> None:
    assert (got.kind, got.index, got.last) == (wanted.kind, wanted.index, wanted.last)
    assert type(got.kind) is Kind and type(got.last) is bool
    assert flatten(got.body)[1] == flatten(wanted.body)[1]
    for a, b in zip(leaves(got.body), leaves(wanted.body), strict=True):
        assert a.dtype is b.dtype and a.requires_grad == b.requires_grad
        assert torch.equal(a, b)
    assert len(got.numbers) == len(wanted.numbers)
    for x, y in zip(got.numbers, wanted.numbers, strict=True):
        assert x == y or (math.isnan(x) and math.isnan(y))


@pytest.mark.parametrize("kind", Kind)
def test_every_kind(kind: Kind) -> None:
    assert_same(travel(Message(kind)), Message(kind))
    full = Message(kind, 2**40, True, (1.5, -0.0), {"x": (torch.ones(2, 3), None, [])})
    assert_same(travel(full), full)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 0, 2), (1001, 3)], ids=str)
def test_every_dtype_small_and_large(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (torch.randn(shape) * 3).to(dtype)
    learns = tensor.is_floating_point() or tensor.is_complex()
    for needs in {False, learns}:
        message = Message(Kind.MICRO_BATCH, 3, body=tensor.clone().requires_grad_(needs))
        assert_same(travel(message), message)
        assert_same(travel(message, near=True), message)


def test_numbers_keep_every_bit() -> None:
    numbers = (0.1, -0.0, math.inf, -math.inf, math.nan, 5e-324, 1.7976931348623157e308, 2.0**53)
    got = travel(Message(Kind.RESULT, numbers=numbers)).numbers
    assert [x.hex() for x in got] == [x.hex() for x in numbers]


def test_a_frame_may_be_long() -> None:
    body: Any = {f"a long name of a tensor {k}": torch.full((3,), float(k)) for k in range(300)}
    message = Message(Kind.MICRO_BATCH, 7, numbers=tuple(map(float, range(900))), body=body)
    assert len(encode(message)[0]) > 10_000
    assert_same(travel(message), message)


def test_a_layout_may_be_long() -> None:
    for body in ([torch.ones(1), None] * REMEMBERED, torch.ones((1,) * (REMEMBERED + 1))):
        message = Message(Kind.RESULT, body=body)
        for _ in range(2):
            assert_same(travel(message), message)


def test_only_short_layouts_are_remembered() -> None:
    """Of what a stranger sends, and of what is sent on to others."""

    def write(size: int) -> bytearray:
        return encode(Message(Kind.BUFFERS, body=[None] * size))[0]

    assert kept([200 + k for k in range(10)], lambda size: decode(write(size))) > 10 * 1000
    frames = [write(40_000 + k) for k in range(10)]
    assert kept(frames, decode) < 1 << 20
    assert kept([50_000 + k for k in range(10)], write) < 1 << 20


def kept(inputs: list[Any], act: Callable[[Any], object]) -> int:
    """Bytes that are still held when all this has been done."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for each in inputs:
            act(each)
        return tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()


def test_small_tensors_travel_in_the_frame_and_others_follow_it() -> None:
    small, large = torch.zeros(SMALL, dtype=torch.int8), torch.zeros(SMALL + 1, dtype=torch.int8)
    _, follow = encode(Message(Kind.RESULT, body=[large, small, large]))
    assert [len(t) for t in follow] == [SMALL + 1] * 2


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12.0).view(3, 4).t(),
        torch.ones(1, 3).expand(4, 3),
        torch.arange(20.0)[3::4],
        torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last),
    ],
    ids=["transposed", "expanded", "strided", "channels last"],
)
def test_any_strides(tensor: Tensor) -> None:
    assert_same(travel(Message(Kind.RESULT, body=tensor)), Message(Kind.RESULT, body=tensor))


def test_tensors_out_of_a_frame_share_nothing() -> None:
    """Autograd counts versions per memory: one changed in place must not spoil the other."""
    a, b = leaves(travel(Message(Kind.RESULT, body=[torch.ones(3), torch.ones(3)])).body)
    before = b._version
    a.add_(1)
    assert b.tolist() == [1, 1, 1] and b._version == before


@pytest.mark.parametrize(
    ("tensor", "match"),
    [
        (torch.zeros(2, dtype=torch.float8_e5m2), r"tensor of torch.float8_e5m2 cannot travel"),
        (torch.zeros(2, 2).to_sparse(), r"a torch.sparse_coo tensor of torch.float32 cannot"),
    ],
    ids=["dtype", "layout"],
)
def test_what_cannot_travel_is_named(tensor: Tensor, match: str) -> None:
    with pytest.raises(TypeError, match=match):
        encode(Message(Kind.RESULT, body=(tensor,)))


def test_what_is_no_tensor_is_named() -> None:
    body: Any = (torch.ones(1), "text")
    with pytest.raises(TypeError, match=r"found a str \('text'\) where a tensor was expected"):
        encode(Message(Kind.MICRO_BATCH, body=body))
    assert describe(body) == "(float32[1], str)"
