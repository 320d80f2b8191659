"""Nests of tensors: a tensor, or tuples, lists and dicts of nests, and their shape as integers."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = [
    "Nest",
    "Structure",
    "describe",
    "flatten",
    "is_differentiable",
    "leaves",
    "map_tensors",
    "to_device",
    "total_bytes",
    "unflatten",
]

Nest: TypeAlias = "Tensor | tuple[Nest, ...] | list[Nest] | dict[str, Nest] | None"
Structure: TypeAlias = tuple[int, ...]
"""A nest without its tensors, in preorder; it travels in a message's header as it is."""

_TENSOR, _NONE, _TUPLE, _LIST, _DICT = range(5)


def flatten(nest: Nest) -> tuple[list[Tensor], Structure]:
    """Give a nest's tensors in order, and the structure that `unflatten` needs.

    Raises:
        TypeError: something in the nest is neither a tensor nor a plain tuple, list or dict.
    """
    tensors: list[Tensor] = []
    structure: list[int] = []
    _walk(nest, tensors, structure)
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
            key = bytes(next(codes) for _ in range(next(codes))).decode()
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


def total_bytes(nest: Nest) -> int:
    """The bytes of a nest's tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in leaves(nest))


def to_device(nest: Nest, device: torch.device, copy: bool = False) -> Nest:
    """Move a nest to a device; `copy` even if it is there already."""
    # To the CPU the host waits: it would otherwise read what has not arrived.
    goes_on = device.type != "cpu"
    return map_tensors(lambda t: t.to(device, non_blocking=goes_on, copy=copy), nest)
