"""What travels between two stages, and its frame: the bytes that say all but the large tensors.

A frame is a row of int64 codes (kind, micro-batch, numbers, the body's structure, each tensor's
dtype, shape and way), then the bytes of the small tensors. A large tensor follows the frame, or
lies where the frame's note on it says. Nothing is pickled.
"""

import ctypes
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from .nest import Nest, flatten, unflatten

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
    """Downstream: a call begins, a micro-batch, measure the links, the call ends.

    Upstream: what came of a micro-batch. VALUE and ECHO go both ways: a value folded over the
    stages, a measurement of a link. CLOSE is a channel's last message; FRAME is a channel's own.
    """

    BEGIN, MICRO_BATCH, TUNE, END, RESULT, VALUE, ECHO, CLOSE, FRAME = range(9)


@dataclass(frozen=True, slots=True)
class Message:
    """One message between neighbours.

    Args:
        index: the micro-batch, or the call that begins.
        last: the micro-batch is the last of its mini-batch.
        numbers: what is known to the host.
        body: a nest of tensors; those that require a gradient do so at the receiver too.
    """

    kind: Kind
    index: int = -1
    last: bool = False
    numbers: tuple[float, ...] = ()
    body: Nest = None


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a receiver must know of a tensor before it comes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    requires_grad: bool
    on_accelerator: bool

    @property
    def bytes(self) -> int:
        """Its size."""
        size = self.dtype.itemsize
        for length in self.shape:
            size *= length
        return size


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
    numbers = message.numbers
    codes = [len(structure), *structure, len(tensors)]
    small: list[bytes] = []
    following: list[Tensor] = []
    for tensor in tensors:
        spec = _specify(tensor)
        flags = spec.requires_grad + 2 * spec.on_accelerator
        codes += [_CODES[spec.dtype], flags, len(spec.shape), *spec.shape]
        size = spec.bytes
        tensor = tensor.detach().resolve_conj().resolve_neg()
        if not size or (size <= SMALL and not spec.on_accelerator):
            codes.append(_IN_FRAME)
            small.append(_bytes(tensor, size))
        elif place is None:
            codes.append(_FOLLOWS)
            following.append(tensor)
        else:
            codes += [_NOTED, *place(tensor)]
    size = 8 * (5 + len(numbers) + len(codes)) + sum(map(len, small))
    head = (size, message.kind, message.index, message.last, len(numbers))
    frame = bytearray(struct.pack(f"5q{len(numbers)}d{len(codes)}q", *head, *numbers, *codes))
    for data in small:
        frame += data
    return frame, following


def _specify(tensor: Tensor) -> TensorSpec:
    if tensor.dtype not in _CODES or tensor.layout is not torch.strided:
        raise TypeError(
            f"a {tensor.layout} tensor of {tensor.dtype} cannot travel between stages: give a "
            f"dense tensor of one of {', '.join(str(d).removeprefix('torch.') for d in _DTYPES)}"
        )
    on_accelerator = tensor.device.type != "cpu"
    return TensorSpec(tensor.dtype, tuple(tensor.shape), tensor.requires_grad, on_accelerator)


def _bytes(tensor: Tensor, size: int) -> bytes:
    """Its elements, filled up to whole int64s, so that what follows is aligned."""
    if not size:
        return b""
    tensor = tensor.contiguous()  # a name: the memory must live until it has been read
    return ctypes.string_at(tensor.data_ptr(), size) + bytes(-size % 8)


def frame_bytes(header: bytearray) -> int:
    """The length of the frame that these bytes begin."""
    return int(struct.unpack_from("q", header)[0])


def decode(frame: bytearray) -> tuple[Message, tuple[int, ...], list[Part]]:
    """Read a frame: the message without its body, the body's structure, and its tensors."""
    _, kind, index, last, count = struct.unpack_from("5q", frame)
    numbers = struct.unpack_from(f"{count}d", frame, 40)
    codes = memoryview(frame)[40 + 8 * count : len(frame) // 8 * 8].cast("q")
    end = 1 + codes[0]
    structure = tuple(codes[1:end])
    tensors, at = codes[end], end + 1
    specs: list[TensorSpec] = []
    notes: list[Note | None] = []
    ways: list[int] = []
    for _ in range(tensors):
        dtype, flags, dims = codes[at : at + 3]
        way = at + 3 + dims
        shape = tuple(codes[at + 3 : way])
        specs.append(TensorSpec(_DTYPES[dtype], shape, bool(flags & 1), bool(flags & 2)))
        ways.append(codes[way])
        noted = 4 * (codes[way] == _NOTED)
        notes.append(Note(*codes[way + 1 : way + 5]) if noted else None)
        at = way + 1 + noted
    place = 40 + 8 * (count + at)
    parts: list[Part] = []
    for spec, way, note in zip(specs, ways, notes, strict=True):
        if way == _IN_FRAME:
            parts.append((spec, _read(frame, place, spec)))
            place += spec.bytes + -spec.bytes % 8
        else:
            parts.append((spec, note))
    return Message(Kind(kind), index, bool(last), numbers), structure, parts


def _read(frame: bytearray, place: int, spec: TensorSpec) -> Tensor:
    """A copy: a tensor in the frame's own memory could lie askew, and would share it."""
    tensor = torch.empty(spec.shape, dtype=spec.dtype)
    if spec.bytes:
        address = ctypes.addressof(ctypes.c_char.from_buffer(frame, place))
        ctypes.memmove(tensor.data_ptr(), address, spec.bytes)
    return tensor


def complete(
    message: Message, structure: tuple[int, ...], parts: list[tuple[TensorSpec, Tensor]]
) -> Message:
    """Put the tensors into a message that `decode` gave."""
    tensors = [tensor.requires_grad_(spec.requires_grad) for spec, tensor in parts]
    return replace(message, body=unflatten(tensors, structure))
