"""Checkpoints: all that a run needs to go on, on disk. One idea a file."""

from .checkpoint import Checkpoint, CheckpointError, find_latest
from .plan import Checkpoints
from .position import Position
from .weights import load_weights, save_weights

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Checkpoints",
    "Position",
    "find_latest",
    "load_weights",
    "save_weights",
]
