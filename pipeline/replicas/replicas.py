"""How the replicas of a pipeline share their weights: what a `Pipeline` asks of the choice."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from ..grid import Grid
from ..layers import Layers
from ..link import Link
from ..partition import Partition
from ..rules import Rule
from ..schedule import Schedule
from ..settings import Settings
from .peers import Peers

if TYPE_CHECKING:
    from ..watch import Watch
    from .server import Server

__all__ = ["Meeting", "Replicas"]


@dataclass(frozen=True)
class Meeting:
    """What a stage has at hand to find the same stage of the other replicas.

    Args:
        settings: of whoever moves the weights.
        emulated_link: how slow messages between processes are to be.
    """

    grid: Grid
    layers: Layers
    settings: Settings
    watch: "Watch"
    emulated_link: Link | None = None


class Replicas:
    """Copies of the whole pipeline, each on mini-batches of its own.

    Replica r of R takes mini-batches r, r+R, r+2R, … of the loader, which must therefore give the
    same ones in the same order in every replica; one with a DistributedSampler is read as it is.

    Args:
        count: R; None is as many as the ranks make.

    Raises:
        ValueError: a count below 1.
    """

    @property
    def has_servers(self) -> bool:
        """Whether servers of this job have a state of their own."""
        return False

    connects = False
    """Whether the same stage of all replicas is to be connected in a ring."""

    def __init__(self, count: int | None = None) -> None:
        if count is not None and (isinstance(count, bool) or not isinstance(count, int)):
            raise TypeError(f"count={count!r}: give a whole number of replicas, or None")
        if count is not None and count < 1:
            raise ValueError(f"count={count}: give 1 or more replicas")
        self.count = count

    def check(self, rules: Sequence[Rule], schedule: Schedule) -> None:
        """Refuse a rule or schedule under which this way of sharing cannot be right.

        Raises:
            ValueError: with the reason and what to write instead.
        """

    def ranks(self, stages: int) -> int:
        """How many ranks to start."""
        return (self.count or 2) * stages

    def lay_out(self, ranks: int, rank: int, stages: int) -> Grid:
        """Deal the ranks out.

        Raises:
            ValueError: they do not make whole replicas; the message says how many to start.
        """
        count = self.count or ranks // stages
        if count * stages != ranks:
            many = f"{count} replicas" if self.count else "replicas"
            raise ValueError(
                f"{ranks} ranks do not make {many} of {stages} stages: start with torchrun "
                f"--nproc-per-node {self.ranks(stages)}"
            )
        return Grid(stages, count, 0, rank)

    def enrol(self, grid: Grid, watch: "Watch", model: nn.Sequential) -> Grid:
        """Make the acquaintance of replicas in other jobs, if there may be such.

        Raises:
            ValueError, InputError: they train another model, or cannot be found.
        """
        return grid

    def agree(self, cut: Partition | None) -> Partition | None:
        """The cut of those in other jobs: this one, if nobody has proposed another before."""
        return cut

    def updates(self, updates: int, replicas: int) -> int:
        """How many updates a learning-rate scheduler sees, where one pipeline makes so many."""
        return math.ceil(updates / replicas)

    def settings(self, settings: Settings) -> Settings:
        """What of the settings is the stages' own affair."""
        return settings

    def join(self, meeting: Meeting) -> Peers:
        """Find the same stage of the other replicas; called before the stage is built."""
        raise NotImplementedError

    def serve(self, meeting: Meeting) -> "Server":
        """Serve a stage's weights from a rank of its own; where there are such ranks."""
        raise NotImplementedError
