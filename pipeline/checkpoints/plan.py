"""When checkpoints are made, and how many are kept."""

from dataclasses import dataclass
from pathlib import Path

from .position import Position

__all__ = ["STEP", "Checkpoints"]

STEP = "step-"
"""Begins the names of those that `train` makes."""


@dataclass(frozen=True)
class Checkpoints:
    """What `train` is to save of itself, into FOLDER/step-MICRO_BATCHES.

    Args:
        folder: of all checkpoints; hosts share it.
        every: mini-batches from one to the next, counted from the run's beginning; with replicas
            each one's own, from the beginning of its pass, and at the end of a pass if so many have
            gone by since the last. None: one at the end of each call of `train`.
        keep: how many; older ones are removed once a new one is whole.

    Raises:
        TypeError, ValueError: a folder that is none, a number that is too small.
    """

    folder: str | Path
    every: int | None = None
    keep: int = 2

    def __post_init__(self) -> None:
        if not isinstance(self.folder, str | Path) or not str(self.folder):
            raise TypeError(f"folder={self.folder!r}: give a folder's name")
        for name, value in (("every", self.every), ("keep", self.keep)):
            given = name == "keep" or value is not None
            if given and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                rest = ", or None: at the end of each call" if name == "every" else ""
                raise ValueError(f"{name}={value!r}: give a whole number >= 1{rest}")

    def path(self, position: Position) -> Path:
        """Where the checkpoint of a position goes."""
        return Path(self.folder) / f"{STEP}{position.micro_batches:08d}"
