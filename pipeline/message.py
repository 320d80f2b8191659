"""What travels between two stages, and its frame: the bytes that say all but the large tensors.

A frame is a head (kind, micro-batch, numbers), notes on tensors that lie elsewhere, the body's
layout (its structure, each tensor's dtype, shape and way), and the bytes of the small tensors, all
but the last as int64s and doubles. A large tensor follows the frame, or lies where its note says.
Nothing is pickled. From one micro-batch to the next the layout is the same: it is made and read
once.
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

from .nest import Nest, Structure, flatten, unflatten

__all__ = [
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
    """

    structure: Structure
    specs: tuple[TensorSpec, ...]
    ways: tuple[int, ...]
    codes: bytes


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
    """
    tensors, structure = flatten(message.body)
    kinds = tuple(
        [(t.dtype, t.layout, t.shape, t.requires_grad, t.device.type != "cpu") for t in tensors]
    )
    layout = _lay_out(structure, kinds, place is not None)
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
    counts = (len(numbers), len(notes), len(codes) // 8)
    frame = bytearray(_HEAD.pack(size, message.kind, message.index, message.last, *counts))
    frame += struct.pack(f"{len(numbers)}d{len(notes)}q", *numbers, *notes)
    frame += codes
    for data in small:
        frame += data
    return frame, following


@lru_cache(maxsize=256)
def _lay_out(
    structure: Structure,
    kinds: tuple[tuple[torch.dtype, torch.layout, torch.Size, bool, bool], ...],
    places: bool,
) -> _Layout:
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
        size = spec.bytes
        fits = not size or (size <= SMALL and not on_accelerator)
        ways.append(_IN_FRAME if fits else _NOTED if places else _FOLLOWS)
        specs.append(spec)
        flags = requires_grad + 2 * on_accelerator
        codes += [_CODES[dtype], flags, ways[-1], len(shape), *shape]
    return _Layout(structure, tuple(specs), tuple(ways), struct.pack(f"{len(codes)}q", *codes))


def _bytes(tensor: Tensor) -> bytes:
    """Its elements, filled up to whole int64s, so that what follows is aligned."""
    size = tensor.numel() * tensor.element_size()
    tensor = tensor.contiguous()  # a name: the memory must live until it has been read
    return ctypes.string_at(tensor.data_ptr(), size) + bytes(-size % 8) if size else b""


def frame_bytes(header: bytearray) -> int:
    """The length of the frame that these bytes begin."""
    return int(struct.unpack_from("q", header)[0])


def decode(frame: bytearray) -> tuple[Message, Structure, list[Part]]:
    """Read a frame: the message without its body, the body's structure, and its tensors."""
    _, kind, index, last, numbers_, notes_, codes_ = _HEAD.unpack_from(frame)
    values = struct.unpack_from(f"{numbers_}d{notes_}q", frame, _HEAD.size)
    start = _HEAD.size + 8 * (numbers_ + notes_)
    place = start + 8 * codes_
    layout = _read_layout(bytes(frame[start:place]))
    note = numbers_
    parts: list[Part] = []
    for spec, way in zip(layout.specs, layout.ways, strict=True):
        part: Tensor | Note | None = None
        if way == _IN_FRAME:
            part = _read(frame, place, spec)
            place += spec.bytes + -spec.bytes % 8
        elif way == _NOTED:
            part = Note(*values[note : note + 4])
            note += 4
        parts.append((spec, part))
    message = Message(_KINDS[kind], index, bool(last), values[:numbers_])
    return message, layout.structure, parts


@lru_cache(maxsize=256)
def _read_layout(codes: bytes) -> _Layout:
    row = memoryview(codes).cast("q")
    at = 2 + row[0]
    specs, ways = [], []
    for _ in range(row[at - 1]):
        dtype, flags, way, dims = row[at : at + 4]
        at += 4 + dims
        shape = tuple(row[at - dims : at])
        specs.append(TensorSpec(_DTYPES[dtype], shape, bool(flags & 1), bool(flags & 2)))
        ways.append(way)
    return _Layout(tuple(row[1 : 1 + row[0]]), tuple(specs), tuple(ways), codes)


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
