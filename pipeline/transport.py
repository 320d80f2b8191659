"""Connect the stages' processes: on one host by sockets and memory, else over torch.distributed.

Over torch.distributed every direction of a pair of neighbours is a 2-rank process group, and two
threads drive it: gloo's sends wait for the receiver, so a thread waits for them; a thread receives
ahead of the computation, at most two messages far. What goes over a group is, in order: the
frame's header, the rest of a long one, each large tensor.
"""

import threading
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from itertools import pairwise
from queue import SimpleQueue
from time import perf_counter
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .bell import Bell
from .carrier import Carrier, HostStaged, Nccl
from .channel import Inbox, Links, Outbox
from .emulated_link import EmulatedLink
from .grid import Grid
from .link import Link
from .message import Kind, Message, TensorSpec, complete, decode, encode, frame_bytes
from .same_host import meet_receiver, meet_sender
from .timeline import Recorder, Work

__all__ = ["connect"]

HEADER = 4096
"""Bytes of a frame that are sent first; most frames are no longer."""

RECEIVE_AHEAD = 2
"""Messages received before they are asked for: bounds memory, hides the link."""

FOREVER = timedelta(days=3650)
"""A group's own time-out kills the pair for good; who is silent is for `watch` to say."""

Lost = Callable[[Exception], None]


def connect(
    grid: Grid,
    device: torch.device,
    shared_device: bool,
    bell: Bell,
    on_lost: Callable[[int, Exception], None],
    emulated_link: Link | None = None,
    directly: bool = False,
    rings: bool = False,
) -> Links:
    """Connect this process's stage with its neighbours: one 2-rank group per direction and pair.

    Every process calls it, with the same grid; groups are made in the same order everywhere and
    warmed up once. Processes of one host use theirs to find that out only, and end it: its thread
    would wake a hundred times a second.

    Args:
        grid: who is who; a server has no neighbours.
        device: where this stage's tensors live.
        shared_device: several stages use one device, which nccl cannot do.
        bell: rung whenever a message arrives, to wake whoever waits.
        on_lost: called, maybe from a thread, with a neighbour's rank when the link to it breaks.
        emulated_link: what every message is held back for, as if the link were this slow.
        directly: connect the first stage with every other, too.
        rings: connect the same stage of all replicas in a ring, too.
    """
    links = Links()
    for source, target, way in _hops(grid, directly, rings):
        pair = sorted([source, target])
        group = dist.new_group(pair, timeout=FOREVER, backend="gloo")
        carrier = _choose_carrier(device, shared_device, pair, group)
        if grid.rank == source:
            work = Work.SEND_UP if way == "up" else Work.SEND_DOWN
            outbox = _open_outbox(carrier, target, links.recorder, work, on_lost)
            if emulated_link is not None:
                outbox = EmulatedLink(outbox, emulated_link, partial(on_lost, target))
            if way == "straight":
                links.to_others.append(outbox)
            else:
                setattr(links, _OUTBOXES[way], outbox)
        elif grid.rank == target:
            setattr(links, _INBOXES[way], _open_inbox(carrier, source, bell, on_lost))
    return links


_OUTBOXES = {"down": "to_downstream", "up": "to_upstream", "around": "to_next"}
_INBOXES = {
    "down": "from_upstream",
    "up": "from_downstream",
    "around": "from_previous",
    "straight": "from_first",
}


def _hops(grid: Grid, directly: bool, rings: bool) -> list[tuple[int, int, str]]:
    """Source, target and way of every channel of a job."""
    hops = []
    for ranks in grid.pipelines:
        for above, below in pairwise(ranks):
            hops += [(above, below, "down"), (below, above, "up")]
        hops += [(ranks[0], other, "straight") for other in ranks[1:] if directly]
    if rings and grid.replicas > 1:
        following = [*grid.pipelines[1:], grid.pipelines[0]]
        for own, others in zip(grid.pipelines, following, strict=True):
            hops += [(rank, other, "around") for rank, other in zip(own, others, strict=True)]
    return hops


def _open_outbox(
    carrier: Carrier,
    peer: int,
    recorder: Recorder,
    work: Work,
    on_lost: Callable[[int, Exception], None],
) -> Outbox:
    carrier.warm_up(peer, sends=True)
    lost = partial(on_lost, peer)
    near = None
    if carrier.device.type == "cpu":
        near = meet_receiver(carrier, peer, recorder, work, lost)
    if near is not None:
        carrier.close()
        return near
    return _Sender(carrier, peer, recorder, work, lost)


