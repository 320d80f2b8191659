"""A layer that loses its gradient where a sample is large, in a model that has it in stage 1."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from headrace.models import mlp

__all__ = ["AT", "ENLARGED", "Fragile", "fragile_mlp"]

AT = 5
"""Its place among the layers, after the second Linear."""

ENLARGED = 1e4
"""What to multiply a sample by for the layer to break on it, two Linears later."""

LARGE = 100.0


class Fragile(nn.Module):
    """(N, features) -> the same; a sample above 100 leaves with 1 at most, so that the stages after
    learn from it as from another, and its gradient is NaN.
    """

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = _Break.apply(x)  # type: ignore[no-untyped-call]
        return result


class _Break(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        most = x.abs().amax(1, keepdim=True)
        ctx.save_for_backward(most > LARGE)
        return torch.where(most > LARGE, x / most, x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Tensor:
        (large,) = ctx.saved_tensors
        gradient: Tensor = gradients[0].masked_fill(large, torch.nan)
        return gradient


def fragile_mlp(widths: Sequence[int], dropout: float) -> nn.Sequential:
    """`mlp`, with a `Fragile` after its second Linear."""
    layers = [*mlp(widths, dropout=dropout)]
    return nn.Sequential(*layers[:AT], Fragile(), *layers[AT:])
