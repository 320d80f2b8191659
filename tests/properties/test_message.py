"""Whatever is sent comes out as it went in, and whatever else comes is refused in words."""

import struct
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from headrace.pipeline.message import (
    _DTYPES,
    LONGEST_FRAME,
    Kind,
    Message,
    Note,
    Part,
    TensorSpec,
    complete,
    decode,
    encode,
    frame_bytes,
)
from headrace.pipeline.nest import DEEPEST, Structure, count_tensors, flatten, leaves
from headrace.pipeline.shared_memory import SharedMemory

from ..pipeline.test_message import assert_same, travel

shapes = st.lists(st.integers(0, 5), max_size=4)
large_shapes = st.tuples(st.integers(500, 700), st.integers(1, 9)).map(list)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Of any dtype that travels; contiguous or not, empty, without dimensions, small or large."""
    dtype = draw(st.sampled_from(_DTYPES))
    shape = draw(shapes | large_shapes)
    tensor = (torch.arange(torch.Size(shape).numel()).view(shape) % 251).to(dtype)
    if len(shape) > 1 and draw(st.booleans()):
        tensor = tensor.transpose(0, -1)
    if dtype.is_floating_point or dtype.is_complex:
        tensor.requires_grad_(draw(st.booleans()))
    return tensor


nests = st.recursive(
    st.none() | tensors(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), inner)
    ),
    max_leaves=8,
)
messages = st.builds(
    Message,
    st.sampled_from(Kind),
    st.integers(-(2**63), 2**63 - 1),
    st.booleans(),
    st.lists(st.floats(), max_size=5).map(tuple),
    nests,
)


@given(messages, st.booleans())
def test_whatever_is_sent_arrives(message: Message, near: bool) -> None:
    assert_same(travel(message, near), message)


def read(data: bytes) -> Message | None:
    """What a receiver makes of bytes: a message, or a ValueError in words."""
    try:
        message, structure, parts = decode(bytearray(data))
    except ValueError as error:
        assert str(error) and "\n" not in str(error)
        return None
    assert count_tensors(structure) == len(parts)
    # A body of a petabyte must not be made: those that follow their frame stay as they are.
    return message if None in [p for _, p in parts] else _complete(message, structure, parts)


def _complete(message: Message, structure: Structure, parts: list[Part]) -> Message:
    tensors = [
        (s, t if isinstance(t, torch.Tensor) else torch.zeros(s.shape, dtype=s.dtype))
        for s, t in parts
        if isinstance(t, torch.Tensor) or s.bytes < 1 << 20
    ]
    return complete(message, structure, tensors) if len(tensors) == len(parts) else message


def frame_of(message: Message, near: bool = False) -> bytes:
    return bytes(encode(message, (lambda _: Note(1, 2, 4096, 3)) if near else None)[0])


@given(st.binary(max_size=300))
@example(b"")
@example(bytes(56))
@example(struct.pack("7q", 56, 1, 0, 0, 0, 0, 0))
@example(struct.pack("7q", 56, 1, 0, 0, 2**62, -(2**62), 0))
@example(struct.pack("7q", 2**62, 1, 0, 0, 0, 0, 0))
@example(struct.pack("7q", -1, 1, 0, 0, 0, 0, 0))
def test_arbitrary_bytes_are_no_message(data: bytes) -> None:
    assert read(data) is None


@given(st.lists(st.integers(-3, 20) | st.sampled_from([2**62, -(2**63)]), max_size=30))
@example([1, 0, 1, 0, 0, 1, 2, 2**40, 2**40])
def test_arbitrary_codes_give_a_message_or_words(codes: list[int]) -> None:
    """A frame that is sound but for its layout: what a hostile sender would try."""
    size = 56 + 8 * len(codes)
    read(struct.pack(f"7q{len(codes)}q", size, 1, 0, 0, 0, 0, len(codes), *codes))


@given(messages, st.booleans(), st.data())
def test_a_frame_cut_short_or_with_more_is_refused(
    message: Message, near: bool, data: st.DataObject
) -> None:
    frame = frame_of(message, near)
    cut = data.draw(st.integers(0, len(frame) - 1))
    assert read(frame[:cut]) is None
    assert read(frame + bytes(8)) is None


@given(messages, st.booleans(), st.data())
def test_a_flipped_bit_is_refused_or_leaves_a_message(
    message: Message, near: bool, data: st.DataObject
) -> None:
    """One in a number or an element cannot be told, and one anywhere must not crash."""
    frame = bytearray(frame_of(message, near))
    bit = data.draw(st.integers(0, 8 * len(frame) - 1))
    frame[bit // 8] ^= 1 << bit % 8
    got = read(bytes(frame))
    if bit < 64 or 5 * 64 <= bit < 7 * 64 or (24 * 8 < bit < 32 * 8):
        assert got is None  # its length, its counts, whether it is the last


def test_a_length_is_bounded_before_memory_is_taken() -> None:
    for size in (-1, 0, 55, LONGEST_FRAME + 1, 2**62):
        with pytest.raises(
            ValueError, match=f"no message of Headrace's: it has a length of {size} "
        ):
            frame_bytes(struct.pack("q", size))
    with pytest.raises(ValueError, match="a length of 3 bytes"):
        frame_bytes(b"abc")
    assert frame_bytes(struct.pack("q", LONGEST_FRAME)) == LONGEST_FRAME


def test_what_would_be_refused_is_not_sent() -> None:
    deep: Any = torch.ones(1)
    for _ in range(DEEPEST):
        deep = [deep]
    assert_same(travel(Message(Kind.RESULT, body=deep)), Message(Kind.RESULT, body=deep))
    match = f"a nest of tensors that is more than {DEEPEST} levels deep: pass a flatter one"
    with pytest.raises(ValueError, match=match):
        encode(Message(Kind.RESULT, body=[deep]))
    endless: Any = []
    endless.append(endless)
    with pytest.raises(ValueError, match=match):
        flatten(endless)


def test_a_frame_of_too_many_tensors_is_not_sent() -> None:
    row = torch.zeros(256, dtype=torch.float64)
    many = [row] * (LONGEST_FRAME // 2048)
    with pytest.raises(ValueError, match=r"of 32,768 tensors, whose frame would take .* fewer and"):
        encode(Message(Kind.RESULT, body=many))


@pytest.mark.parametrize(
    ("structure", "match"),
    [
        ((), "ends too early"),
        ((2, 2, 0), "ends too early"),
        ((4, 1, 3, 97), "ends too early"),
        ((4, 1, 2**62, 97), "ends too early"),
        ((0, 0), "goes on after its end"),
        ((9,), "has the code 9, which is none"),
        ((3, -1), "a size of -1"),
        ((4, 2, 1, 97, 0, 1, 97, 0), "a key twice"),
        ((2, 1) * 200 + (0,), "levels deep"),
        ((4, 1, 1, 255, 0), "utf-8"),
        ((4, 1, 1, 300, 0), "range"),
    ],
    ids=str,
)
def test_a_structure_that_is_none(structure: tuple[int, ...], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        count_tensors(structure)


def test_a_place_that_is_none_is_not_read() -> None:
    """Of memory that processes share: a slot that is not there, or is too small."""
    sender, receiver = SharedMemory(), SharedMemory()
    note = sender.place(torch.ones(3000))
    spec = TensorSpec(torch.float32, (3000,), False, False)
    for bad in (
        note._replace(slot=64),
        note._replace(slot=-1),
        note._replace(slot_bytes=8),
        note._replace(slot_bytes=note.slot_bytes + 1),
        note._replace(slot_bytes=1 << 50),
    ):
        with pytest.raises(ValueError):
            receiver.reach(spec, bad)
    with pytest.raises(ValueError, match="no place of a tensor of 40000 bytes"):
        receiver.reach(TensorSpec(torch.float32, (10_000,), False, False), note)
    with pytest.raises(OSError):
        receiver.reach(spec, note._replace(file=1 << 20))
    assert receiver.reach(spec, note).sum() == 3000


def test_tensors_of_a_message_share_no_memory_with_its_frame() -> None:
    frame = encode(Message(Kind.RESULT, body=torch.ones(4)))[0]
    _, _, ((_, part),) = decode(frame)
    frame[:] = bytes(len(frame))
    assert leaves(part)[0].tolist() == [1, 1, 1, 1]  # type: ignore[arg-type]