def _open_inbox(
    carrier: Carrier, peer: int, bell: Bell, on_lost: Callable[[int, Exception], None]
) -> Inbox:
    carrier.warm_up(peer, sends=False)
    lost = partial(on_lost, peer)
    near = meet_sender(carrier, peer, lost) if carrier.device.type == "cpu" else None
    if near is not None:
        carrier.close()
        return near
    return _Receiver(carrier, peer, bell, lost)


def _choose_carrier(
    device: torch.device, shared_device: bool, pair: list[int], group: dist.ProcessGroup
) -> Carrier:
    """How tensors travel between a pair of ranks; every rank calls it, in one order."""
    if device.type == "cpu":
        return Carrier(device, group)
    if shared_device or not dist.is_nccl_available():
        return HostStaged(device, group)
    return Nccl(device, group, dist.new_group(pair, timeout=FOREVER, backend="nccl"))


class _Parcel(NamedTuple):
    """A message on its way out; `ready` is the carrier's mark: when its tensors are complete."""

    kind: Kind
    index: int  # type: ignore[assignment]  # not the tuple's method
    frame: bytearray
    tensors: list[Tensor]
    ready: Any


class _Sender(threading.Thread, Outbox):
    """Sends messages one after the other."""

    def __init__(
        self, carrier: Carrier, peer: int, recorder: Recorder, work: Work, lost: Lost
    ) -> None:
        super().__init__(name=f"headrace-send-{peer}", daemon=True)
        self._carrier, self._peer, self._lost = carrier, peer, lost
        self._recorder, self._work = recorder, work
        self._queue: SimpleQueue[_Parcel] = SimpleQueue()
        self.start()

    def send(self, message: Message) -> None:
        frame, tensors = encode(message)
        ready = self._carrier.mark()
        self._queue.put(_Parcel(message.kind, message.index, frame, tensors, ready))

    def leave(self, seconds: float) -> None:
        self.join(seconds)

    def run(self) -> None:
        try:
            kind = None
            while kind is not Kind.CLOSE:
                parcel = self._queue.get()
                kind = parcel.kind
                start = perf_counter()
                self._transfer(parcel)
                self._recorder.note(self._work, parcel.index, start)
                del parcel
        except Exception as error:  # whatever the backend raises, the neighbour is out of reach
            self._lost(error)

    def _transfer(self, parcel: _Parcel) -> None:
        frame = parcel.frame + bytes(max(0, HEADER - len(parcel.frame)))
        data = torch.frombuffer(frame, dtype=torch.uint8)
        self._carrier.send_host(data[:HEADER], self._peer)
        if len(data) > HEADER:
            self._carrier.send_host(data[HEADER:], self._peer)
        for tensor in parcel.tensors:
            self._carrier.send(tensor, self._peer, parcel.ready)


class _Receiver(threading.Thread, Inbox):
    """Receives ahead of the computation, up to `RECEIVE_AHEAD` messages."""

    def __init__(self, carrier: Carrier, peer: int, bell: Bell, lost: Lost) -> None:
        super().__init__(name=f"headrace-receive-{peer}", daemon=True)
        self._carrier, self._peer, self._bell, self._lost = carrier, peer, bell, lost
        self._messages: deque[Message] = deque()
        self._room = threading.Semaphore(RECEIVE_AHEAD)
        self.start()

    def poll(self) -> Message | None:
        if not self._messages:
            return None
        self._room.release()
        return self._messages.popleft()

    def leave(self, seconds: float) -> None:
        self.join(seconds)

    def run(self) -> None:
        try:
            while True:
                self._room.acquire()
                message = self._receive()
                if message.kind is Kind.CLOSE:
                    return
                self._messages.append(message)
                self._bell.ring()
        except Exception as error:  # whatever the backend raises, the neighbour is out of reach
            self._lost(error)

    def _receive(self) -> Message:
        frame = bytearray(HEADER)
        self._get(frame, 0, HEADER)
        size = frame_bytes(frame)
        if size > HEADER:
            frame += bytes(size - HEADER)
            self._get(frame, HEADER, size - HEADER)
        del frame[size:]
        message, structure, parts = decode(frame)
        return complete(message, structure, [(spec, self._there(spec, p)) for spec, p in parts])

    def _get(self, frame: bytearray, start: int, size: int) -> None:
        view = torch.frombuffer(frame, dtype=torch.uint8, offset=start, count=size)
        self._carrier.receive_host(view, self._peer)

    def _there(self, spec: TensorSpec, part: Any) -> Tensor:
        return part if isinstance(part, Tensor) else self._carrier.receive(spec, self._peer)
