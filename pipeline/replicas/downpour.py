"""Downpour SGD: replicas push gradients to, and fetch weights from, parameter servers.

Dean et al. 2012, section 4.1, one server to a stage; n-softsync and hard sync are Zhang et al. 2016
(section 3), the bound on how far a replica may be ahead is Ho et al. 2013.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from ..gradient import Gradient
from ..grid import Grid
from ..message import Kind, Message
from ..settings import Settings
from .client import Client, Connection
from .peers import Peers, Steps
from .replicas import Meeting
from .served import Served, check_number
from .server import pack
from .shard import Protocol, Shard

if TYPE_CHECKING:
    from ..engine import Engine
    from ..stage import Stage

__all__ = ["Downpour"]


class Downpour(Served):
    """Each replica computes on the weights that it has, and pushes its gradients to the server,
    whose optimizer (the pipeline's `optimizer`) moves the weights.

    Args:
        n_fetch, n_push: updates of a replica's from one to the next. Between two fetches it moves
            its own copy, with an optimizer of its own (the pipeline's, again).
        sync: None applies each gradient as it comes; a number n, n-softsync, applies the mean of
            every R/n (rounded down); 'hard' waits for all replicas' (a prefetch of 0 makes it plain
            SGD on their mini-batches joined).
        bound: updates that a replica may be ahead of the slowest; None: any number.
        warm_up: updates that replica 0 makes alone, in the beginning.
        warm_up_factor: of the learning rate, after them: a large one's edge may have moved.

    For the other arguments see `Served`.

    Raises:
        ValueError: a number that is too small, or two arguments that exclude each other.
    """

    def __init__(
        self,
        count: int | None = None,
        *,
        n_fetch: int = 1,
        n_push: int = 1,
        prefetch: int | None = None,
        sync: int | Literal["hard"] | None = None,
        bound: int | None = None,
        warm_up: int = 0,
        warm_up_factor: float = 1.0,
        beside: bool = False,
        checkpoint: str | Path | None = None,
        checkpoint_every: int = 1000,
        address: str | None = None,
    ) -> None:
        hard = sync == "hard"
        prefetch = (0 if hard else 1) if prefetch is None else prefetch
        super().__init__(
            count,
            beside=beside,
            prefetch=prefetch,
            checkpoint=checkpoint,
            checkpoint_every=checkpoint_every,
            address=address,
        )
        check_number("n_fetch", n_fetch)
        check_number("n_push", n_push)
        check_number("warm_up", warm_up, least=0)
        if bound is not None:
            check_number("bound", bound, least=0)
        if sync is not None and not hard:
            check_number("sync", sync, words="None, 'hard' or ")
        if not warm_up_factor > 0:
            raise ValueError(f"warm_up_factor={warm_up_factor!r}: give a number above 0")
        if warm_up_factor != 1 and not warm_up:
            raise ValueError(
                f"warm_up_factor={warm_up_factor!r} without warm_up: write how many updates "
                "replica 0 makes alone before it"
            )
        if hard and (n_fetch, n_push) != (1, 1):
            raise ValueError(
                f"sync='hard' with n_fetch={n_fetch}, n_push={n_push}: all replicas wait for each "
                "other at every update, so write 1 for both, or another sync"
            )
        if bound is not None and bound < prefetch * n_fetch:
            raise ValueError(
                f"bound={bound} with prefetch={prefetch} and n_fetch={n_fetch}: a replica goes on "
                f"for {prefetch * n_fetch} updates before it hears that it must wait; give a "
                "larger bound, or prefetch=0"
            )
        self.n_fetch, self.n_push, self.sync, self.bound = n_fetch, n_push, sync, bound
        self.warm_up, self.warm_up_factor = warm_up, float(warm_up_factor)

    def protocol(self, replicas: int) -> Protocol:
        """What it means for the server.

        Raises:
            ValueError: `sync` is more than there are replicas.
        """
        if isinstance(self.sync, int) and self.sync > replicas:
            raise ValueError(
                f"sync={self.sync} with {replicas} replicas: n-softsync is for n up to as many; "
                "leave it out to apply each gradient as it comes"
            )
        if self.sync == "hard":
            gradients = replicas
        else:
            gradients = 1 if self.sync is None else max(1, replicas // self.sync)
        bound = self.bound
        if bound is not None:
            bound = (bound - self.prefetch * self.n_fetch) // self.n_push
        return Protocol(gradients, self.sync == "hard", bound, self.warm_up, self.warm_up_factor)

    def settings(self, settings: Settings) -> Settings:
        return replace(settings, scheduler=None, corrections=())

    def make_shard(
        self,
        stage: int,
        weights: dict[str, Any],
        settings: Settings,
        replicas: int,
        present: bool = True,
    ) -> Shard:
        training = range(replicas if present else 0)
        return Shard(stage, weights, settings, self.protocol(replicas), training)

    def lay_out(self, ranks: int, rank: int, stages: int) -> Grid:
        grid = super().lay_out(ranks, rank, stages)
        self.protocol(grid.replicas if self.address is None else self.count or 1)
        return grid

    def updates(self, updates: int, replicas: int) -> int:
        return math.ceil(updates / (self.n_push * self.protocol(replicas).gradients))

    def join(self, meeting: Meeting) -> Peers:
        client = _Pushing(self.connect(meeting), self.n_fetch, self.n_push, self.prefetch)
        client.is_first = meeting.grid.replica == 0  # a job of its own speaks for itself
        return client


class _Pushing(Client):
    """Sums up gradients, and pushes them; takes the server's weights as they come."""

    def __init__(self, connection: Connection, n_fetch: int, n_push: int, prefetch: int) -> None:
        super().__init__(connection, n_fetch, n_push, prefetch)
        self._sums: dict[str, Tensor] = {}
        self._samples, self._versions = 0, list[int]()

    def timestamp(self, stage: "Stage") -> int:
        return self.version

    def _begin(self, engine: "Engine") -> Steps:
        # While another replica warms up, the answer does not come.
        self.fetch()
        yield from self.hear(engine)

    def move(self, stage: "Stage", gradient: Gradient) -> None:
        for name, weight in stage.owned.items():
            if weight.grad is not None:
                held = self._sums.get(name)
                self._sums[name] = weight.grad if held is None else held + weight.grad
        self._samples += gradient.samples
        self._versions += gradient.versions
        if self._n_fetch > 1:
            # The optimizer may keep the gradient, which is on its way to the server.
            for weight in stage.owned.values():
                weight.grad = None if weight.grad is None else weight.grad.clone()
            stage.step()

    def push(self, stage: "Stage") -> None:
        if not self._versions:
            return
        numbers = (float(self._samples), *map(float, self._versions))
        body = pack(self._sums, list(stage.owned))
        self._connection.outbox.send(Message(Kind.PUSH, numbers=numbers, body=body))
        self._sums, self._samples, self._versions = {}, 0, []

    def take_in(self, stage: "Stage", tensors: list[Tensor]) -> None:
        self.load(stage, tensors)

    def _note(self, stage: "Stage", message: Message) -> None:
        super()._note(stage, message)
        groups = [group for optimizer in stage.optimizers for group in optimizer.param_groups]
        for group, rate in zip(groups, message.numbers[2:], strict=True):
            group["lr"] = rate
