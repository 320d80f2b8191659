"""Geometric growth: a little larger at every update (Friedlander and Schmidt 2012)."""

import math

from .growth import Growth, check_samples, is_number
from .sampled import Sampled

__all__ = ["Geometric", "grow"]


def grow(size: int, factor: float, most: int) -> int:
    """|B| ← min(⌈1.1 |B| + 1⌉, N) (Friedlander and Schmidt 2012, section 5)."""
    # 1.1 * 100 is a little more than 110 in doubles, and must not count as 111.
    return math.ceil(min(round(factor * size, 9) + 1, most))


class Geometric(Growth):
    """A batch that grows by a factor at every update, until it is all the data.

    Args:
        start: samples of the first update.
        most: N, the samples there are, or as many as an update is to have at most.
        factor: by which it grows.
        rate: of learning, beside it (`Growth`).

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(self, start: int, most: int, factor: float = 1.1, rate: str = "constant") -> None:
        super().__init__(start, rate)
        check_samples("most", most)
        if most < start:
            raise ValueError(f"most={most} is less than start={start}: give at least as many")
        if not is_number(factor) or not 1 <= factor < math.inf:
            raise ValueError(f"factor={factor!r}: give a finite number >= 1, as 1.1")
        self.most, self.by = most, factor

    def next(self, size: int, epoch: int, sampled: Sampled) -> int:
        return grow(size, self.by, self.most)
