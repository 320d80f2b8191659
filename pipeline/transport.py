"""Channels between neighbouring stages: inside one process, and over torch.distributed.

A channel goes one way. `Outbox.send` never blocks: it hands the message to a thread that keeps the
tensors until they are gone. `Inbox.poll` gives the next message, or None: a thread receives ahead
of the computation, at most two messages far. What goes over a process group is, in order: the
frame's header, the rest of a long one, each large tensor. Nothing is pickled.
"""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import pairwise
from queue import SimpleQueue
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from .carrier import Carrier, HostStaged, Nccl
from .message import (
    BY_WIRE,
    HEADER,
    Kind,
    Message,
    Note,
    TensorSpec,
    add_notes,
    complete,
    decode,
    encode,
    frame_bytes,
)
from .nest import map_tensors
from .shared_memory import SharedMemory

__all__ = ["Inbox", "Links", "LocalChannel", "Outbox", "connect", "connect_locally"]

RECEIVE_AHEAD = 2
"""Messages received before they are asked for: bounds memory, hides the link."""

FOREVER = timedelta(days=3650)
"""A group's own time-out kills the pair for good; who is silent is for `watch` to say."""


class Inbox(Protocol):
    """Where messages come from."""

    def poll(self) -> Message | None:
        """Give the next message if it has arrived."""


class Outbox(Protocol):
    """Where messages go."""

    def send(self, message: Message) -> None:
        """Send without waiting; the tensors must not be changed afterwards."""


@dataclass
class Links:
    """One stage's four channels; those that lead out of the pipeline are None."""

    from_upstream: Inbox | None = None
    to_downstream: Outbox | None = None
    from_downstream: Inbox | None = None
    to_upstream: Outbox | None = None

    def close(self) -> None:
        """Say goodbye to both neighbours and wait until they have said so too."""
        ends = [e for e in (self.to_downstream, self.to_upstream) if isinstance(e, _Sender)]
        for sender in ends:
            sender.send(Message(Kind.CLOSE))
        inboxes = (self.from_upstream, self.from_downstream)
        for thread in [*ends, *(e for e in inboxes if isinstance(e, _Receiver))]:
            thread.join(timeout=30)


class LocalChannel:
    """A channel inside one process; it copies exactly as the wire does."""

    def __init__(self) -> None:
        self._messages: deque[Message] = deque()

    def send(self, message: Message) -> None:
        """Copy the tensors, contiguous and detached, and pass them on."""
        self._messages.append(replace(message, body=map_tensors(_copy, message.body)))

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


def connect(
    ranks: list[int],
    rank: int,
    device: torch.device,
    shared_device: bool,
    bell: threading.Event,
    on_lost: Callable[[int, Exception], None],
) -> Links:
    """Connect this process's stage with its neighbours: one 2-rank group per direction and pair.

    Every process calls it, with the same ranks; groups are made in the same order everywhere and
    warmed up once.

    Args:
        ranks: the global rank of each stage, in order.
        rank: this process's global rank, in ranks.
        device: where this stage's tensors live.
        shared_device: several stages use one device, which nccl cannot do.
        bell: set whenever a message arrives, to wake whoever waits.
        on_lost: called from a thread with a neighbour's rank when the link to it breaks.
    """
    links = Links()
    for above, below in pairwise(ranks):
        for source, target in ((above, below), (below, above)):
            group = dist.new_group([above, below], timeout=FOREVER, backend="gloo")
            carrier = _choose_carrier(device, shared_device, [above, below], group)
            if rank not in (source, target):
                continue
            downward = source == above
            peer = target if rank == source else source
            carrier.warm_up(peer, sends=rank == source)
            if rank == source:
                sender = _Sender(carrier, peer, on_lost)
                if downward:
                    links.to_downstream = sender
                else:
                    links.to_upstream = sender
            else:
                receiver = _Receiver(carrier, peer, bell, on_lost)
                if downward:
                    links.from_upstream = receiver
                else:
                    links.from_downstream = receiver
    return links


