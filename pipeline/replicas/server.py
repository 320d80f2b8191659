"""A parameter server's shard at work: a thread that hears the replicas and answers them.

All connections' messages come to one queue, and one thread takes them in turn: the shard needs no
lock, and what it did is the order in which they came.
"""

import os
import socket
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from ..channel import Outbox
from ..door import Door, prepare
from ..emulated_link import EmulatedLink
from ..errors import first_line
from ..link import Link
from ..message import Kind, Message
from ..report import ShardStatistics
from ..socket_channel import SocketInbox, SocketOutbox
from .request import check_join, most_bytes, read_request

__all__ = [
    "GREETING",
    "PROBES",
    "Checkpoint",
    "Members",
    "Server",
    "Serves",
    "beat_of",
    "pack",
]

GOODBYE = 10.0

GREETING = b"headrace weights"
"""What a replica says first: others who find the port are shown the door."""

PROBES = 3
"""Of the connection, half a minute in all: a replica that is gone without a word is missed then."""


class Serves(Protocol):
    """What a server asks of the weights it serves: `shard.Shard`, `elastic.Centre`."""

    stage: int
    version: int
    latest: dict[int, float]
    buffers: list[Tensor]

    def enter(self, replica: int) -> None: ...
    def leave(self, replica: int) -> None: ...
    def check(self, tensors: Mapping[str, Tensor], samples: int) -> None: ...
    def take(
        self, replica: int, tensors: dict[str, Tensor], samples: int, versions: list[int]
    ) -> None: ...
    def fetch(self, replica: int) -> None: ...
    def answers(self) -> list[int]: ...
    def give(self, replica: int) -> dict[str, Tensor]: ...
    def hand_out(self, replicas: Iterable[int]) -> dict[str, Tensor]: ...
    def snapshot(self) -> dict[str, Tensor]: ...
    def finish(self) -> None: ...
    def load(self, weights: Mapping[str, Tensor]) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...
    @property
    def names(self) -> list[str]: ...
    @property
    def learning_rates(self) -> list[float]: ...
    @property
    def statistics(self) -> ShardStatistics: ...


