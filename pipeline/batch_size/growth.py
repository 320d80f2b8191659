"""What the first stage asks of a growth: the samples of each update before it is begun."""

import math
from collections.abc import Callable
from typing import Any

from .sampled import Sampled

__all__ = ["RATES", "Growth", "check_samples", "is_number"]

RATES: dict[str, Callable[[float], float]] = {
    "constant": lambda ratio: 1.0,
    "linear": lambda ratio: ratio,
    "sqrt": math.sqrt,
}
"""What the learning rate is multiplied by when a batch is `ratio` times the first one."""


class Growth:
    """A size that stays; the others override how it goes on.

    Args:
        start: samples of the first update.
        rate: the learning rate of an update of B samples is the optimizer's times 1 ('constant'),
            B / start ('linear') or its root ('sqrt'). What reports call the learning rate is the
            optimizer's own.

    Raises:
        ValueError: no number of samples, or no word for a rate.
    """

    measures = False
    """Whether `next` needs to know how much the gradients of samples differ."""

    def __init__(self, start: int, rate: str = "constant") -> None:
        check_samples("start", start)
        if rate not in RATES:
            raise ValueError(f"rate={rate!r}: write one of {', '.join(RATES)}")
        self.start, self.rate = start, rate

    def next(self, size: int, epoch: int, sampled: Sampled) -> int:
        """The samples of the update that is about to be gathered.

        Args:
            size: of the update before it.
            epoch: calls of `train` before this one.
            sampled: of the latest update whose figures have come up from all stages.
        """
        return size

    def factor(self, samples: int) -> float:
        """What the learning rate of an update of so many samples is multiplied by."""
        return RATES[self.rate](samples / self.start)


def is_number(value: Any) -> bool:
    """Whether it is one, and no truth value, which Python takes for one."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_samples(name: str, value: Any) -> None:
    """Refuse what is no number of samples."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r}: give a whole number of samples >= 1")
