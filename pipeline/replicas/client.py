"""A stage's side of its parameter server: what it sends, and when it waits."""

import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from ..channel import Inbox, Outbox, Soon
from ..door import dial, prepare
from ..emulated_link import EmulatedLink
from ..link import Link
from ..message import Kind, Message
from ..socket_channel import SocketInbox, SocketOutbox
from .peers import Peers, Steps
from .server import GREETING, PROBES, Server, Serves, beat_of, pack

if TYPE_CHECKING:
    from ..engine import Engine
    from ..stage import Stage
    from ..watch import Watch

__all__ = ["Client", "Connection", "knock"]

BACKLOG = 16
"""Messages that may wait for a slow link before the stage waits too: bounds memory."""

PATIENCE = 30.0
"""Seconds for a server to open."""

GOODBYE = 30.0


class Connection:
    """The way to a server and back.

    Args:
        replica: our number there.
        watch: whose bell rings when an answer is there.
        lost: called, from a thread, when the server is gone.
        emulated_link: how slow what we send is to be.
        silence: seconds after which a server that says nothing is lost; None: never.
        own: the server, where it lives in this process.
    """

    def __init__(
        self,
        end: socket.socket,
        replica: int,
        watch: "Watch",
        lost: Callable[[Exception], None],
        emulated_link: Link | None = None,
        own: Server | None = None,
        silence: float | None = None,
    ) -> None:
        self._watch, self._own = watch, own
        self.outbox: Outbox = SocketOutbox(end, lost, beat_of(silence))
        if emulated_link is not None:
            self.outbox = EmulatedLink(self.outbox, emulated_link, lost)
        self._receiver = SocketInbox(end, watch.bell.ring, lost, silence)
        self._receiver.start()
        self.inbox: Inbox = self._receiver
        self.outbox.send(Message(Kind.JOIN, numbers=(float(replica),)))

    @property
    def shard(self) -> Serves | None:
        """What the server serves, where it lives here."""
        return None if self._own is None else self._own.shard

    def close(self) -> None:
        """Say goodbye; where the server lives here, wait until all have done so."""
        self.outbox.send(Message(Kind.CLOSE))
        self.outbox.leave(GOODBYE)
        self._receiver.join(GOODBYE)
        if self._own is not None:
            while self._own.connected:
                self._watch.idle(patient=False)
            self._own.close()


def knock(host: str, port: int) -> socket.socket:
    """Knock at a server's door.

    Raises:
        OSError: nobody opens.
    """
    end = dial(host, port, GREETING, PATIENCE)
    prepare(end, PROBES)
    return end


class Client(Peers):
    """A stage whose weights are a server's, too.

    Every `n_fetch` updates it asks for what the server has, and takes in the answer to what it
    asked `prefetch` times earlier: in the meantime the stage goes on.
    """

    def __init__(self, connection: Connection, n_fetch: int, n_push: int, prefetch: int) -> None:
        self._connection, self._prefetch = connection, prefetch
        self._n_fetch, self._n_push = n_fetch, n_push
        self._updates = self._pushed = self._asked = 0
        self._began = False
        self.version = 0

    state = ("_updates", "_pushed", "version")

    @property
    def shard(self) -> Serves | None:
        return self._connection.shard

    # What the kinds of replicas do in their own way --------------------------------------------

    def push(self, stage: "Stage") -> None:
        """Send what is due to the server."""
        raise NotImplementedError

    def take_in(self, stage: "Stage", tensors: list[Tensor]) -> None:
        """What the server has answered to a push and a fetch."""
        raise NotImplementedError

    # What they have in common ------------------------------------------------------------------

    def ready(self, engine: "Engine") -> Steps:
        if not self._began:
            self._began = True
            yield from self._begin(engine)

    def _begin(self, engine: "Engine") -> Steps:
        """Before the first micro-batch of all."""
        yield from ()

    def refresh(self, engine: "Engine") -> Steps:
        self._updates += 1
        if self._updates % self._n_push == 0:
            self._push(engine.stage)
        if self._updates % self._n_fetch == 0:
            self.fetch()
        while self._asked > self._prefetch:
            yield from self.hear(engine)
        while self._connection.outbox.backlog > BACKLOG:
            yield Soon()

    def fetch(self) -> None:
        """Ask for what the server has; the answer comes after all that was pushed before."""
        self._connection.outbox.send(Message(Kind.FETCH))
        self._asked += 1

    def hear(self, engine: "Engine") -> Steps:
        """Wait for the answer to the oldest question, and take it in."""
        message = yield from engine.take(self._connection.inbox)
        self._asked -= 1
        tensors, buffers = cast(tuple[list[Tensor], list[Tensor]], message.body)
        self._note(engine.stage, message)
        self.take_in(engine.stage, tensors)
        if buffers:  # what others have, before our own first update
            self._load_buffers(engine.stage, buffers)

    def rest(self, engine: "Engine") -> Steps:
        if self.is_first and (buffers := self._buffers(engine.stage)):
            self._connection.outbox.send(Message(Kind.BUFFERS, body=[*buffers]))
        yield from ()

    def _buffers(self, stage: "Stage") -> list[Tensor]:
        return [buffer.detach().clone() for buffer in stage.layers.buffers()]

    def _load_buffers(self, stage: "Stage", values: list[Tensor]) -> None:
        with torch.no_grad():
            for buffer, value in zip(stage.layers.buffers(), values, strict=True):
                buffer.copy_(value)

    def settle(self, engine: "Engine") -> Steps:
        stage = engine.stage
        while self._asked:
            yield from self.hear(engine)
        if self._updates > self._pushed:
            self._push(stage)
        yield from self.agree(engine)

    def _push(self, stage: "Stage") -> None:
        self._pushed = self._updates
        self.push(stage)

    def agree(self, engine: "Engine") -> Steps:
        """Hold what the server has; with all other replicas of the job, once they are at rest."""
        stage = engine.stage
        self._connection.outbox.send(Message(Kind.SETTLE, body=[*self._buffers(stage)]))
        message = yield from engine.take(self._connection.inbox)
        self._note(stage, message)
        weights, kept = cast(tuple[list[Tensor], list[Tensor]], message.body)
        self.load(stage, weights)
        self._load_buffers(stage, kept)

    def publish(self, engine: "Engine") -> Steps:
        stage = engine.stage
        if self.is_first:
            weights = {name: weight.detach().clone() for name, weight in stage.owned.items()}
            body = pack(weights, list(stage.owned))
            self._connection.outbox.send(Message(Kind.LOAD, body=body))
            buffers = self._buffers(stage)
            self._connection.outbox.send(Message(Kind.BUFFERS, body=[*buffers]))
        yield from self.settle(engine)

    @property
    def outside(self) -> bool:
        """Whether the server is another job's."""
        return self._connection.inbox.outside

    is_first = False
    """Whether it speaks for all replicas."""

    def statistics(self, engine: "Engine") -> Steps:
        self._connection.outbox.send(Message(Kind.ASK))
        message = yield from engine.take(self._connection.inbox)
        return [*message.numbers]

    def close(self) -> None:
        self._connection.close()

    def load(self, stage: "Stage", weights: list[Tensor]) -> None:
        """Hold these weights."""
        with torch.no_grad():
            for weight, value in zip(stage.owned.values(), weights, strict=True):
                weight.copy_(value)

    def _note(self, stage: "Stage", message: Message) -> None:
        """The server's clock, and how old it found our latest gradient."""
        version, stage.latest_staleness, *_ = message.numbers
        self.version = int(version)
