"""What travels between two stages, and its header: integers that say all but the tensors' bytes."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from .nest import Nest, flatten

__all__ = ["HEADER", "Kind", "Message", "TensorSpec", "decode", "encode"]

HEADER = 128
"""Integers in a header; a longer one goes on in a second tensor (`encode`)."""


class Kind(IntEnum):
    """Downstream: a call begins, a micro-batch, the call ends. Upstream: what came of one.

    VALUE and ECHO go both ways: a value folded over the stages, a measurement of the link.
    CLOSE is a channel's last message.
    """

    BEGIN, MICRO_BATCH, END, RESULT, VALUE, ECHO, TUNE, CLOSE = range(8)


@dataclass(frozen=True, slots=True)
class Message:
    """One message between neighbours.

    Args:
        index: the micro-batch, or the call that begins.
        last: the micro-batch is the last of its mini-batch.
        numbers: what is known to the host and travels in the header.
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
    accelerated: bool


_DTYPES = (
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128,
)  # fmt: skip
_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}


def encode(message: Message) -> tuple[list[int], list[Tensor]]:
    """Write a message as integers (the first is how many they are) and its tensors.

    Raises:
        TypeError: a dtype that cannot travel, or no nest of tensors (`nest.flatten`).
    """
    tensors, structure = flatten(message.body)
    codes = [0, message.kind, message.index, message.last, len(message.numbers)]
    codes += struct.unpack(f"{len(message.numbers)}q", struct.pack(f"{len(message.numbers)}d",
                                                                   *message.numbers))
    codes += [len(structure), *structure, len(tensors)]
    for tensor in tensors:
        if tensor.dtype not in _CODES or tensor.layout is not torch.strided:
            raise TypeError(
                f"a {tensor.layout} tensor of {tensor.dtype} cannot travel between stages: "
                f"give a dense tensor of one of {', '.join(str(d)[6:] for d in _DTYPES)}"
            )
        flags = tensor.requires_grad + 2 * (tensor.device.type != "cpu")
        codes += [_CODES[tensor.dtype], flags, tensor.dim(), *tensor.shape]
    codes[0] = len(codes)
    return codes, tensors


def decode(codes: Sequence[int]) -> tuple[Message, tuple[int, ...], list[TensorSpec]]:
    """Read what `encode` wrote: the message without its body, the body's structure and tensors."""
    it = iter(codes)
    _, kind, index, last, count = (next(it) for _ in range(5))
    bits = struct.pack(f"{count}q", *(next(it) for _ in range(count)))
    numbers = struct.unpack(f"{count}d", bits)
    structure = tuple(next(it) for _ in range(next(it)))
    specs = []
    for _ in range(next(it)):
        dtype, flags, dims = next(it), next(it), next(it)
        shape = tuple(next(it) for _ in range(dims))
        specs.append(TensorSpec(_DTYPES[dtype], shape, bool(flags & 1), bool(flags & 2)))
    return Message(Kind(kind), index, bool(last), numbers), structure, specs
