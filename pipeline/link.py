"""A link between two neighbours: how long a message takes on it."""

import math
from dataclasses import dataclass

__all__ = ["Link"]


@dataclass(frozen=True)
class Link:
    """One direction between two neighbours; messages on it follow each other, like cars on a road.

    Args:
        latency: seconds, one way, that a message takes however small it is.
        bandwidth: bytes a second; the next message starts when the last byte of this one has left.

    Raises:
        ValueError: a latency that is negative, or a bandwidth that is not above 0.
    """

    latency: float = 0.0
    bandwidth: float = math.inf

    def __post_init__(self) -> None:
        if not 0 <= self.latency < math.inf:
            raise ValueError(f"latency={self.latency!r}: give seconds, 0 or more")
        if not self.bandwidth > 0:
            raise ValueError(f"bandwidth={self.bandwidth!r}: give bytes a second, more than 0")

    def occupied(self, size: float) -> float:
        """Seconds for which a message of so many bytes keeps the next one waiting."""
        return size / self.bandwidth

    def seconds(self, size: float) -> float:
        """Seconds, one way, for a message of so many bytes."""
        return self.latency + self.occupied(size)
