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

__all__ = ["Inbox", "Links", "LocalChannel", "Outbox", "connect_locally"]

GOODBYE = 30.0
"""Seconds to wait for a neighbour's last message."""


class Inbox:
    """Where messages come from.

    Args:
        file: becomes readable when a message has arrived; None: a bell is rung instead.
    """

    file: int | None = None

    def poll(self) -> Message | None:
        """Give the next message if it has arrived."""
        raise NotImplementedError

    def leave(self, seconds: float) -> None:
        """Wait for the channel's last message."""


class Outbox:
    """Where messages go."""

    def send(self, message: Message) -> None:
        """Send without waiting; the tensors must not be changed afterwards."""
        raise NotImplementedError

    def flush(self) -> bool:
        """Try again what could not be sent at once; whether nothing is left."""
        return True

    def leave(self, seconds: float) -> None:
        """Wait until the channel's last message has gone."""


@dataclass
class Links:
    """One stage's four channels; those that lead out of the pipeline are None.

    Args:
        recorder: of the stage's time, which the channels share with its engine.
    """

    from_upstream: Inbox | None = None
    to_downstream: Outbox | None = None
    from_downstream: Inbox | None = None
    to_upstream: Outbox | None = None
    recorder: Recorder = field(default_factory=Recorder)

    def flush(self) -> bool:
        """Try again what could not be sent at once; whether nothing is left."""
        outboxes = (self.to_downstream, self.to_upstream)
        return all([outbox.flush() for outbox in outboxes if outbox is not None])

    def close(self) -> None:
        """Say goodbye to both neighbours and wait until they have said so too."""
        outboxes = [box for box in (self.to_downstream, self.to_upstream) if box is not None]
        for outbox in outboxes:
            outbox.send(Message(Kind.CLOSE))
        for outbox in outboxes:
            outbox.leave(GOODBYE)
        for inbox in (self.from_upstream, self.from_downstream):
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


def connect_locally(stages: int) -> list[Links]:
    """Connect n stages of one process."""
    links = [Links() for _ in range(stages)]
    for above, below in pairwise(links):
        down, up = LocalChannel(), LocalChannel()
        above.to_downstream, below.from_upstream = down, down
        above.from_downstream, below.to_upstream = up, up
    return links
