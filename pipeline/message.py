"""What travels between two stages, and its frame: the bytes that say all but the large tensors.

A frame is a head (kind, micro-batch, numbers), notes on tensors that lie elsewhere, the body's
layout (its structure, each tensor's dtype, shape and way), and the bytes of the small tensors, all
but the last as int64s and doubles. A large tensor follows the frame, or lies where its note says.
Nothing is pickled. From one micro-batch to the next the layout is the same: unless it is very long,
it is made and read once.
"""

import ctypes
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .nest import Nest, Structure, count_tensors, flatten, unflatten

__all__ = [
    "LONGEST_FRAME",
    "Kind",
    "Message",
    "Note",
    "Part",
    "TensorSpec",
    "complete",
    "decode",
    "encode",
    "frame_bytes",
]

SMALL = 2048
"""Bytes up to which a tensor of the CPU travels in the frame."""


LONGEST_FRAME = 1 << 26
"""Bytes; it holds small tensors only, so a longer one is none."""

REMEMBERED = 1 << 13
"""Codes of a layout, beyond which it is made and read each time: who sends many is to fill no
memory of ours with them.
"""

LARGEST_TENSOR = 1 << 60
"""Bytes, where an empty dimension counts as one: torch itself can make no larger one."""


class Kind(IntEnum):
    """Downstream: a call begins, a micro-batch, measure the links, make a checkpoint, it ends.

    Upstream: what came of a micro-batch. VALUE and ECHO go both ways: a value folded over the
    stages, a measurement of a link. CLOSE is a channel's last message; FRAME is a channel's own.

    A replica to a server: it is there, wants the weights, has a gradient or its own weights, has
    nothing in flight, has other weights or buffers for it, wants its figures. The server: WEIGHTS,
    VALUE. Both, where nothing else is to be said for a while: BEAT.
    """

    BEGIN, MICRO_BATCH, TUNE, END, RESULT, VALUE, ECHO, CLOSE, FRAME = range(9)
    JOIN, FETCH, PUSH, SETTLE, LOAD, BUFFERS, ASK, WEIGHTS, BEAT = range(9, 18)
    SAVE = 18


@dataclass(frozen=True, slots=True)
class Message:
    """One message between neighbours.

    Args:
        index: the micro-batch, or the call that begins.
        last: the micro-batch is the last of its mini-batch; the call ends early.
        numbers: what is known to the host; of a micro-batch its samples, and whether it closes an
            update.
        body: a nest of tensors; those that require a gradient do so at the receiver too.
    """

    kind: Kind
    index: int = -1
    last: bool = False
    numbers: tuple[float, ...] = ()
    body: Nest = None

    def carrying(self, body: Nest) -> "Message":
        """The same with another body."""
        return Message(self.kind, self.index, self.last, self.numbers, body)


@dataclass(frozen=True)
class TensorSpec:
    """What a receiver must know of a tensor before it comes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    requires_grad: bool
    on_accelerator: bool

    @cached_property
    def bytes(self) -> int:
        """Its size."""
        return self.dtype.itemsize * math.prod(self.shape)


class Note(NamedTuple):
    """Where a sender put a large tensor, for a receiver on the same host (`shared_memory`).

    Args:
        process, file: the sender's process, and its descriptor there.
        slot_bytes, slot: the size of the file's slots, and which one.
    """

    process: int
    file: int
    slot_bytes: int
    slot: int


Part = tuple[TensorSpec, Tensor | Note | None]
"""A tensor of a frame: itself if small, a note on where it is, or None, for it follows."""

_IN_FRAME, _FOLLOWS, _NOTED = range(3)

_DTYPES = (
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128,
)  # fmt: skip
_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}
_KINDS = tuple(Kind)


class _Layout(NamedTuple):
    """What a frame says of its body besides the numbers in it.

    Args:
        specs, ways: of each tensor.
        codes: all of it, as the frame has it.
        small: bytes of the tensors in the frame. notes: how many lie elsewhere.
    """

    structure: Structure
    specs: tuple[TensorSpec, ...]
    ways: tuple[int, ...]
    codes: bytes
    small: int = 0
    notes: int = 0


_HEAD = struct.Struct("7q")
"""The frame's bytes, kind, index, last, and how many numbers, notes and codes it has."""


