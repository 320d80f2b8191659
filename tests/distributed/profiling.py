"""Programs that look at timelines, links and buffers of a pipeline of several processes."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from headrace.models import emulated
from headrace.pipeline import Link, Pipeline, Timeline
from headrace.pipeline.between_hosts import TcpInbox, TcpOutbox
from headrace.pipeline.message import Kind, Message
from headrace.pipeline.rules import Delayed
from headrace.pipeline.same_host import HostInbox, HostOutbox
from headrace.pipeline.shared_memory import SLOTS

from ..pipeline.helpers import momentum

__all__ = ["Account", "look", "tune", "watch_channels"]

WIDTH = 256
SAMPLES = 64
"""So that an activation is too large for a frame."""

Account = dict[str, Any]


def build(
    width: int = WIDTH, samples: int = SAMPLES, **options: Any
) -> tuple[Pipeline, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(1)
    layers = [part for _ in range(3) for part in (nn.Linear(width, width), nn.Tanh())]
    batches = [(torch.randn(samples, width), torch.randn(samples)) for _ in range(30)]
    pipe = Pipeline(nn.Sequential(*layers), mean_error, momentum, balance=[2, 2, 2], **options)
    return pipe, batches


def mean_error(output: Tensor, target: Tensor) -> Tensor:
    """Its targets are small, so that of a message one tensor is large."""
    return nn.functional.mse_loss(output.mean(1), target)


def look(latency: float | None) -> tuple[Timeline, list[Link]]:
    """Train, recorded; then measure the links."""
    link = None if latency is None else Link(latency=latency)
    pipe, batches = build(emulated_link=link)
    with pipe:
        pipe.train(batches)
        with pipe.record() as recording:
            pipe.train(batches)
        return recording.timeline, pipe.measure_links()


def tune(latency: float) -> None:
    """Choose the slack for layers of 20 + 40 ms behind such links."""
    model = emulated(layers=3, forward_ms=20, backward_ms=40, width=4)
    batches = [(torch.randn(6, 4), torch.randn(6, 4))] * 17
    with Pipeline(
        model, nn.MSELoss(), momentum, balance=[1, 1, 1], slack="auto",
        emulated_link=Link(latency=latency),
    ) as pipe:  # fmt: skip
        pipe.train(batches)


def watch_channels(slack: int) -> Account:
    """Train; when was each micro-batch's message sent and taken, on the host's clock, and how many
    slots of memory were in use at most on the way down from here (between hosts there are none).
    """
    pipe, batches = build(slack=slack, rule=Delayed("stash"))
    with pipe:
        links = pipe._engines[0].links
        times: dict[str, dict[int, float]] = {}
        slots = [0]
        for name in ("from_upstream", "to_downstream", "from_downstream", "to_upstream"):
            channel = getattr(links, name)
            seen = times[name] = {}
            if isinstance(channel, HostOutbox | TcpOutbox):
                channel.send = _noting_sends(channel, seen, slots)  # type: ignore[method-assign]
            elif isinstance(channel, HostInbox | TcpInbox):
                channel.poll = _noting_takes(channel, seen)  # type: ignore[method-assign]
        for _ in range(4):
            pipe.train(batches)
        rows = pipe.statistics()
        figures = [(row.in_flight, row.copies) for row in rows]
    return {"times": times, "slots": slots[0], "rows": figures, "depths": pipe.depths}


def _noting_sends(
    outbox: HostOutbox | TcpOutbox, seen: dict[int, float], slots: list[int]
) -> Callable[[Message], None]:
    send = outbox.send

    def noting(message: Message) -> None:
        if message.kind in (Kind.MICRO_BATCH, Kind.RESULT):
            seen[message.index] = time.perf_counter()
        send(message)
        if isinstance(outbox, TcpOutbox):
            return
        arenas = [a for a in outbox._memory._arenas.values() if a.slot_bytes >= 4 * WIDTH * SAMPLES]
        slots[0] = max(slots[0], sum(sum(arena.memory[:SLOTS]) for arena in arenas))

    return noting


def _noting_takes(
    inbox: HostInbox | TcpInbox, seen: dict[int, float]
) -> Callable[[], Message | None]:
    poll = inbox.poll

    def noting() -> Message | None:
        message = poll()
        if message is not None and message.kind in (Kind.MICRO_BATCH, Kind.RESULT):
            seen[message.index] = time.perf_counter()
        return message

    return noting
