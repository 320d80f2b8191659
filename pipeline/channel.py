"""Channels: what carries messages between a stage and its neighbours, in either direction.

Which kind connects two stages is for `transport` to choose; the engine knows these faces only.
"""

from collections import deque
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from .message import Kind, Message
from .nest import map_tensors
from .timeline import Recorder

__all__ = ["Inbox", "Links", "LocalChannel", "Outbox", "Soon", "connect_locally"]

GOODBYE = 30.0
"""Seconds to wait for a neighbour's last message."""


class Inbox:
    """Where messages come from.

    Args:
        file: becomes readable when a message has arrived; None: a bell is rung instead.
    """

    file: int | None = None

    silent = False
    """Nothing tells that a message has arrived: look again soon."""

    outside = False
    """What comes is another job's; who waits for it is no sign of trouble in this one."""

    def poll(self) -> Message | None:
        """Give the next message if it has arrived."""
        raise NotImplementedError

    def leave(self, seconds: float) -> None:
        """Wait for the channel's last message."""


class Soon(Inbox):
    """Something to wait for that nothing announces."""

    silent = True


class Outbox:
    """Where messages go."""

    def send(self, message: Message) -> None:
        """Send without waiting; the tensors must not be changed afterwards."""
        raise NotImplementedError

    @property
    def backlog(self) -> int:
        """Messages that wait to be sent, where a thread sends them."""
        return 0

    def flush(self) -> bool:
        """Try again what could not be sent at once; whether nothing is left."""
        return True

    def leave(self, seconds: float) -> None:
        """Wait until the channel's last message has gone."""


@dataclass
class Links:
    """One stage's channels; those that lead out of the pipeline are None.

    Args:
        from_first, to_others: straight from the first stage to every other, where stages do not
            wait for the one before (full unlock); else there are none.
        from_previous, to_next: the same stage of the replicas before and after this one, in a ring.
        recorder: of the stage's time, which the channels share with its engine.
    """

    from_upstream: Inbox | None = None
    to_downstream: Outbox | None = None
    from_downstream: Inbox | None = None
    to_upstream: Outbox | None = None
    from_first: Inbox | None = None
    to_others: list[Outbox] = field(default_factory=list)
    from_previous: Inbox | None = None
    to_next: Outbox | None = None
    recorder: Recorder = field(default_factory=Recorder)

    @property
    def _outboxes(self) -> list[Outbox]:
        every = (self.to_downstream, self.to_upstream, *self.to_others, self.to_next)
        return [outbox for outbox in every if outbox is not None]

    def flush(self) -> bool:
        """Try again what could not be sent at once; whether nothing is left."""
        return all([outbox.flush() for outbox in self._outboxes])

    def close(self) -> None:
        """Say goodbye to the stages it is connected with, and wait until they have said so too."""
        for outbox in self._outboxes:
            outbox.send(Message(Kind.CLOSE))
        for outbox in self._outboxes:
            outbox.leave(GOODBYE)
        inboxes = (self.from_upstream, self.from_downstream, self.from_first, self.from_previous)
        for inbox in inboxes:
            if inbox is not None:
                inbox.leave(GOODBYE)


class LocalChannel(Inbox, Outbox):
    """A channel inside one process; it copies exactly as the wire does."""

    def __init__(self) -> None:
        self._messages: deque[Message] = deque()

    def send(self, message: Message) -> None:
        """Copy the tensors, contiguous and detached, and pass them on."""
        self._messages.append(message.carrying(map_tensors(_copy, message.body)))

    def poll(self) -> Message | None:
        """Give the next message, if any."""
        return self._messages.popleft() if self._messages else None


def _copy(tensor: Tensor) -> Tensor:
    copy = tensor.detach().clone(memory_format=torch.contiguous_format)
    return copy.requires_grad_(tensor.requires_grad)


def connect_locally(stages: int, directly: bool = False) -> list[Links]:
    """Connect n stages of one process; `directly`: also the first with every other."""
    links = [Links() for _ in range(stages)]
    for above, below in pairwise(links):
        down, up = LocalChannel(), LocalChannel()
        above.to_downstream, below.from_upstream = down, down
        above.from_downstream, below.to_upstream = up, up
    for below in links[1:] if directly else ():
        straight = LocalChannel()
        links[0].to_others.append(straight)
        below.from_first = straight
    return links
