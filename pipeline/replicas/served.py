"""What ways of sharing through a server for each stage have in common."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import first_line
from ..grid import Grid
from ..partition import Partition
from ..settings import Settings
from .client import Connection, knock
from .meeting_point import meet_server, offer
from .rendezvous import Rendezvous, describe, split_address
from .replicas import Meeting, Replicas
from .server import Checkpoint, Members, Server

if TYPE_CHECKING:
    from ..watch import Watch

__all__ = ["Served", "check_number"]


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
        if checkpoint is not None and not isinstance(checkpoint, str | Path):
            raise TypeError(f"checkpoint={checkpoint!r}: give a folder's name")
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        self.checkpoint_every = checkpoint_every
        self.address = address
        if address is not None:
            split_address(address)
            if beside:
                raise ValueError(
                    f"address={address!r} with beside=True: servers that are a job of their own "
                    "are not beside a replica; leave one out"
                )
        self._store: Rendezvous | None = None
        self._number = 0

    @property
    def has_servers(self) -> bool:
        return self.address is None

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
            self._store = Rendezvous(self.address, watch.idle, patience=watch.patience)
            seat = self._store.take_seat(describe(dict(model.named_parameters())))
            watch.share("seat", json.dumps(seat))
        self._number, place, seats = json.loads(watch.learn("seat"))
        return replace(grid, seat=place, seats=seats)

    def agree(self, cut: Partition | None) -> Partition | None:
        return cut if self._store is None else self._store.agree(cut)

    def serve(self, meeting: Meeting) -> Server:
        """Start the server of a stage, in this process."""
        grid, watch = meeting.grid, meeting.watch
        weights = {n: p for n, p in meeting.layers.named_parameters() if p.requires_grad}
        shard = self.make_shard(grid.stage, weights, meeting.settings, grid.replicas)
        checkpoint = self.checkpoint_of(grid.stage)
        if checkpoint is not None and (note := checkpoint.resume(shard)):
            print(f"headrace: {note}", flush=True)
        members = Members(
            expected=set(range(grid.replicas)),
            left=lambda replica, lost: (
                None
                if lost is None
                else watch.lost(replica * grid.stages + grid.stage, RuntimeError(str(lost)))
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
        kept = "; it was told to keep checkpoints" if self.checkpoint else ""
        return Connection(
            knock(host, port),
            self._number,
            watch,
            lambda error: watch.fail(
                f"the server of stage {stage} (at {host}:{port}, of the servers at "
                f"{self.address}) is gone: {first_line(error)}{kept}",
                code=1,
            ),
            meeting.emulated_link,
            silence=watch.silence,
        )


def check_number(name: str, value: Any, least: int = 1, words: str = "") -> None:
    """Refuse what is no whole number, or too small a one."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r}: give {words}a whole number >= {least}")
