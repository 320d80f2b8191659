"""The runs that are disturbed: small ones, saved often, and what they must come to."""

from dataclasses import dataclass
from typing import Any, Literal

from headrace.pipeline.grid import Grid

from .data import CLASSES, FEATURES

__all__ = [
    "BATCH",
    "EPOCHS",
    "EVERY",
    "KEEP",
    "MINI_BATCHES",
    "POISONED",
    "SILENCE",
    "WORKLOADS",
    "Workload",
]

BATCH, WIDTH = 16, 48
EVERY, KEEP = 15, 3
EPOCHS, IN_AN_EPOCH = 8, 40
"""Passes over the data, and mini-batches of each, for each replica."""
MINI_BATCHES = EPOCHS * IN_AN_EPOCH
REPLICAS, STAGES_OF_REPLICAS = 2, 2
POISONED = range(20 * BATCH, IN_AN_EPOCH * BATCH)
"""The items of which one may be poisoned."""
SILENCE = 5.0
"""Seconds after which a stage is given up."""

HERE = __name__.rpartition(".")[0]


@dataclass(frozen=True)
class Workload:
    """A kind of run.

    Args:
        pipeline: its options.
        optimizer: its class and arguments.
        cuts: micro-batches of a mini-batch.
        drains: whether a checkpoint in another place changes what comes out.
        shuffle: whether the data's order is another one each epoch.
        poison: where a micro-batch of each epoch has a NaN, if one has.
        replicas: how two of them share weights; None: it is one pipeline.
        has_servers: whether there is a server for each stage.
        repeats: whether two such runs come to the same weights.
    """

    pipeline: dict[str, Any]
    optimizer: dict[str, Any]
    cuts: int = 1
    drains: bool = False
    shuffle: bool = True
    poison: Literal["input", "gradient"] | None = None
    replicas: str | None = None
    has_servers: bool = False
    repeats: bool = True

    def grid(self, stages: int) -> Grid:
        """Its ranks; replicas are two of two stages, whatever was asked for."""
        if self.replicas is None:
            return Grid(stages)
        servers = STAGES_OF_REPLICAS if self.has_servers else 0
        return Grid(STAGES_OF_REPLICAS, REPLICAS, servers)

    def skips(self, stages: int) -> list[int]:
        """Updates that each stage skips: those that the NaN comes to."""
        reached = {None: 0, "input": stages, "gradient": 2}[self.poison]
        return [EPOCHS if stage < reached else 0 for stage in range(stages)]

    def config(self, stages: int, pace: float, poisoned: int | None = None) -> dict[str, Any]:
        """The configuration of a run, for YAML."""
        grid = self.grid(stages)
        samples = BATCH * IN_AN_EPOCH * grid.replicas
        data: dict[str, Any] = {"samples": samples, "pace": pace}
        if self.poison is not None:
            data["poisoned" if self.poison == "input" else "enlarged"] = poisoned
        shared = {"replicas": self.replicas} if self.replicas else {}
        return {
            "name": "job",
            "stages": grid.stages,
            "epochs": EPOCHS,
            "threads": 1,
            "log_every": 40,
            "model": self._model(grid.stages),
            "loss": "CrossEntropyLoss",
            "optimizer": self.optimizer,
            "data": {
                "train": {"class_path": f"{HERE}.data.Paced", "init_args": data},
                "batch_size": BATCH,
                "shuffle": self.shuffle,
            },
            "pipeline": {
                **self.pipeline,
                **shared,
                "micro_batches": self.cuts,
                "balance": self._balance(grid.stages),
                "timeout": [60.0, SILENCE],
            },
            "checkpoint": {"every": EVERY, "keep": KEEP},
        }

    def _model(self, stages: int) -> dict[str, Any]:
        widths = [FEATURES, *[WIDTH] * stages, CLASSES]
        name = f"{HERE}.fragile.fragile_mlp" if self.poison == "gradient" else "mlp"
        return {"class_path": name, "init_args": {"widths": widths, "dropout": 0.1}}

    def _balance(self, stages: int) -> list[int]:
        """Flatten, then Linear, ReLU and Dropout of each width, then Linear; one more, in stage 1,
        where a gradient is lost.
        """
        balance = [4, *[3] * (stages - 2), 4]
        balance[1] += self.poison == "gradient"
        return balance


SGD = {"class_path": "SGD", "init_args": {"lr": 0.05, "momentum": 0.5}}
ADAM = {"class_path": "Adam", "init_args": {"lr": 1e-3}}
ADAGRAD = {"class_path": "Adagrad", "init_args": {"lr": 0.01}}

STREAM = {"schedule": "stream"}
SKIP = {**STREAM, "on_nonfinite": "skip"}

WORKLOADS = {
    "1f1b": Workload({"schedule": "1f1b"}, ADAM, cuts=2),
    "stream": Workload(STREAM, SGD, drains=True),
    "nan": Workload(SKIP, SGD, drains=True, shuffle=False, poison="input"),
    "gradient": Workload(SKIP, SGD, drains=True, shuffle=False, poison="gradient"),
    "full": Workload(STREAM, ADAM, drains=True),
    "allreduce": Workload(STREAM, SGD, drains=True, replicas="allreduce"),
    "downpour": Workload(STREAM, ADAGRAD, replicas="downpour", has_servers=True, repeats=False),
}
"""By name: exact; on late gradients; with a NaN in each epoch, of the data or of a gradient; on a
small disk; replicas in step; replicas that do not wait, with servers."""
