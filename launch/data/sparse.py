"""Generated sparse samples for logistic regression, a few of their features far more common."""

from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .checks import check_one_of, check_positive

__all__ = ["SparseClassification"]

SHARE, STD = 0.5, 4.0
"""The share of features that the hidden model has a weight for, and these weights' spread."""


class SparseClassification(Dataset[tuple[tuple[Tensor, Tensor], Tensor]]):
    """Items: ((int64 [nonzeros], float32 [nonzeros]), float32 [], 0 or 1): indices, values, target.

    A sample's features are distinct, drawn one after another among those not yet in it: the r-th
    most popular of all by r**-exponent (which index that is, the seed says). Values are N(0, 1).
    The target is a draw from the logistic model p(1) = 1 / (1 + exp(-w·x)), whose hidden w has
    N(0, 4²) for half of the features and 0 for the others. Both splits have the same w.

    With the defaults, in the words of HOGWILD! (`launch/studies/sparsity.py`): Omega 15, Delta .22,
    rho .49. Logistic regression by SGD on one sample at a time, rate .2 · .8**epoch, has a mean
    log loss of .17 on these samples after 3 epochs, where w itself has .14.

    Args:
        samples: how many items there are.
        features: how many there are to draw from.
        nonzeros: features of a sample, at most half of all.
        exponent: of the power law, from 0 (all as popular) to 2.
        seed: for another w, and other items.
        split: "train" or "test": other items, as many.

    Raises:
        ValueError: a number below 1 or out of its range, or another split.
    """

    def __init__(
        self,
        samples: int = 20_000,
        features: int = 20_000,
        nonzeros: int = 15,
        exponent: float = 0.7,
        seed: int = 0,
        split: Literal["train", "test"] = "train",
    ) -> None:
        check_positive(samples=samples, features=features, nonzeros=nonzeros)
        check_one_of("split", split, ("train", "test"))
        if 2 * nonzeros > features:
            raise ValueError(f"nonzeros={nonzeros}: give at most half of features={features}")
        if not 0.0 <= exponent <= 2.0:
            raise ValueError(f"exponent={exponent!r}: give a number from 0 to 2")
        generator = torch.Generator().manual_seed(seed)
        by_rank = torch.randperm(features, generator=generator)
        used = torch.rand(features, generator=generator) < SHARE
        self.weights = STD * used * torch.randn(features, generator=generator)
        train, test = torch.randint(2**32, (2,), generator=generator).tolist()
        generator.manual_seed(train if split == "train" else test)

        popularity = torch.arange(1, features + 1, dtype=torch.float64) ** -exponent
        self.indices = by_rank[_distinct(popularity, samples, nonzeros, generator)]
        self.values = torch.randn(samples, nonzeros, generator=generator)
        logits = (self.weights[self.indices] * self.values).sum(dim=1)
        self.targets = logits.sigmoid().bernoulli(generator=generator)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
        return (self.indices[index], self.values[index]), self.targets[index]


def _distinct(weights: Tensor, rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Per row, the first `columns` distinct ones of endless draws by `weights`, in order of size.

    What `torch.multinomial` without replacement does, at a cost that is not rows times weights.
    """
    drawn = weights.multinomial(rows * columns, replacement=True, generator=generator)
    drawn = drawn.view(rows, columns).sort(dim=1).values
    while (repeated := drawn[:, 1:] == drawn[:, :-1]).any():
        again = weights.multinomial(int(repeated.sum()), replacement=True, generator=generator)
        drawn[:, 1:][repeated] = again
        drawn = drawn.sort(dim=1).values
    return drawn
