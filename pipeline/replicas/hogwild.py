"""HOGWILD!: replicas on one host update the same memory, without a lock (Niu et al. 2011)."""

import fcntl
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from ..channel import Soon
from ..gradient import Gradient
from ..rules import Rule
from ..schedule import Schedule
from ..shared_weights import ROW, SharedWeights
from .peers import Peers, Steps
from .replicas import Meeting, Replicas

if TYPE_CHECKING:
    from ..engine import Engine
    from ..stage import Stage

__all__ = ["Hogwild"]


class Hogwild(Replicas):
    """All replicas of a stage read and write the same weights, in place, whenever they like.

    Each has its own optimizer, with its own state. Sparse gradients write the rows they have only.
    Buffers (statistics of normalisation) are shared as the weights are.

    Args:
        count: R; None is as many as the ranks make.
        lock: take a lock around each update, to see what that costs.
    """

    def __init__(self, count: int | None = None, *, lock: bool = False) -> None:
        super().__init__(count)
        if not isinstance(lock, bool):
            raise TypeError(f"lock={lock!r}: give True or False")
        self.lock, self._tears = lock, False

    def check(self, rules: Sequence[Rule], schedule: Schedule) -> None:
        self._tears = any(rule.keeps_weights for rule in rules) and not schedule.flushes

    def join(self, meeting: Meeting) -> Peers:
        grid = meeting.grid
        if self._tears and grid.rank == 0:
            warnings.warn(
                "replicas: hogwild under a rule that copies the weights (stash, predict): the copy "
                "is torn, made while others write; rule=Delayed('current') or 'replay' makes none",
                stacklevel=2,
            )
        shared = SharedWeights(
            meeting.layers, grid.replica, grid.replicas, meeting.watch, f"weights/{grid.stage}"
        )
        return _Sharing(shared, grid.replica, self.lock)


UPDATES, SETTLED = 0, 1
"""The counters of a replica, which it alone writes."""


class _Sharing(Peers):
    """A stage among those that share its memory."""

    def __init__(self, shared: SharedWeights, replica: int, lock: bool) -> None:
        self._shared, self._counters, self._own = shared, shared.counters, ROW * replica
        self._locks, self._warned = lock, False

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self._counters[self._own + UPDATES]}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        self._counters[self._own + UPDATES] = state["updates"]

    def timestamp(self, stage: "Stage") -> int:
        return sum(self._counters[UPDATES::ROW])

    def move(self, stage: "Stage", gradient: Gradient) -> None:
        self._warn_of_momentum(stage)
        with self._locked():
            stage.step(gradient.rate)
        self._counters[self._own + UPDATES] += 1

    def settle(self, engine: "Engine") -> Steps:
        """Wait for all to be here. Nobody goes on to train until all have been `release`d."""
        self._counters[self._own + SETTLED] += 1
        mine = self._counters[self._own + SETTLED]
        while min(self._counters[SETTLED::ROW]) < mine:
            yield Soon()

    def release(self, engine: "Engine") -> Steps:
        yield from self.settle(engine)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        if not self._locks:
            yield
            return
        fcntl.lockf(self._shared.file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self._shared.file, fcntl.LOCK_UN)

    def _warn_of_momentum(self, stage: "Stage") -> None:
        if self._warned or stage.index or self._own:
            return
        self._warned = True
        groups = [group for each in stage.optimizers for group in each.param_groups]
        if any(group.get("momentum") or group.get("betas", (0,))[0] for group in groups):
            warnings.warn(
                "replicas: hogwild with momentum: each replica has its own, and each adds to the "
                "delay that the others cause; plain SGD, or a lower rate or momentum, is safer",
                stacklevel=2,
            )
