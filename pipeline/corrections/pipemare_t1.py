"""PipeMare's T1: the learning rate divided by the staleness, less and less (Yang et al. 2021)."""

from typing import TYPE_CHECKING

from .correction import Correction

if TYPE_CHECKING:
    from ..stage import Stage

__all__ = ["PipeMareT1", "annealed"]


def annealed(staleness: int, update: int, over: int) -> float:
    """τ^-p with p = 1 - min(t/K, 1): 1/τ at the first update, 1 from update K on; 1 for τ = 0."""
    p = 1 - min(update / over, 1)
    return float(max(1, staleness) ** -p)


class PipeMareT1(Correction):
    """Multiply the learning rate by τ^-p, where p falls from 1 to 0 in the first updates.

    Args:
        over: K, in updates; the paper has a quarter of those with the highest learning rate.

    Raises:
        ValueError: it is no whole number above 0.
    """

    at_servers = False

    def __init__(self, over: int) -> None:
        if isinstance(over, bool) or not isinstance(over, int) or over < 1:
            raise ValueError(f"over={over!r}: give a number of updates, 1 or more")
        self.over = over
        self._stage: Stage | None = None

    def attach(self, stage: "Stage") -> None:
        self._stage = stage

    def factor(self, staleness: int) -> float:
        update = self._stage.version if self._stage is not None else 0
        return annealed(staleness, update, self.over)
