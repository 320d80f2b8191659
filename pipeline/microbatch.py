"""Cut a mini-batch into micro-batches along dimension 0, and put outputs back together."""

from collections.abc import Sequence

import torch

from .errors import InputError
from .nest import Nest, describe, flatten, leaves, unflatten

__all__ = ["join", "samples", "split"]


def samples(nest: Nest) -> int:
    """The number of samples in a (micro-)batch: the size of dimension 0, equal in all its tensors.

    Raises:
        InputError: there is no tensor, one has no dimensions, or the sizes differ.
    """
    sizes = {tensor.shape[0] if tensor.dim() else None for tensor in leaves(nest)}
    if len(sizes) != 1 or None in sizes:
        raise InputError(
            f"a mini-batch's tensors must all have the samples in dimension 0, got "
            f"{describe(nest)}: give each tensor the same size there"
        )
    return int(sizes.pop() or 0)


def split(nest: Nest, parts: int) -> list[Nest]:
    """Cut every tensor (N, …) into `parts` along dimension 0, sizes differing by at most one.

    A mini-batch of fewer samples than parts gives one micro-batch a sample, so none is empty.
    """
    count = samples(nest)
    if count == 0:
        raise InputError(f"a mini-batch has no samples: {describe(nest)}")
    parts = min(parts, count)
    if parts == 1:
        return [nest]
    tensors, structure = flatten(nest)
    pieces = zip(*(torch.tensor_split(tensor, parts) for tensor in tensors), strict=True)
    return [unflatten(piece, structure) for piece in pieces]


def join(nests: Sequence[Nest]) -> Nest:
    """Concatenate nests of one structure along dimension 0: the inverse of `split`.

    Raises:
        InputError: the shapes do not fit together (sequences of several lengths, say).
    """
    flat = [flatten(nest) for nest in nests]
    columns = zip(*(tensors for tensors, _ in flat), strict=True)
    try:
        return unflatten([torch.cat(column) for column in columns], flat[0][1])
    except RuntimeError as error:
        shapes = " and ".join(sorted({describe(nest) for nest in nests}))
        raise InputError(
            f"outputs of these shapes cannot be joined along dimension 0: {shapes}"
        ) from error
