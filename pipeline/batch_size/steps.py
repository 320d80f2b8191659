"""Steps: grow the batch where one would lower the learning rate (Smith et al. 2018)."""

import math
from bisect import bisect
from collections.abc import Sequence
from typing import Any

from .growth import Growth, check_samples, is_number
from .sampled import Sampled

__all__ = ["Steps"]


class Steps(Growth):
    """A batch that changes after so many epochs; it grows, most often, and may shrink.

    The noise of SGD is g ≈ ε N / (B (1 - m)): a batch B times k does what a rate ε divided by k
    would (Smith et al. 2018), in a k-th of the updates. So: keep the rate 'constant'.

    Args:
        sizes: samples of an update at the start and after each of `at`, as in a warm start on small
            batches, `Steps([16, 1437], at=[5])`; or at the start alone, with `factor`.
        at: epochs (calls of `train`) after which it changes, in order.
        factor: what each change multiplies it by, as in `Steps(16, factor=5, at=[15, 30])`.
        rate: of learning, beside it (`Growth`).

    Raises:
        ValueError: sizes, at and factor do not make a schedule.
    """

    def __init__(
        self,
        sizes: int | Sequence[int],
        at: Sequence[int],
        factor: float | None = None,
        rate: str = "constant",
    ) -> None:
        self.at = _check_at(at)
        if isinstance(sizes, int):
            check_samples("sizes", sizes)
            self.sizes = _powers(sizes, factor, len(self.at))
        elif not isinstance(sizes, Sequence) or isinstance(sizes, str):
            raise ValueError(
                f"sizes={sizes!r}: give a whole number of samples and a factor, as in Steps(16, "
                "factor=5, at=[15, 30]), or all sizes, as in Steps([16, 80, 400], at=[15, 30])"
            )
        else:
            self.sizes = tuple(sizes)
            for size in self.sizes:
                check_samples("sizes", size)
            if factor is not None or len(self.sizes) != len(self.at) + 1:
                raise ValueError(
                    f"sizes={[*self.sizes]} with at={[*self.at]} and factor={factor!r}: give a "
                    "size for the start and one after each of at, and no factor, as in "
                    "Steps([16, 80, 400], at=[15, 30])"
                )
        super().__init__(self.sizes[0], rate)

    def next(self, size: int, epoch: int, sampled: Sampled) -> int:
        return self.sizes[bisect(self.at, epoch)]


def _powers(start: int, factor: Any, changes: int) -> tuple[int, ...]:
    """start · factor^k after k changes, at least 1."""
    if not is_number(factor) or not 0 < factor < math.inf:
        raise ValueError(
            f"sizes={start!r} is the start alone, and factor={factor!r}: give a finite number > 0, "
            "as in Steps(16, factor=5, at=[15, 30]), or all sizes, as in Steps([16, 80, 400], "
            "at=[15, 30])"
        )
    try:
        return tuple(max(1, round(start * factor**k)) for k in range(changes + 1))
    except OverflowError:
        raise ValueError(
            f"factor={factor!r}: {start} samples times that {changes} times over is no number any "
            "more: give a smaller one, as in Steps(16, factor=5, at=[15, 30])"
        ) from None


def _check_at(at: Any) -> tuple[int, ...]:
    epochs = tuple(at) if isinstance(at, Sequence) and not isinstance(at, str) else ()
    whole = all(isinstance(e, int) and not isinstance(e, bool) and e >= 1 for e in epochs)
    if not epochs or not whole or sorted(set(epochs)) != [*epochs]:
        raise ValueError(
            f"at={at!r}: give the epochs after which the batch changes, each >= 1 and later than "
            "the one before, as in [15, 30]"
        )
    return epochs
