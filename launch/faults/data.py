"""Data for jobs that are to be disturbed: they last as long as is wanted, and may hold poison."""

import time

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .fragile import ENLARGED

__all__ = ["CLASSES", "FEATURES", "Paced"]

FEATURES, CLASSES = 64, 10


class Paced(Dataset[tuple[Tensor, Tensor]]):
    """Items: (float32 [64], int64 []: the largest of the first ten).

    Args:
        samples: how many.
        pace: seconds that an item takes.
        poisoned: the item whose first number is NaN; None: none is.
        enlarged: the item that a `Fragile` layer breaks on; None: none is.
    """

    def __init__(
        self,
        samples: int,
        pace: float = 0.0,
        poisoned: int | None = None,
        enlarged: int | None = None,
    ) -> None:
        self.inputs = torch.randn(samples, FEATURES, generator=torch.Generator().manual_seed(0))
        self.targets = self.inputs[:, :CLASSES].argmax(1)
        self.pace = pace
        if poisoned is not None:
            self.inputs[poisoned, 0] = torch.nan
        if enlarged is not None:
            self.inputs[enlarged] *= ENLARGED

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        time.sleep(self.pace)
        return self.inputs[index], self.targets[index]
