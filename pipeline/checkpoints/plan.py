"""When checkpoints are made, and how many are kept."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .position import Position

__all__ = ["STEP", "Checkpoints", "check_folder", "check_number"]

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
        keep: how many; older ones are removed once a new one is whole, but for links and those that
            have another name.

    Raises:
        TypeError, ValueError: a folder that is none, a number that is too small.
    """

    folder: str | Path
    every: int | None = None
    keep: int = 2

    def __post_init__(self) -> None:
        check_folder("folder", self.folder)
        if self.every is not None:
            check_number("every", self.every, "None: at the end of each call")
        check_number("keep", self.keep)

    def path(self, position: Position) -> Path:
        """Where the checkpoint of a position goes."""
        return Path(self.folder) / f"{STEP}{position.micro_batches:08d}"


def check_folder(name: str, value: Any) -> None:
    """Refuse what is no folder's name.

    Raises:
        TypeError: with what to write instead.
    """
    if not isinstance(value, str | Path) or not str(value):
        raise TypeError(f"{name}={value!r}: give a folder's name")


def check_number(name: str, value: Any, otherwise: str = "") -> None:
    """Refuse what is no number of one or more.

    Args:
        otherwise: what may be given beside one.

    Raises:
        ValueError: with what to write instead.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        rest = f", or {otherwise}" if otherwise else ""
        raise ValueError(f"{name}={value!r}: give a whole number >= 1{rest}")
