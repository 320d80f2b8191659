"""What a replica may say to a server, checked before the weights are touched.

A server's port is open to whoever reaches it: what comes may be nonsense, and that is the end of
its sender's connection, not of the server.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from ..message import Kind, Message
from ..nest import describe

__all__ = ["check_join", "check_whole", "most_bytes", "read_request", "unpack"]

_SILENT = (Kind.FETCH, Kind.ASK, Kind.CLOSE)
_LARGEST_NUMBER = 2**53  # of those that a double holds exactly


def most_bytes(weights: Mapping[str, Tensor]) -> int:
    """Bytes of a message's tensors beyond which it is none of a replica's with these weights.

    A gradient may be sparse, and then have a row many times over, but not so many.
    """
    return (1 << 30) + 64 * sum(weight.nbytes for weight in weights.values())


def check_join(message: Message, there: Collection[int], expected: Collection[int] | None) -> int:
    """The number of a replica that joins.

    Args:
        there: the numbers of those that have.
        expected: those that may; None: any.

    Raises:
        ValueError: it does not join, or with a number that it cannot have.
    """
    if message.kind is not Kind.JOIN:
        raise ValueError(f"{message.kind.name} from one that has not joined")
    (number,) = _whole(message, "JOIN", 1, 1)
    if number in there or (expected is not None and number not in expected):
        raise ValueError(f"it joins as replica {number}, who is there already or is none")
    return number


def read_request(
    message: Message, weights: Mapping[str, Tensor], version: int
) -> dict[str, Tensor]:
    """The tensors by name of what a replica pushes or loads; none of what it says otherwise.

    Args:
        weights: what those are to be like.
        version: the server's.

    Raises:
        ValueError: no replica that has joined says this.
    """
    kind, body = message.kind, message.body
    if kind is Kind.PUSH:
        _, *versions = _whole(message, "PUSH", 2, None)
        if max(versions) > version:
            raise ValueError(f"a gradient of version {max(versions)}, and {version} is the newest")
        return unpack(body, weights)
    if kind is Kind.LOAD:
        tensors = unpack(body, weights)
        check_whole("LOAD", tensors, weights)
        return tensors
    lists = kind in (Kind.SETTLE, Kind.BUFFERS) and isinstance(body, list)
    if not (
        (kind in _SILENT and body is None)
        or (lists and all(isinstance(each, Tensor) for each in body or ()))
    ):
        raise ValueError(f"{kind.name} with {describe(body)[:100]}, which no replica says")
    return {}


def check_whole(name: str, tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Look whether weights are all there, and not in some of their rows alone.

    Args:
        name: of the message that has them.

    Raises:
        ValueError: they are not.
    """
    for each in weights:
        if each not in tensors:
            raise ValueError(f"{name} without all weights: {each!r} is missing")
        if tensors[each].is_sparse:
            raise ValueError(f"{name} without all weights: {each!r} is sparse")


def _whole(message: Message, name: str, least: int, most: int | None) -> list[int]:
    numbers = message.numbers
    if len(numbers) < least or (most is not None and len(numbers) > most):
        raise ValueError(f"{name} with {len(numbers)} numbers")
    if not all(0 <= number < _LARGEST_NUMBER and number == int(number) for number in numbers):
        raise ValueError(f"{name} with {numbers[:5]}, which are no counts")
    return [int(number) for number in numbers]


def unpack(body: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `server.pack` packed.

    Args:
        weights: what each tensor must be like.

    Raises:
        ValueError: one is not.
    """
    if not isinstance(body, list) or len(body) != len(weights):
        raise ValueError(f"{describe(body)[:100]} for {len(weights)} weights")
    found = {}
    for (name, weight), item in zip(weights.items(), body, strict=True):
        tensor = _sparse(item, weight) if isinstance(item, list) else item
        if tensor is None:
            continue
        if (
            not isinstance(tensor, Tensor)
            or tensor.shape != weight.shape
            or tensor.dtype is not weight.dtype
        ):
            raise ValueError(f"{describe(item)} for the weight {name!r}, {describe(weight)}")
        found[name] = tensor.detach()  # what its sender thinks of gradients is not ours
    return found


def _sparse(parts: list[Any], weight: Tensor) -> Tensor:
    """A tensor from its indices, values, and size with whether it is coalesced."""
    if len(parts) != 3 or not all(isinstance(part, Tensor) for part in parts):
        raise ValueError(f"{describe(parts)} for a sparse tensor")
    indices, values, numbers = parts
    if numbers.dtype is not torch.int64 or numbers.dim() != 1 or len(numbers) != weight.dim() + 1:
        raise ValueError(f"{describe(numbers)} for the size of {describe(weight)}")
    *size, coalesced = numbers.tolist()
    try:
        # An index outside of the weights would be written there.
        return torch.sparse_coo_tensor(
            indices, values, size, is_coalesced=bool(coalesced), check_invariants=True
        )
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"a sparse tensor that is none: {error}") from None