@dataclass(frozen=True)
class Checkpoint:
    """A shard's state on disk: whole or as it was, whenever the process dies.

    Args:
        file: written anew each time, under another name first.
        every: updates from one to the next.
    """

    file: Path
    every: int

    def write(self, state: Mapping[str, Any]) -> None:
        """Write, and see to it that it is on the disk before it takes the old one's place."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.file.with_name(self.file.name + ".part")
        with unfinished.open("wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, self.file)

    def resume(self, shard: "Serves") -> str:
        """Let a shard go on from the file, if there is one; a note of it, or nothing.

        Raises:
            ValueError: it is of another model, cut or optimizer.
        """
        if not self.file.exists():
            return ""
        try:
            shard.load_state_dict(torch.load(self.file, weights_only=True))
        except Exception as error:  # torch's, zip's and pickle's own; nothing of the file has run
            raise ValueError(
                f"checkpoint: {self.file} is not of these weights and optimizer "
                f"({type(error).__name__}: {first_line(error)}): give another folder, or the same "
                "model, balance and optimizer"
            ) from error
        return (
            f"the server of stage {shard.stage} goes on from {self.file}, after "
            f"{shard.version:,} updates"
        )


@dataclass
class Members:
    """Who the replicas are, and what the server does about one that comes, rests or is lost.

    Args:
        expected: those that train from the beginning, and settle together; None: each for itself.
        joined, left: called with the replica's number; `left` also with how it was lost, or None
            where it said goodbye.
        seated: whether a replica of this number may be there, where nobody is expected.
    """

    expected: set[int] | None = None
    joined: Callable[[int], None] = lambda replica: None
    left: Callable[[int, Exception | None], None] = lambda replica, lost: None
    seated: Callable[[int], bool] = lambda replica: True
    settled: set[int] = field(default_factory=set)


@dataclass(eq=False)
class _Client:
    """A replica's connection; its number is known once it has joined.

    Args:
        pushed: something: until then it has nothing that the server has not.
        gone: it said goodbye, or was shown the door.
    """

    inbox: SocketInbox
    outbox: Outbox
    replica: int = -1
    pushed: bool = False
    gone: bool = False


class Server:
    """Serves one shard at a port, until `close`.

    Args:
        failed: called with what went wrong in here.
        host: to listen at.
        emulated_link: how slow answers are to be.
        silence: seconds after which a replica that says nothing is lost; None: never.
    """

    def __init__(
        self,
        shard: Serves,
        members: Members,
        failed: Callable[[Exception], None],
        host: str = "127.0.0.1",
        port: int = 0,
        emulated_link: Link | None = None,
        checkpoint: Checkpoint | None = None,
        silence: float | None = None,
    ) -> None:
        self._silence = silence
        self.shard, self.members, self._failed = shard, members, failed
        self._link, self._checkpoint = emulated_link, checkpoint
        self._like = {n: t.to("meta") for n, t in shard.snapshot().items()}
        self.handled = self.settlings = 0
        self._queue: SimpleQueue[tuple[_Client, Exception | None] | None] = SimpleQueue()
        self._clients: list[_Client] = []
        self._saved_at = shard.version
        self._saving: threading.Thread | None = None
        self._door = Door(self._welcome, GREETING, host, port)
        self.port = self._door.port
        self._thread = threading.Thread(target=self._run, name="headrace-server", daemon=True)
        self._thread.start()

    @property
    def connected(self) -> int:
        """Replicas that are there."""
        return sum(client.replica >= 0 for client in self._clients)

    def close(self) -> None:
        """Finish what has come, write the last checkpoint, and part from all."""
        self._door.close()
        self._queue.put(None)
        self._thread.join(GOODBYE)
        if self._checkpoint is not None:
            if self._saving is not None:
                self._saving.join()
            self._checkpoint.write(self.shard.state_dict())

    # Connections -------------------------------------------------------------------------------

    def _welcome(self, end: socket.socket) -> None:
        prepare(end, PROBES)
        # Both call back from threads; who it is from is known by then.
        found: list[_Client] = []
        lost = lambda error: self._queue.put((found[0], error))  # noqa: E731
        outbox: Outbox = SocketOutbox(end, lost, beat_of(self._silence))
        if self._link is not None:
            outbox = EmulatedLink(outbox, self._link, lost)
        arrived = lambda: self._queue.put((found[0], None))  # noqa: E731
        inbox = SocketInbox(end, arrived, lost, self._silence, most_bytes(self._like))
        found.append(_Client(inbox, outbox))
        inbox.start()

    # The shard's thread ------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while (item := self._queue.get()) is not None:
                client, error = item
                if error is not None:
                    self._part(client, error)
                elif (message := client.inbox.poll()) is not None and not client.gone:
                    self.handled += 1
                    self._hear(client, message)
                self._answer()
                self._save_if_due()
            for client in self._clients:
                client.outbox.send(Message(Kind.CLOSE))
            for client in self._clients:
                client.outbox.leave(GOODBYE)
        except Exception as error:
            self._failed(error)

    def _hear(self, client: _Client, message: Message) -> None:
        tensors: dict[str, Tensor] = {}
        try:
            if client.replica < 0 and message.kind is not Kind.CLOSE:
                client.replica = self._admit(message)
            else:
                tensors = read_request(message, self._like, self.shard.version)
                if message.kind is Kind.PUSH:
                    self.shard.check(tensors, int(message.numbers[0]))
        except ValueError as error:
            self._part(client, error)
        else:
            self._handle(client, message, tensors)

    def _admit(self, message: Message) -> int:
        there = [each.replica for each in self._clients]
        number = check_join(message, there, self.members.expected)
        if not self.members.seated(number):
            raise ValueError(f"it joins as replica {number}, who has taken no seat")
        return number

    def _handle(self, client: _Client, message: Message, tensors: dict[str, Tensor]) -> None:
        shard, replica = self.shard, client.replica
        if message.kind is Kind.JOIN:
            self._clients.append(client)
            if self.members.expected is None:
                shard.enter(client.replica)
            self.members.joined(client.replica)
        elif message.kind is Kind.PUSH:
            samples, *versions = map(int, message.numbers)
            client.pushed = True
            shard.take(replica, tensors, samples, versions)
        elif message.kind is Kind.FETCH:
            shard.fetch(replica)
        elif message.kind is Kind.SETTLE:
            self._settle(client, cast(list[Tensor], message.body))
        elif message.kind is Kind.BUFFERS:
            shard.buffers = cast(list[Tensor], message.body)
        elif message.kind is Kind.LOAD:
            shard.load(tensors)
        elif message.kind is Kind.ASK:
            numbers = tuple(map(float, shard.statistics.numbers()))
            client.outbox.send(Message(Kind.VALUE, numbers=numbers))
        elif message.kind is Kind.CLOSE:
            self._part(client, None)

    def _answer(self) -> None:
        for replica in self.shard.answers():
            for client in self._clients:
                if client.replica == replica:
                    buffers = [] if client.pushed else self.shard.buffers
                    client.outbox.send(self._weights(replica, self.shard.give(replica), buffers))

    def _weights(self, replica: int, weights: dict[str, Tensor], buffers: list[Tensor]) -> Message:
        shard = self.shard
        numbers = (float(shard.version), shard.latest.get(replica, 0.0), *shard.learning_rates)
        body: Any = [[weights[name] for name in shard.names], [*buffers]]
        return Message(Kind.WEIGHTS, numbers=numbers, body=body)

    def _settle(self, client: _Client, buffers: list[Tensor]) -> None:
        members = self.members
        # Statistics of normalisation: the first replica's are kept; of jobs that come and go, those
        # of the latest to say, if it has trained.
        if members.expected is None:
            if client.pushed or not self.shard.buffers:
                self.shard.buffers = buffers
            weights = self.shard.hand_out([client.replica])
            client.outbox.send(self._weights(client.replica, weights, self.shard.buffers))
            return
        if client.replica == min(members.expected) and (client.pushed or not self.shard.buffers):
            self.shard.buffers = buffers
        members.settled.add(client.replica)
        self.shard.leave(client.replica)
        self._settle_all_if_due()

    def _settle_all_if_due(self) -> None:
        members = self.members
        if members.expected is None or not members.settled >= members.expected:
            return
        self.shard.finish()
        weights = self.shard.hand_out([each.replica for each in self._clients])
        for each in self._clients:
            self.shard.enter(each.replica)
            each.outbox.send(self._weights(each.replica, weights, self.shard.buffers))
        members.settled.clear()
        self.settlings += 1

    def _part(self, client: _Client, lost: Exception | None) -> None:
        if client.gone:
            return
        client.gone = True
        client.outbox.send(Message(Kind.CLOSE))  # ends its thread, too
        if lost is not None:
            client.inbox.leave(0.0)
        if client not in self._clients:  # it never joined: nobody misses it
            return
        self._clients.remove(client)
        self.shard.leave(client.replica)
        self.members.left(client.replica, lost)

    def _save_if_due(self) -> None:
        checkpoint, shard = self._checkpoint, self.shard
        if checkpoint is None or shard.version - self._saved_at < checkpoint.every:
            return
        if self._saving is not None and self._saving.is_alive():
            return  # one at a time
        self._saved_at = shard.version
        write = partial(checkpoint.write, shard.state_dict())
        self._saving = threading.Thread(target=self._guarded, args=[write], daemon=True)
        self._saving.start()

    def _guarded(self, write: Callable[[], None]) -> None:
        try:
            write()
        except Exception as error:
            self._failed(error)


def beat_of(silence: float | None) -> float:
    """Seconds between two signs of life, so that several fit into a silence."""
    return 5.0 if silence is None else min(5.0, silence / 4)


def pack(tensors: Mapping[str, Tensor], names: list[str]) -> list[Any]:
    """Tensors by name as a nest; one that is not there is None, a sparse one in three parts."""
    return [_pack(tensors.get(name)) for name in names]


def _pack(tensor: Tensor | None) -> Any:
    if tensor is None or not tensor.is_sparse:
        return tensor
    # As it is, a row that occurs twice included: the server adds them up as we would have.
    size = torch.tensor([*tensor.shape, tensor.is_coalesced()])
    return [tensor._indices(), tensor._values(), size]
