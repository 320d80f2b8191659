"""A multi-layer perceptron as a synthesizer: where the target is not known."""

import math

import torch
from torch import Tensor, nn

from .condition import Condition, check_numbers
from .linear import Joint, acts_on_positions

__all__ = ["MLP"]


class MLP(nn.Module):
    """`hidden` layers of `width` ReLU units and a linear one; the target joins the first.

    (N, *given) and the target -> (N, *wanted): vectors, flattened samples, or every position of a
    sequence.

    Raises:
        ValueError: hidden or width below 1.
    """

    def __init__(
        self,
        given: torch.Size,
        wanted: torch.Size,
        condition: Condition | None = None,
        width: int = 128,
        hidden: int = 2,
    ) -> None:
        super().__init__()
        check_numbers({"width": 1, "hidden": 1}, width=width, hidden=hidden)
        self.positions, self.wanted = acts_on_positions(given, wanted), wanted
        inputs = given[-1] if self.positions else math.prod(given)
        outputs = wanted[-1] if self.positions else wanted.numel()
        self.first = Joint(inputs, width, condition)
        self.middle = nn.ModuleList(nn.Linear(width, width) for _ in range(hidden - 1))
        self.last = nn.Linear(width, outputs)

    def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        y: Tensor = self.first(x if self.positions else x.reshape(len(x), -1), target).relu()
        for layer in self.middle:
            y = layer(y).relu()
        y = self.last(y)
        return y if self.positions else y.view(len(y), *self.wanted)