def _choose_carrier(
    device: torch.device, shared_device: bool, pair: list[int], group: dist.ProcessGroup
) -> Carrier:
    """How tensors travel between a pair of ranks; every rank calls it, in one order."""
    if device.type == "cpu":
        return SharedMemory(device, group)
    if shared_device or not dist.is_nccl_available():
        return HostStaged(device, group)
    return Nccl(device, group, dist.new_group(pair, timeout=FOREVER, backend="nccl"))


class _Sender(threading.Thread):
    """Sends messages one after the other."""

    def __init__(
        self, carrier: Carrier, peer: int, on_lost: Callable[[int, Exception], None]
    ) -> None:
        super().__init__(name=f"headrace-send-{peer}", daemon=True)
        self._carrier, self._peer, self._on_lost = carrier, peer, on_lost
        self._queue: SimpleQueue[tuple[Kind, Tensor, list[Tensor], Any]] = SimpleQueue()
        self.start()

    def send(self, message: Message) -> None:
        frame, tensors = encode(message)
        self._queue.put((message.kind, frame, tensors, self._carrier.mark()))

    def run(self) -> None:
        try:
            kind = None
            while kind is not Kind.CLOSE:
                kind, frame, tensors, ready = self._queue.get()
                notes = [self._carrier.place(tensor) for tensor in tensors]
                add_notes(frame, notes)
                self._carrier.send_host(_header(frame), self._peer)
                if len(frame) > HEADER:
                    self._carrier.send_host(frame[HEADER:], self._peer)
                for tensor, note in zip(tensors, notes, strict=True):
                    if note == BY_WIRE:
                        self._carrier.send(tensor, self._peer, ready)
                del tensors
        except Exception as error:  # whatever the backend raises, the neighbour is out of reach
            self._on_lost(self._peer, error)


def _header(frame: Tensor) -> Tensor:
    header = torch.zeros(HEADER, dtype=torch.uint8)
    header[: len(frame)] = frame[:HEADER]
    return header


class _Receiver(threading.Thread):
    """Receives ahead of the computation, up to `RECEIVE_AHEAD` messages."""

    def __init__(
        self,
        carrier: Carrier,
        peer: int,
        bell: threading.Event,
        on_lost: Callable[[int, Exception], None],
    ) -> None:
        super().__init__(name=f"headrace-receive-{peer}", daemon=True)
        self._carrier, self._peer, self._bell, self._on_lost = carrier, peer, bell, on_lost
        self._messages: deque[Message] = deque()
        self._room = threading.Semaphore(RECEIVE_AHEAD)
        self.start()

    def poll(self) -> Message | None:
        if not self._messages:
            return None
        self._room.release()
        return self._messages.popleft()

    def run(self) -> None:
        try:
            while True:
                self._room.acquire()
                message = self._receive()
                if message.kind is Kind.CLOSE:
                    return
                self._messages.append(message)
                self._bell.set()
        except Exception as error:  # whatever the backend raises, the neighbour is out of reach
            self._on_lost(self._peer, error)

    def _receive(self) -> Message:
        frame = torch.empty(HEADER, dtype=torch.uint8)
        self._carrier.receive_host(frame, self._peer)
        size = frame_bytes(frame)
        if size > HEADER:
            rest = torch.empty(size - HEADER, dtype=torch.uint8)
            self._carrier.receive_host(rest, self._peer)
            frame = torch.cat([frame, rest])
        message, structure, parts = decode(frame[:size])
        tensors = [part if isinstance(part, Tensor) else self._get_large(*part) for part in parts]
        return complete(message, structure, tensors)

    def _get_large(self, spec: TensorSpec, note: Note) -> Tensor:
        if note == BY_WIRE:
            tensor = self._carrier.receive(spec, self._peer)
        else:
            tensor = self._carrier.reach(spec, note)
        return tensor.requires_grad_(spec.requires_grad)
