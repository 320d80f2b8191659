"""The runs that are disturbed: small ones, each deterministic, saved every few mini-batches."""

from dataclasses import dataclass
from typing import Any

from .data import CLASSES, FEATURES

__all__ = ["BATCH", "EVERY", "KEEP", "MINI_BATCHES", "SILENCE", "WORKLOADS", "Workload"]

BATCH, SAMPLES, EPOCHS, WIDTH = 16, 640, 8, 48
MINI_BATCHES = EPOCHS * SAMPLES // BATCH
EVERY, KEEP = 15, 3
SILENCE = 5.0
"""Seconds after which a stage is given up."""


@dataclass(frozen=True)
class Workload:
    """A kind of run.

    Args:
        pipeline: its options.
        optimizer: its class and arguments.
        cuts: micro-batches of a mini-batch.
        drains: whether a checkpoint in another place changes what comes out.
        shuffle: whether the data's order is another one each epoch.
    """

    pipeline: dict[str, Any]
    optimizer: dict[str, Any]
    cuts: int = 1
    drains: bool = False
    shuffle: bool = True

    def config(self, stages: int, pace: float, poisoned: int | None = None) -> dict[str, Any]:
        """The configuration of a run, for YAML."""
        data = {"samples": SAMPLES, "pace": pace, "poisoned": poisoned}
        widths = [FEATURES, *[WIDTH] * stages, CLASSES]
        # Flatten, then Linear, ReLU and Dropout of each width, then Linear.
        balance = [4, *[3] * (stages - 2), 4]
        return {
            "name": "job",
            "stages": stages,
            "epochs": EPOCHS,
            "threads": 1,
            "log_every": 40,
            "model": {"class_path": "mlp", "init_args": {"widths": widths, "dropout": 0.1}},
            "loss": "CrossEntropyLoss",
            "optimizer": self.optimizer,
            "data": {
                "train": {"class_path": f"{Workload.__module__[:-8]}data.Paced", "init_args": data},
                "batch_size": BATCH,
                "shuffle": self.shuffle,
            },
            "pipeline": {
                **self.pipeline,
                "micro_batches": self.cuts,
                "balance": balance,
                "timeout": [60.0, SILENCE],
            },
            "checkpoint": {"every": EVERY, "keep": KEEP},
        }


SGD = {"class_path": "SGD", "init_args": {"lr": 0.05, "momentum": 0.5}}
ADAM = {"class_path": "Adam", "init_args": {"lr": 1e-3}}

WORKLOADS = {
    "1f1b": Workload({"schedule": "1f1b"}, ADAM, cuts=2),
    "stream": Workload({"schedule": "stream"}, SGD, drains=True),
    "nan": Workload({"on_nonfinite": "skip"}, SGD, drains=True, shuffle=False),
    "full": Workload({"schedule": "stream"}, ADAM, drains=True),
}
"""By name: exact; on late gradients; with a NaN in each epoch; on a small disk."""
