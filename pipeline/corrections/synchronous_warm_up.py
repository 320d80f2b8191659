"""A synchronous warm-up: nothing is late in the first updates (PipeMare's T3, Yang et al. 2021)."""

from .correction import Correction

__all__ = ["SynchronousWarmUp"]


class SynchronousWarmUp(Correction):
    """Drain the stream at each of the first updates, while weights move fastest.

    Args:
        updates: how many; each waits for what is in flight, as under '1f1b'.

    Raises:
        ValueError: it is no whole number above 0.
    """

    at_servers = False
    changes_law = False

    def __init__(self, updates: int) -> None:
        if isinstance(updates, bool) or not isinstance(updates, int) or updates < 1:
            raise ValueError(f"updates={updates!r}: give a number of updates, 1 or more")
        self.synchronous = updates
