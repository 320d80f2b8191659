"""A convolutional synthesizer: it keeps the shape of a map."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .condition import Condition, Conditioned, check_numbers

__all__ = ["Convolution"]

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
POOLS: dict[int, Callable[[Tensor, Any], Tensor]] = {
    1: functional.adaptive_avg_pool1d,
    2: functional.adaptive_avg_pool2d,
    3: functional.adaptive_avg_pool3d,
}


class Convolution(nn.Module):
    """`hidden` ReLU layers of `width` channels and a linear one, all convolutions of `kernel`.

    Maps (N, channels, …) of one, two or three dimensions and the target -> (N, *wanted). The
    target joins the first layer: labels or numbers of a sample at every place, labels (N, …) of
    places at theirs. Where the wanted map is of another size (a synthetic input), places are
    averaged, or repeated.

    Raises:
        ValueError: shapes that are no maps, an even kernel, or a number that is too small.
    """

    def __init__(
        self,
        given: torch.Size,
        wanted: torch.Size,
        condition: Condition | None = None,
        width: int = 128,
        hidden: int = 2,
        kernel: int = 5,
    ) -> None:
        super().__init__()
        dims = len(given) - 1
        if dims not in CONVOLUTIONS or len(wanted) != len(given):
            raise ValueError(
                f"a convolutional synthesizer from {tuple(given)} to {tuple(wanted)}: both must be "
                "(channels, places …) of as many dimensions; write linear, mlp or sequence"
            )
        least = {"width": 1, "hidden": 0, "kernel": 1}
        check_numbers(least, width=width, hidden=hidden, kernel=kernel)
        if kernel % 2 == 0:
            raise ValueError(f"kernel={kernel!r}: give an odd one, which keeps the size")
        make = CONVOLUTIONS[dims]
        sizes = [given[0], *[width] * hidden, wanted[0]]
        layers = [make(a, b, kernel, padding=kernel // 2) for a, b in pairwise(sizes)]
        self.resizes, self.places, self.pool = given[1:] != wanted[1:], wanted[1:], POOLS[dims]
        self.middle = nn.ModuleList(layers[:-1])
        self.last = nn.ModuleList(layers[-1:])
        self.conditioned = None
        if condition is not None:
            self.conditioned = Conditioned(condition, given[0] * kernel**dims, sizes[1])
            if not hidden:
                self.last.append(self.conditioned)

    def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        y = self.pool(x, self.places) if self.resizes else x
        for k, layer in enumerate((*self.middle, self.last[0])):
            y = layer(y)
            if k == 0 and self.conditioned is not None and target is not None:
                y = y + self._told(target, y)
            if k < len(self.middle):
                y = y.relu()
        return y

    def _told(self, target: Tensor, y: Tensor) -> Tensor:
        assert self.conditioned is not None
        told: Tensor = self.conditioned(target)
        if told.dim() == 2:
            return told[(..., *[None] * (y.dim() - 2))]
        return told.movedim(-1, 1)
