"""Servers as a job of their own: replicas come and go, each a job too, and none ends the others."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from ..address import own_address
from ..corrections import Correction
from ..errors import InputError, first_line
from ..grid import Grid
from ..layers import materialise
from ..partition import check_model
from ..report import ShardStatistics
from ..settings import OptimizerFactory, SchedulerFactory, Settings
from ..watch import Pulse, Watch
from ..world import meet
from .rendezvous import Rendezvous, describe, split_address
from .served import Served
from .server import Members, Server

__all__ = ["serve"]

_CPU = torch.device("cpu")


@dataclass
class _Attendance:
    """Which replicas came to a server, and how they went."""

    there: set[int] = field(default_factory=set)
    came: int = 0
    finished: int = 0


def serve(
    model: nn.Sequential,
    optimizer: OptimizerFactory,
    replicas: Served,
    *,
    stages: int,
    scheduler: SchedulerFactory | None = None,
    corrections: Sequence[Correction] = (),
    seed: int | None = None,
    timeout: tuple[float, float] = (300.0, 60.0),
    log: Callable[[str], None] = print,
) -> ShardStatistics:
    """Serve a model's weights until the last replica has gone; every rank serves one stage.

    It ends once `replicas.count` have come and all have gone, at least one of them having finished.

    Args:
        model, optimizer, stages, scheduler, corrections, seed: as the replicas' pipelines have.
        replicas: with a count and the address at which replicas find the servers, as theirs.
        timeout: seconds for which to wait for a replica where none is; and of another rank's
            silence.
        log: told, on the first rank, who comes and goes.

    Returns:
        This rank's figures.

    Raises:
        InputError: the ranks cannot meet, the port is taken, or no replica has come in time.
        TypeError, ValueError: an argument that cannot work.
    """
    world = meet()
    if world is None:
        raise ValueError(f"serve() needs torchrun --nproc-per-node {stages}: a process a stage")
    if world.size != stages:
        raise ValueError(
            f"stages={stages} and {world.size} ranks: start torchrun --nproc-per-node {stages}"
        )
    address = replicas.address
    if replicas.count is None or address is None:
        raise ValueError(
            "serve() needs replicas= with a count and an address, as in Downpour(4, "
            "address='10.0.0.5:29600'), and each replica's Pipeline the same"
        )
    check_model(model, stages)
    seed = torch.initial_seed() if seed is None else seed
    settings = Settings(
        loss_fn=nn.Identity(),
        optimizer=optimizer,
        scheduler=scheduler,
        corrections=tuple(corrections),
    )
    grid = Grid(stages, 0, stages, world.rank)
    servers: list[Server] = []

    def pulse() -> Pulse:
        handled = servers[0].handled if servers else 0
        return Pulse(handled, False, bool(servers), "serving weights")

    watch = Watch(world.store, "serve", world.rank, grid.names, timeout, pulse)
    try:
        # The first rank keeps the store, so it must be there before the others look in.
        store = Rendezvous(address, watch.idle, keeps=True) if world.rank == 0 else None
        if store is not None:
            store.open(replicas.count, describe(dict(model.named_parameters())))
            watch.share("open", "")
        watch.learn("open")
        store = store or Rendezvous(address, watch.idle)
        if world.rank == 0:
            things = f"{stages} stage{'s' * (stages > 1)} to {replicas.count} replica"
            log(f"serving {things}{'s' * (replicas.count > 1)} at {address}")
        job = _Job(replicas, grid, model, settings, seed, store, watch, timeout[0], log)
        servers.append(job.start())
        job.wait(servers[0])
    except Exception as error:
        if isinstance(error, ValueError):
            watch.refuse(error)
        else:
            watch.fail_by(error, "serving weights")
        raise
    servers[0].close()
    # The first rank's store must outlive what the others still say to it.
    watch.share(f"done/{world.rank}", "")
    for rank in range(stages):
        watch.learn(f"done/{rank}")
    watch.close()
    return servers[0].shard.statistics


@dataclass
class _Job:
    """One rank of it."""

    replicas: Served
    grid: Grid
    model: nn.Sequential
    settings: Settings
    seed: int
    store: Rendezvous
    watch: Watch
    patience: float
    log: Callable[[str], None]
    attendance: _Attendance = field(default_factory=_Attendance)

    def start(self) -> Server:
        """Wait for the first replica's cut, and open the door."""
        stage, begun = self.grid.stage, time.monotonic()
        while (cut := self.store.agree(None)) is None:
            self.watch.idle()
            self._lose_patience(begun)
        named = [(c.name, self.model.get_submodule(c.name)) for c in cut.stages[stage]]
        for name, layer in named:
            materialise(name, layer, self.seed, _CPU)
        weights = {
            f"{name}.{path}": weight
            for name, layer in named
            for path, weight in layer.named_parameters()
            if weight.requires_grad
        }
        count = self.replicas.count or 1
        shard = self.replicas.make_shard(stage, weights, self.settings, count, present=False)
        checkpoint = self.replicas.checkpoint_of(stage)
        if checkpoint is not None and (note := checkpoint.resume(shard)):
            self.log(note)
        host = own_address(split_address(self.store.address)[0])
        server = Server(
            shard,
            Members(joined=self._joined, left=self._left, seated=self.store.has_seated),
            lambda error: self.watch.fail_by(error, f"serving the weights of stage {stage}"),
            host,
            checkpoint=checkpoint,
            silence=self.watch.silence,
        )
        self.store.announce(stage, f"{host}:{server.port}")
        return server

    def wait(self, server: Server) -> None:
        """Serve until all have gone."""
        begun = time.monotonic()
        seen, expected = self.attendance, self.replicas.count or 1
        while seen.there or seen.came < expected or not seen.finished:
            self.watch.idle()
            if seen.there:
                begun = time.monotonic()
            elif seen.finished and time.monotonic() - begun > self.patience:
                return
            else:
                self._lose_patience(begun)

    def _lose_patience(self, begun: float) -> None:
        if time.monotonic() - begun > self.patience:
            raise InputError(
                f"no replica has been there for {self.patience:.0f} s: start them with the "
                f"address {self.store.address}, or give the servers a longer timeout"
            )

    # Called from the server's thread ------------------------------------------------------------

    def _joined(self, replica: int) -> None:
        self.attendance.there.add(replica)
        self.attendance.came += 1
        self._say(f"replica {replica} has joined")

    def _left(self, replica: int, lost: Exception | None) -> None:
        self.attendance.there.discard(replica)
        self.attendance.finished += lost is None
        how = "has finished" if lost is None else f"is gone: {first_line(lost)}"
        self._say(f"replica {replica} {how}")
        if self.grid.stage == 0:
            self.store.vacate(replica)

    def _say(self, what: str) -> None:
        if self.grid.stage == 0:
            many, seats = len(self.attendance.there), self.replicas.count or 1
            more = f", on the mini-batches of {seats}" if many > seats else ""
            self.log(f"{what}; {many} {'is' if many == 1 else 'are'} training{more}")
