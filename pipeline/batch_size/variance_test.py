"""The variance test: grow when the samples differ too much for their mean (Byrd et al. 2012)."""

import math

from .growth import Growth, check_samples, is_number
from .sampled import Sampled

__all__ = ["VarianceTest", "enlarge"]


def enlarge(size: int, sampled: Sampled, theta: float, most: int) -> int:
    """|S| ← ‖Var‖₁ / (θ² ‖∇J_S‖²) where ‖Var‖₁ / |S| > θ² ‖∇J_S‖² (Byrd et al. 2012, section 3).

    Then -∇J_S is a direction of descent with high probability; else |S| stays, as it does while
    `sampled` is NaN.
    """
    allowed = theta**2 * sampled.squared_norm
    if not sampled.variance > allowed * size:
        return size
    wanted = sampled.variance / allowed if allowed else math.inf
    return max(size, math.ceil(min(wanted, most)))


class VarianceTest(Growth):
    """A batch as large as its gradient's noise asks for, and never smaller than it was.

    The variance is estimated from the means of an update's micro-batches, so the first update must
    have two or more of them: give `start` as at least two micro-batches. Each stage adds up its own
    and tells the first one, which decides. What it knows then is late: it is of the update before
    the micro-batch whose gradient came back last, one update ago or more. That is the schedule's
    alone, so the sizes are the same in every run (but for a rule that takes things in as they come,
    `lag='free'`).

    Args:
        start: samples of the first update.
        most: samples of an update at most, as all there are.
        theta: θ, the error that a gradient may have, relative to its norm: smaller grows sooner.
        rate: of learning, beside it (`Growth`).

    Raises:
        ValueError: an argument out of its range.
    """

    measures = True

    def __init__(self, start: int, most: int, theta: float = 1.0, rate: str = "constant") -> None:
        super().__init__(start, rate)
        check_samples("most", most)
        if most < start:
            raise ValueError(f"most={most} is less than start={start}: give at least as many")
        if not is_number(theta) or not 0 < theta <= 1e100:  # it is squared
            raise ValueError(f"theta={theta!r}: give a number > 0 and at most 1e100, as 1.0")
        self.most, self.theta = most, theta

    def next(self, size: int, epoch: int, sampled: Sampled) -> int:
        return enlarge(size, sampled, self.theta, self.most)
