"""Downpour SGD: replicas push gradients to, and fetch weights from, parameter servers.

Dean et al. 2012, section 4.1, one server to a stage; n-softsync and hard sync are Zhang et al. 2016
(section 3), the bound on how far a replica may be ahead is Ho et al. 2013.
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ..errors import first_line
from ..gradient import Gradient
from ..grid import Grid
from ..message import Kind, Message
from ..partition import Partition
from ..settings import Settings
from ..socket_channel import dial
from .client import Client, Connection
from .meeting_point import PATIENCE, meet_server, offer
from .peers import Peers, Steps
from .rendezvous import Rendezvous, describe, split_address
from .replicas import Meeting, Replicas
from .server import Checkpoint, Members, Server, pack
from .shard import Protocol, Shard

if TYPE_CHECKING:
    from ..engine import Engine
    from ..stage import Stage
    from ..watch import Watch

__all__ = ["Downpour", "Served"]


class Served(Replicas):
    """Replicas that share their weights through a server for each stage: rank R·n + j is stage j's.

    Args:
        count: R; None is as many as the ranks make.
        beside: each server lives in replica 0's process of its stage instead, in a thread.
        prefetch: 0 waits for what was asked for; p goes on, and takes in what was asked for p times
            earlier: so a link's round trip may take as long as p times what lies between.
        checkpoint: folder in which each server keeps its state, in a file of its own; where there
            is one already, it goes on from that.
        checkpoint_every: a server's updates from one to the next.
        address: "host:port" of servers that are a job of their own (`serve`). This job is then one
            of their replicas: it may come late, and its end does not end the others.
    """

    def __init__(
        self,
        count: int | None = None,
        *,
        beside: bool = False,
        prefetch: int = 1,
        checkpoint: str | Path | None = None,
        checkpoint_every: int = 1000,
        address: str | None = None,
    ) -> None:
        super().__init__(count)
        check_number("prefetch", prefetch, least=0)
        check_number("checkpoint_every", checkpoint_every)
        self.beside, self.prefetch = beside, prefetch
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        self.checkpoint_every = checkpoint_every
        self.address = address
        if address is not None:
            split_address(address)
        self._store: Rendezvous | None = None
        self._number, self._addresses = 0, list[str]()

    def ranks(self, stages: int) -> int:
        if self.address is not None:
            return stages
        return super().ranks(stages) + (0 if self.beside else stages)

    def lay_out(self, ranks: int, rank: int, stages: int) -> Grid:
        if self.address is not None:
            if ranks != stages:
                raise ValueError(
                    f"{ranks} ranks are not {stages} stages: with address= each replica is a job "
                    f"of its own, so start torchrun --nproc-per-node {stages} for each"
                )
            return Grid(stages, rank=rank)
        servers = 0 if self.beside else stages
        count = self.count or (ranks - servers) // stages
        if count < 1 or count * stages + servers != ranks:
            many = f"{count} replicas" if self.count else "replicas"
            raise ValueError(
                f"{ranks} ranks do not make {many} of {stages} stages"
                f"{'' if self.beside else f' and {stages} servers'}: start with torchrun "
                f"--nproc-per-node {self.ranks(stages)}"
                f"{'' if self.beside else ', or write beside=True for servers without ranks'}"
            )
        return Grid(stages, count, servers, rank)

    def enrol(self, grid: Grid, watch: "Watch", model: nn.Sequential) -> Grid:
        if self.address is None:
            return grid
        if grid.rank == 0:
            self._store = Rendezvous(self.address)
            seat = self._store.take_seat(describe(dict(model.named_parameters())))
            watch.share("seat", json.dumps(seat))
        self._number, seat_, seats = json.loads(watch.learn("seat"))
        return replace(grid, seat=seat_, seats=seats)

    def agree(self, cut: Partition | None) -> Partition | None:
        return cut if self._store is None else self._store.agree(cut)

    def serve(self, meeting: Meeting) -> Server:
        """Start the server of a stage, in this process."""
        grid, watch = meeting.grid, meeting.watch
        weights = {n: p for n, p in meeting.layers.named_parameters() if p.requires_grad}
        shard = self.make_shard(grid.stage, weights, meeting.settings, grid.replicas)
        checkpoint = self.checkpoint_of(grid.stage)
        if checkpoint is not None and checkpoint.file.exists():
            shard.load_state_dict(torch.load(checkpoint.file, weights_only=True))
        members = Members(
            expected=set(range(grid.replicas)),
            left=lambda replica, said: (
                None
                if said
                else watch.lost(
                    replica * grid.stages + grid.stage, RuntimeError("its connection was closed")
                )
            ),
        )
        return offer(shard, members, meeting, checkpoint)

    def checkpoint_of(self, stage: int) -> Checkpoint | None:
        """Where the server of a stage keeps its state."""
        if self.checkpoint is None:
            return None
        return Checkpoint(self.checkpoint / f"stage-{stage}.pt", self.checkpoint_every)

    def make_shard(
        self,
        stage: int,
        weights: dict[str, Any],
        settings: Settings,
        replicas: int,
        present: bool = True,
    ) -> Any:
        """What is to be served.

        Args:
            present: the replicas are all there from the beginning.
        """
        raise NotImplementedError

    def connect(self, meeting: Meeting) -> Connection:
        """Find the server of this stage, starting it where it is to live here."""
        if self.address is not None:
            return self._connect_with_job(meeting)
        own = self.serve(meeting) if self.beside and meeting.grid.replica == 0 else None
        return meet_server(meeting, own)

    def _connect_with_job(self, meeting: Meeting) -> Connection:
        watch, stage = meeting.watch, meeting.grid.stage
        if self._store is not None:
            found = self._store.servers(meeting.grid.stages, watch.idle)
            watch.share("servers", json.dumps(found))
        host, port = split_address(json.loads(watch.learn("servers"))[stage])
        return Connection(
            dial(host, port, PATIENCE),
            self._number,
            watch,
            lambda error: watch.fail(
                f"the server of stage {stage} at {host}:{port} is gone ({first_line(error)}): its "
                "last checkpoint is where it was started",
                code=1,
            ),
            meeting.emulated_link,
        )


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
        """What it means for the server."""
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


def check_number(name: str, value: Any, least: int = 1, words: str = "") -> None:
    """Refuse what is no whole number, or too small a one."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r}: give {words}a whole number >= {least}")
