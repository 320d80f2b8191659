"""A learning rate that falls with each gradient's staleness (Zhang et al. 2016, eq. 3)."""

import math
from collections.abc import Callable

from .correction import Correction

__all__ = ["LearningRate", "inverse", "inverse_sqrt", "inverse_square"]


def inverse(staleness: int) -> float:
    """α0/τ, and α0 for τ = 0: what the paper proposes."""
    return 1 / max(1, staleness)


def inverse_sqrt(staleness: int) -> float:
    """α0/√τ, and α0 for τ = 0."""
    return 1 / math.sqrt(max(1, staleness))


def inverse_square(staleness: int) -> float:
    """α0/τ², and α0 for τ = 0."""
    return 1 / max(1, staleness) ** 2


_NAMED = {"inverse": inverse, "inverse_sqrt": inverse_sqrt, "inverse_square": inverse_square}


class LearningRate(Correction):
    """Multiply the learning rate by a function of the staleness τ of the gradient at hand.

    Of several gradients in one update, each is weighted by its own factor:
    θ ← θ - (α0/c) Σ f(τ_l) g_l. It works with every optimizer that has a learning rate, those that
    do not care for a gradient's size included.

    Args:
        factor: 'inverse' (1/τ), 'inverse_sqrt' (1/√τ), 'inverse_square' (1/τ²), a number, or a
            function of τ.

    Raises:
        ValueError, TypeError: none of these.
    """

    def __init__(self, factor: str | float | Callable[[int], float] = "inverse") -> None:
        if isinstance(factor, str) and factor not in _NAMED:
            known = ", ".join(_NAMED)
            raise ValueError(f"factor={factor!r}: write one of {known}, a number, or a function")
        if isinstance(factor, int | float):
            if isinstance(factor, bool) or not 0 < factor < math.inf:
                raise ValueError(f"factor={factor!r}: give a number above 0")
            constant = float(factor)
            self._factor: Callable[[int], float] = lambda staleness: constant
        elif isinstance(factor, str):
            self._factor = _NAMED[factor]
        elif callable(factor):
            self._factor = factor
        else:
            raise TypeError(f"factor={factor!r}: give a name, a number, or a function of τ")

    def factor(self, staleness: int) -> float:
        value = self._factor(staleness)
        if not isinstance(value, int | float) or not 0 <= value < math.inf:
            name = getattr(self._factor, "__name__", repr(self._factor))
            raise ValueError(
                f"corrections: the factor {name} gave {value!r} for staleness {staleness}: it must "
                "give a number, 0 or more"
            )
        return float(value)
