"""Connect the stages' processes: on one host by sockets and memory, else over TCP.

Between GPUs of their own the large tensors go by nccl, and the frames, as everywhere, over TCP.
"""

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from itertools import pairwise

import torch
import torch.distributed as dist

from . import between_hosts, same_host
from .bell import Bell
from .carrier import Carrier, HostStaged, Nccl
from .channel import Inbox, Links, Outbox
from .emulated_link import EmulatedLink
from .grid import Grid
from .introduction import Introduction
from .link import Link
from .timeline import Recorder, Work

__all__ = ["connect"]

FOREVER = timedelta(days=3650)
"""A group's own time-out kills the pair for good; who is silent is for `watch` to say."""

OnLost = Callable[[int, Exception], None]


def connect(
    grid: Grid,
    device: torch.device,
    shared_device: bool,
    bell: Bell,
    on_lost: OnLost,
    emulated_link: Link | None = None,
    directly: bool = False,
    rings: bool = False,
) -> Links:
    """Connect this process's stage with its neighbours: one channel per direction and pair.

    Every process calls it, with the same grid. Two ranks meet over a process group of their own;
    groups are made in the same order everywhere.

    Args:
        grid: who is who; a server has no neighbours.
        device: where this stage's tensors live.
        shared_device: several stages use one device, which nccl cannot do.
        bell: rung whenever a message arrives, to wake whoever waits.
        on_lost: called, maybe from a thread, with a neighbour's rank when the link to it breaks.
        emulated_link: what every message is held back for, as if the link were this slow.
        directly: connect the first stage with every other, too.
        rings: connect the same stage of all replicas in a ring, too.

    Raises:
        InputError: a neighbour cannot be reached.
    """
    by_nccl = device.type == "cuda" and not shared_device and dist.is_nccl_available()
    links = Links()
    for source, target, way in _hops(grid, directly, rings):
        hop, pair = (source, target), sorted([source, target])
        group = dist.new_group(pair, timeout=FOREVER, backend="gloo")
        tensors = dist.new_group(pair, timeout=FOREVER, backend="nccl") if by_nccl else None
        if grid.rank not in pair:
            continue
        peer = target if grid.rank == source else source
        introduction, carrier = Introduction(group, peer), _choose_carrier(device, tensors, peer)
        if grid.rank == source:
            work = Work.SEND_UP if way == "up" else Work.SEND_DOWN
            outbox = _open_outbox(introduction, carrier, hop, links.recorder, work, on_lost)
            if emulated_link is not None:
                outbox = EmulatedLink(outbox, emulated_link, partial(on_lost, target))
            if way == "straight":
                links.to_others.append(outbox)
            else:
                setattr(links, _OUTBOXES[way], outbox)
        else:
            inbox = _open_inbox(introduction, carrier, hop, bell, on_lost)
            setattr(links, _INBOXES[way], inbox)
        introduction.close()
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


def _choose_carrier(device: torch.device, tensors: dist.ProcessGroup | None, peer: int) -> Carrier:
    """How large tensors travel.

    Args:
        tensors: nccl's group of the pair, where they are to go by that.
    """
    if device.type == "cpu":
        return Carrier()
    return HostStaged(device) if tensors is None else Nccl(device, tensors, peer)


def _open_outbox(
    introduction: Introduction,
    carrier: Carrier,
    hop: tuple[int, int],
    recorder: Recorder,
    work: Work,
    on_lost: OnLost,
) -> Outbox:
    lost = partial(on_lost, hop[1])
    if carrier.on_cpu:
        near = same_host.meet_receiver(introduction, recorder, work, lost)
        if near is not None:
            return near
    carrier.warm_up(sends=True)
    return between_hosts.meet_receiver(introduction, carrier, hop, recorder, work, lost)


def _open_inbox(
    introduction: Introduction,
    carrier: Carrier,
    hop: tuple[int, int],
    bell: Bell,
    on_lost: OnLost,
) -> Inbox:
    lost = partial(on_lost, hop[0])
    if carrier.on_cpu:
        near = same_host.meet_sender(introduction, lost)
        if near is not None:
            return near
    carrier.warm_up(sends=False)
    return between_hosts.meet_sender(introduction, carrier, hop, bell, lost)
