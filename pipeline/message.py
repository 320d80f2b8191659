"""What travels between two stages, and its frame: the bytes that say all but the large tensors.

A frame is a row of int64 codes (kind, micro-batch, numbers, the body's structure, each tensor's
dtype and shape), the bytes of the small tensors, and a note on each large one. Its first `HEADER`
bytes are sent first, for a receiver must know how much to expect; most frames are no longer.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from .nest import Nest, flatten, unflatten

__all__ = [
    "BY_WIRE",
    "HEADER",
    "Kind",
    "Message",
    "Note",
    "TensorSpec",
    "add_notes",
    "complete",
    "decode",
    "encode",
    "frame_bytes",
]

HEADER = 4096
"""Bytes of a frame that are sent first."""

SMALL = 2048
"""Bytes up to which a tensor of the CPU travels in the frame."""


class Kind(IntEnum):
    """Downstream: a call begins, a micro-batch, measure the links, the call ends.

    Upstream: what came of a micro-batch. VALUE and ECHO go both ways: a value folded over the
    stages, a measurement of a link. CLOSE is a channel's last message.
    """

    BEGIN, MICRO_BATCH, TUNE, END, RESULT, VALUE, ECHO, CLOSE = range(8)


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
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize

    @property
    def in_frame(self) -> bool:
        """Whether it travels in the frame."""
        return not self.bytes or (self.bytes <= SMALL and not self.on_accelerator)


class Note(NamedTuple):
    """Where a sender put a large tensor, for a receiver on the same host (`shared_memory`).

    Args:
        process, file: the sender's process, and its descriptor there.
        slot_bytes, slot: the size of the file's slots, and which one; slot -1: it comes by wire.
    """

    process: int
    file: int
    slot_bytes: int
    slot: int


BY_WIRE = Note(0, 0, 0, -1)
_NOTE = 8 * len(BY_WIRE)

_DTYPES = (
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128,
)  # fmt: skip
_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}


def encode(message: Message) -> tuple[Tensor, list[Tensor]]:
    """Write a message as a frame, uint8 (bytes,), and the tensors that follow it.

    Raises:
        TypeError: a dtype or layout that cannot travel, or no nest of tensors (`nest.flatten`).
    """
    tensors, structure = flatten(message.body)
    numbers = struct.pack(f"{len(message.numbers)}d", *message.numbers)
    codes = [0, message.kind, message.index, message.last]
    codes += [len(message.numbers), *struct.unpack(f"{len(message.numbers)}q", numbers)]
    codes += [len(structure), *structure, len(tensors)]
    small: list[Tensor] = []
    large: list[Tensor] = []
    for tensor in tensors:
        spec = _specify(tensor)
        codes += [_CODES[spec.dtype], spec.requires_grad + 2 * spec.on_accelerator]
        codes += [tensor.dim(), *tensor.shape]
        (small if spec.in_frame else large).append(tensor.detach().resolve_conj().resolve_neg())
    head = torch.tensor(codes).view(torch.uint8)
    notes = torch.zeros(_NOTE * len(large), dtype=torch.uint8)
    frame = torch.cat([head, *(_padded(_bytes(tensor)) for tensor in small), notes])
    frame[:8].view(torch.int64)[0] = len(frame)
    return frame, large


def add_notes(frame: Tensor, notes: Sequence[Note]) -> None:
    """Write into a frame where its large tensors are."""
    if notes:
        frame[-_NOTE * len(notes) :].view(torch.int64).copy_(torch.tensor(notes).view(-1))


def _specify(tensor: Tensor) -> TensorSpec:
    if tensor.dtype not in _CODES or tensor.layout is not torch.strided:
        raise TypeError(
            f"a {tensor.layout} tensor of {tensor.dtype} cannot travel between stages: give a "
            f"dense tensor of one of {', '.join(str(d).removeprefix('torch.') for d in _DTYPES)}"
        )
    on_accelerator = tensor.device.type != "cpu"
    return TensorSpec(tensor.dtype, tuple(tensor.shape), tensor.requires_grad, on_accelerator)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _padded(data: Tensor) -> Tensor:
    """Fill up to whole int64s, so that what follows is aligned."""
    return torch.nn.functional.pad(data, (0, -len(data) % 8))


def frame_bytes(header: Tensor) -> int:
    """The length of the frame that a header, uint8 (HEADER,), begins."""
    return int(header[:8].view(torch.int64))


def decode(
    frame: Tensor,
) -> tuple[Message, tuple[int, ...], list[Tensor | tuple[TensorSpec, Note]]]:
    """Read a frame: the message without its body, the body's structure, and its tensors.

    The large ones are given as what must be known to get them.
    """
    codes = iter(frame[: len(frame) // 8 * 8].view(torch.int64).tolist())
    used = 0

    def take(count: int) -> list[int]:
        nonlocal used
        used += count
        return [next(codes) for _ in range(count)]

    _, kind, index, last, count = take(5)
    numbers = struct.unpack(f"{count}d", struct.pack(f"{count}q", *take(count)))
    structure = tuple(take(take(1)[0]))
    specs = []
    for _ in range(take(1)[0]):
        dtype, flags, dims = take(3)
        shape = tuple(take(dims))
        specs.append(TensorSpec(_DTYPES[dtype], shape, bool(flags & 1), bool(flags & 2)))
    tensors: list[Tensor | tuple[TensorSpec, Note]] = []
    place = used * 8
    large = sum(not spec.in_frame for spec in specs)
    notes = iter(frame[len(frame) - _NOTE * large :].view(torch.int64).view(-1, 4).tolist())
    for spec in specs:
        if spec.in_frame:
            # A copy: tensors that shared the frame's memory would share one version counter.
            data = frame[place : place + spec.bytes].clone().view(spec.dtype).view(spec.shape)
            tensors.append(data.requires_grad_(spec.requires_grad))
            place += spec.bytes + -spec.bytes % 8
        else:
            tensors.append((spec, Note(*next(notes))))
    return Message(Kind(kind), index, bool(last), numbers), structure, tensors


def complete(message: Message, structure: tuple[int, ...], tensors: list[Tensor]) -> Message:
    """Put the tensors into a message that `decode` gave."""
    return replace(message, body=unflatten(tensors, structure))