def encode(
    message: Message, place: Callable[[Tensor], Note] | None = None
) -> tuple[bytearray, list[Tensor]]:
    """Write a message as a frame, and the large tensors that follow it.

    Args:
        place: puts a large tensor where the receiver can reach it; None: they follow.

    Raises:
        TypeError: a dtype or layout that cannot travel, or no nest of tensors (`nest.flatten`).
        ValueError: a nest too deep, or of so many small tensors that no frame holds them.
    """
    tensors, structure = flatten(message.body)
    kinds = tuple(
        [(t.dtype, t.layout, t.shape, t.requires_grad, t.device.type != "cpu") for t in tensors]
    )
    codes_ = len(structure) + 4 * len(kinds) + sum([t.dim() for t in tensors])
    lay_out = _remembered_lay_out if codes_ <= REMEMBERED else _lay_out
    layout: _Layout = lay_out(structure, kinds, place is not None)
    notes: list[int] = []
    small: list[bytes] = []
    following: list[Tensor] = []
    for tensor, way in zip(tensors, layout.ways, strict=True):
        if tensor.is_conj() or tensor.is_neg():
            tensor = tensor.resolve_conj().resolve_neg()
        if way == _IN_FRAME:
            small.append(_bytes(tensor))
        elif place is None:
            following.append(tensor.detach())
        else:
            notes += place(tensor)
    numbers, codes = message.numbers, layout.codes
    size = _HEAD.size + 8 * (len(numbers) + len(notes)) + len(codes) + sum(map(len, small))
    if size > LONGEST_FRAME:
        raise ValueError(
            f"a message of {len(tensors):,} tensors, whose frame would take {size:,} bytes, and "
            f"{LONGEST_FRAME:,} is the most: pass fewer and larger tensors between layers"
        )
    counts = (len(numbers), len(notes), len(codes) // 8)
    frame = bytearray(_HEAD.pack(size, message.kind, message.index, message.last, *counts))
    frame += struct.pack(f"{len(numbers)}d{len(notes)}q", *numbers, *notes)
    frame += codes
    for data in small:
        frame += data
    return frame, following


def _lay_out(
    structure: Structure,
    kinds: tuple[tuple[torch.dtype, torch.layout, torch.Size, bool, bool], ...],
    places: bool,
) -> _Layout:
    count_tensors(structure)  # refuses what a receiver would
    codes = [len(structure), *structure, len(kinds)]
    specs, ways = [], []
    for dtype, layout, shape, requires_grad, on_accelerator in kinds:
        if dtype not in _CODES or layout is not torch.strided:
            known = ", ".join(str(d).removeprefix("torch.") for d in _DTYPES)
            raise TypeError(
                f"a {layout} tensor of {dtype} cannot travel between stages: give a dense tensor "
                f"of one of {known}"
            )
        spec = TensorSpec(dtype, tuple(shape), requires_grad, on_accelerator)
        ways.append(_IN_FRAME if _fits(spec) else _NOTED if places else _FOLLOWS)
        specs.append(spec)
        flags = requires_grad + 2 * on_accelerator
        codes += [_CODES[dtype], flags, ways[-1], len(shape), *shape]
    return _Layout(structure, tuple(specs), tuple(ways), struct.pack(f"{len(codes)}q", *codes))


_remembered_lay_out = lru_cache(maxsize=256)(_lay_out)


def _fits(spec: TensorSpec) -> bool:
    """Whether it travels in the frame."""
    return not spec.bytes or (spec.bytes <= SMALL and not spec.on_accelerator)


def _bytes(tensor: Tensor) -> bytes:
    """Its elements, filled up to whole int64s, so that what follows is aligned."""
    size = tensor.numel() * tensor.element_size()
    tensor = tensor.contiguous()  # a name: the memory must live until it has been read
    return ctypes.string_at(tensor.data_ptr(), size) + bytes(-size % 8) if size else b""


def frame_bytes(header: bytes | bytearray) -> int:
    """The length of the frame that these bytes begin; before any memory is taken for it.

    Raises:
        ValueError: they begin none.
    """
    size = int(struct.unpack_from("q", header)[0]) if len(header) >= 8 else len(header)
    if not _HEAD.size <= size <= LONGEST_FRAME:
        raise _no_frame(f"a length of {size} bytes")
    return size


def decode(frame: bytearray) -> tuple[Message, Structure, list[Part]]:
    """Read a frame: the message without its body, the body's structure, and its tensors.

    Raises:
        ValueError: the bytes are no frame, or not a whole one. What a flipped bit makes of a number
            or of a tensor's elements cannot be told.
    """
    if frame_bytes(frame) != len(frame):
        raise _no_frame(f"{len(frame)} bytes that say they are {frame_bytes(frame)}")
    _, kind, index, last, numbers_, notes_, codes_ = _HEAD.unpack_from(frame)
    start = _HEAD.size + 8 * (numbers_ + notes_)
    place = start + 8 * codes_
    if min(numbers_, notes_, codes_) < 0 or place > len(frame):
        raise _no_frame(f"{numbers_} numbers, {notes_} notes and {codes_} codes")
    if not 0 <= kind < len(_KINDS) or last not in (0, 1):
        raise _no_frame(f"the kind {kind}, {last}")
    values = struct.unpack_from(f"{numbers_}d{notes_}q", frame, _HEAD.size)
    read_layout = _remembered_layout if codes_ <= REMEMBERED else _read_layout
    layout: _Layout = read_layout(bytes(frame[start:place]))
    if place + layout.small != len(frame) or notes_ != 4 * layout.notes:
        raise _no_frame(f"{len(frame) - place} bytes and {notes_} notes for its tensors")
    note = numbers_
    parts: list[Part] = []
    for spec, way in zip(layout.specs, layout.ways, strict=True):
        part: Tensor | Note | None = None
        if way == _IN_FRAME:
            part = _read(frame, place, spec)
            place += _filled_up(spec.bytes)
        elif way == _NOTED:
            part = Note(*values[note : note + 4])
            note += 4
        parts.append((spec, part))
    message = Message(_KINDS[kind], index, bool(last), values[:numbers_])
    return message, layout.structure, parts


def _no_frame(what: str) -> ValueError:
    return ValueError(f"what came is no message of Headrace's: it has {what}")


def _filled_up(size: int) -> int:
    return size + -size % 8


def _read_layout(codes: bytes) -> _Layout:
    row = memoryview(codes).cast("q")
    many = row[0] if len(row) else -1
    if not 0 <= many <= len(row) - 2:
        raise _no_frame(f"a structure of {many} codes")
    structure = tuple(row[1 : 1 + many])
    count, at = row[1 + many], 2 + many
    if count_tensors(structure) != count:
        raise _no_frame(f"a structure that is not of {count} tensors")
    specs, ways = [], []
    for _ in range(count):
        spec, way, at = _read_spec(row, at)
        specs.append(spec)
        ways.append(way)
    if at != len(row):
        raise _no_frame(f"{len(row)} codes, of which {at} say something")
    small = sum(_filled_up(s.bytes) for s, w in zip(specs, ways, strict=True) if w == _IN_FRAME)
    return _Layout(structure, tuple(specs), tuple(ways), codes, small, ways.count(_NOTED))


_remembered_layout = lru_cache(maxsize=256)(_read_layout)


def _read_spec(row: memoryview, at: int) -> tuple[TensorSpec, int, int]:
    """A tensor's dtype, shape and way, and where the next one's begin."""
    if at + 4 > len(row):
        raise _no_frame("a tensor of no dtype")
    dtype, flags, way, dims = row[at : at + 4]
    at += 4 + dims
    known = 0 <= dtype < len(_DTYPES) and 0 <= flags < 4 and way in (_IN_FRAME, _FOLLOWS, _NOTED)
    if not known or dims < 0 or at > len(row):
        raise _no_frame(f"a tensor of the dtype {dtype}, {flags}, {way} and {dims} dimensions")
    shape = tuple(row[at - dims : at])
    spec = TensorSpec(_DTYPES[dtype], shape, bool(flags & 1), bool(flags & 2))
    whole = spec.dtype.itemsize * math.prod(max(1, size) for size in shape)
    if min(shape, default=0) < 0 or whole > LARGEST_TENSOR:
        raise _no_frame(f"a tensor of the shape {list(shape)}")
    learns = spec.dtype.is_floating_point or spec.dtype.is_complex
    if (spec.requires_grad and not learns) or (way == _IN_FRAME) != _fits(spec):
        raise _no_frame(f"a {spec.dtype} tensor of the shape {list(shape)} in the wrong place")
    return spec, way, at


def _read(frame: bytearray, place: int, spec: TensorSpec) -> Tensor:
    """A copy: a tensor in the frame's own memory could lie askew, and would share it."""
    tensor = torch.empty(spec.shape, dtype=spec.dtype)
    if spec.bytes:
        address = ctypes.addressof(ctypes.c_char.from_buffer(frame, place))
        ctypes.memmove(tensor.data_ptr(), address, spec.bytes)
    return tensor


def complete(
    message: Message, structure: Structure, parts: list[tuple[TensorSpec, Tensor]]
) -> Message:
    """Put the tensors into a message that `decode` gave."""
    for spec, tensor in parts:
        if spec.requires_grad:
            tensor.requires_grad_()
    return message.carrying(unflatten([tensor for _, tensor in parts], structure))
