"""Where a run is in its data."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .schema import whole

__all__ = ["Position"]


@dataclass(frozen=True)
class Position:
    """How far training has come, on a first stage; with replicas the first one's.

    Args:
        epochs: calls of `train` that are over.
        mini_batches: fed in the call that is not.
        total: mini-batches fed in all.
        micro_batches, samples: fed in all.
    """

    epochs: int = 0
    mini_batches: int = 0
    total: int = 0
    micro_batches: int = 0
    samples: int = 0

    @classmethod
    def of(cls, written: Mapping[str, Any]) -> "Position":
        """One that was written.

        Raises:
            ValueError, TypeError, AttributeError: it is none.
        """
        return cls(**{name: whole(name, value) for name, value in written.items()})
