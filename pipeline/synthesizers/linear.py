"""The linear synthesizer: enough where the target is known and the loss is quadratic."""

import math

import torch
from torch import Tensor, nn

from .condition import Condition, Conditioned

__all__ = ["Joint", "Linear", "acts_on_positions"]

LARGEST = 1 << 26
"""Weights of one layer, at most: more is a mistake about the shape."""


def acts_on_positions(given: torch.Size, wanted: torch.Size) -> bool:
    """Whether both are (positions, features) of the same positions; else samples are flattened."""
    return len(given) == len(wanted) == 2 and given[0] == wanted[0]


class Joint(nn.Module):
    """A linear layer of a tensor (N, …, inputs) and the target, as if they were one.

    Raises:
        ValueError: more than `LARGEST` weights.
    """

    def __init__(self, inputs: int, outputs: int, condition: Condition | None) -> None:
        super().__init__()
        if inputs * outputs > LARGEST:
            raise ValueError(
                f"a linear synthesizer layer of {inputs} x {outputs} weights: write synthesizer "
                "convolution for maps, sequence for sequences, or mlp with a smaller width"
            )
        self.linear = nn.Linear(inputs, outputs)
        self.conditioned = None if condition is None else Conditioned(condition, inputs, outputs)

    def forward(self, x: Tensor, target: Tensor | None) -> Tensor:
        y: Tensor = self.linear(x)
        if self.conditioned is not None and target is not None:
            told: Tensor = self.conditioned(target)
            # One target for all positions, or one for each.
            y = y + (told.unsqueeze(1) if told.dim() < y.dim() else told)
        return y


class Linear(nn.Module):
    """M(h, c) = W [h, c] + b; vectors, flattened samples, or every position of a sequence.

    (N, *given) and the target -> (N, *wanted).
    """

    def __init__(
        self, given: torch.Size, wanted: torch.Size, condition: Condition | None = None
    ) -> None:
        super().__init__()
        self.positions, self.wanted = acts_on_positions(given, wanted), wanted
        sizes = (given[-1], wanted[-1]) if self.positions else (math.prod(given), wanted.numel())
        self.last = Joint(*sizes, condition)

    def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        if self.positions:
            y: Tensor = self.last(x, target)
            return y
        y = self.last(x.reshape(len(x), -1), target)
        return y.view(len(y), *self.wanted)
