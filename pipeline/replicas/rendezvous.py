"""Where servers and replicas meet that are jobs of their own: a store that the servers keep.

A replica takes a seat there, which says which mini-batches are its own, and a number that nobody
had before; it agrees with the others on the cut, and learns where each stage's server is.
"""

import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from ..errors import InputError, first_line
from ..partition import Partition

__all__ = ["Rendezvous", "Seat", "describe", "split_address"]

Seat = tuple[int, int, int]
"""A replica's number, its seat, and how many seats there are."""


class Rendezvous:
    """The servers' store.

    Args:
        address: "host:port".
        idle: sleep a moment.
        keeps: whether it is this process that keeps it; the others look in.
        patience: seconds for which to try.

    Raises:
        InputError: nobody keeps one there, or the port is taken.
    """

    def __init__(
        self,
        address: str,
        idle: Callable[[], None],
        keeps: bool = False,
        patience: float = 60.0,
    ) -> None:
        host, port = split_address(address)
        self.address = address
        try:
            if not keeps:
                _knock(host, port, idle, patience)
            self._store = TCPStore(
                host,
                port,
                is_master=keeps,
                wait_for_workers=False,
                timeout=timedelta(seconds=patience),
                master_listen_fd=_door(host, port) if keeps else None,
            )
        except (dist.DistError, OSError) as error:
            number = getattr(error, "errno", None)
            why = os.strerror(number) if number else first_line(error)
            if keeps:
                raise InputError(
                    f"the servers cannot keep their store at {address}: {why}; write an address of "
                    "this machine with a port that nobody holds, and the same for every replica"
                ) from error
            raise InputError(
                f"the servers cannot be reached at {address}: {why}; start them with "
                "headrace.launch.serve, and give every replica the address that they print"
            ) from error

    # What the servers do -----------------------------------------------------------------------

    def open(self, seats: int, model: str) -> None:
        """Let replicas in, of the same model."""
        self._store.set("model", model)
        self._store.set("seats", str(seats))

    def announce(self, stage: int, address: str) -> None:
        """Say where the server of a stage is."""
        self._store.set(f"server/{stage}", address)

    def has_seated(self, replica: int) -> bool:
        """Whether a replica has taken a seat; it may have left it since."""
        return bool(self._store.check([f"replica/{replica}"]))

    def vacate(self, replica: int) -> None:
        """Let somebody else have a replica's seat, if it took one."""
        if not self.has_seated(replica):  # to get what is not there would wait for it
            return
        seat = bytes(self._store.get(f"replica/{replica}")).decode()
        self._store.compare_set(f"seat/{seat}", str(replica), "")

    # What a replica does -----------------------------------------------------------------------

    def take_seat(self, model: str) -> Seat:
        """Take the first seat that is free; the next one round where none is.

        Raises:
            ValueError: the servers' model is another.
        """
        theirs = bytes(self._store.get("model")).decode()
        if theirs != model:
            raise ValueError(
                f"the servers at {self.address} have another model: {theirs}, and this one is "
                f"{model}; start both from the same configuration"
            )
        seats = int(self._store.get("seats"))
        number = int(self._store.add("replicas", 1)) - 1
        seat = number % seats
        for each in range(seats):
            mine = self._store.compare_set(f"seat/{each}", "", str(number))
            if bytes(mine).decode() == str(number):
                seat = each
                break
        self._store.set(f"replica/{number}", str(seat))
        return number, seat, seats

    def servers(self, stages: int, idle: Callable[[], None]) -> list[str]:
        """Where each stage's server is, once all are there.

        Args:
            idle: sleep a moment.
        """
        keys = [f"server/{stage}" for stage in range(stages)]
        while not self._store.check(keys):
            idle()
        return [bytes(self._store.get(key)).decode() for key in keys]

    # What they agree on ------------------------------------------------------------------------

    def agree(self, cut: Partition | None) -> Partition | None:
        """The cut that all go by: the first that anybody has proposed."""
        if cut is not None:
            text = self._store.compare_set("cut", "", cut.to_json())
            return Partition.from_json(bytes(text).decode())
        if not self._store.check(["cut"]):
            return None
        return Partition.from_json(bytes(self._store.get("cut")).decode())


def _door(host: str, port: int) -> int | None:
    """Where the store is to listen; None: at every address of this machine, as is torch's way.

    A name may mean another address here than it does elsewhere, but the loopback is the loopback.
    """
    if host != "localhost" and not host.startswith("127."):
        return None
    return socket.create_server((host, port), backlog=128).detach()  # the store closes it


def _knock(host: str, port: int, idle: Callable[[], None], patience: float) -> None:
    """Wait until somebody opens; a store's own waiting would not heed signals."""
    begun, told = time.monotonic(), False
    while True:
        try:
            socket.create_connection((host, port), timeout=1.0).close()
            return
        except OSError:
            waited = time.monotonic() - begun
            if waited > patience:
                raise
            if waited > 3 and not told:
                print(f"headrace: waiting for the servers at {host}:{port}", flush=True)
                told = True
            idle()


def split_address(address: str) -> tuple[str, int]:
    """Host and port.

    Raises:
        ValueError: it is no "host:port".
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"address={address!r}: write host:port, as in '10.0.0.5:29600'")
    return host, int(port)


def describe(tensors: Mapping[str, Tensor]) -> str:
    """A model in a few words that another model does not have."""
    names = json.dumps([[name, list(t.shape), str(t.dtype)] for name, t in tensors.items()])
    elements = sum(t.numel() for t in tensors.values())
    code = hashlib.sha256(names.encode()).hexdigest()[:8]
    return f"{len(tensors)} tensors of {elements:,} elements ({code})"
