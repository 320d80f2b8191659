"""What a pipeline is asked besides training: one function a call, run on every stage alike."""

import math
import statistics
import time
from collections.abc import Callable, Generator
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .channel import Inbox
from .errors import InputError
from .link import Link
from .message import Kind, Message
from .microbatch import join
from .nest import Nest, describe, to_device
from .report import ShardStatistics, StageStatistics, known
from .schedule import SCHEDULES, Backward, Stretch
from .timeline import Span, Timeline, Work

if TYPE_CHECKING:
    from .engine import Engine, Steps

__all__ = [
    "close",
    "evaluate",
    "load",
    "measure_hop",
    "measure_links",
    "merge",
    "nothing",
    "predict",
    "restore",
    "save",
    "shard_statistics",
    "stage_statistics",
    "state_dict",
    "timeline",
]

PINGS = 5

LARGE = 1 << 20
"""Bytes, at least, of the message that a link's bandwidth is measured with."""


def evaluate(engine: "Engine") -> "Steps":
    """The mean over samples of the loss and each metric, on every stage."""
    sums: dict[str, Tensor] = {}
    count = 0.0
    for reply in (yield from _infer(engine, partial(_judge, engine))):
        assert isinstance(reply.body, dict)
        count += reply.numbers[0]
        for name, value in reply.body.items():
            assert isinstance(value, Tensor)
            sums[name] = sums.get(name, torch.zeros(())) + value.cpu() * reply.numbers[0]
    return {name: float(total) / count for name, total in sums.items()}


def _judge(engine: "Engine", output: Nest, target: Nest) -> Nest:
    values = {"loss": engine.stage.take_loss(output, target)}
    for name, metric in engine.metrics.items():
        values[name] = torch.as_tensor(metric(output, target))
        if values[name].numel() != 1:
            raise InputError(
                f"the metric {name!r} gave {describe(values[name])}: it must give one number, "
                "the mean over the samples"
            )
    return {name: value.detach().double() for name, value in values.items()}


def predict(engine: "Engine") -> "Steps":
    """The outputs of all micro-batches, joined, on the CPU of every stage."""
    cpu = torch.device("cpu")
    replies = yield from _infer(engine, lambda output, target: to_device(output, cpu))
    return join([reply.body for reply in replies])


def _infer(engine: "Engine", finish: Callable[[Nest, Nest], Nest]) -> "Steps":
    """Run what the first stage feeds, forward only; the last stage's replies ride back."""
    stage = engine.stage
    stage.set_training(False)
    replies: list[Message] = []
    depth = stage.count - 1 - stage.index
    stretch = Stretch(SCHEDULES["stream"].actions(depth, 0))
    there = True
    while there:
        message = yield from engine.take(engine.links.from_upstream)
        there = message.kind is Kind.MICRO_BATCH
        own = _infer_one(engine, message, finish) if there else None
        if not there:
            engine.send_down(message)
        for action in stretch.after(False if there else None):
            if isinstance(action, Backward):
                reply = own or (yield from engine.take(engine.links.from_downstream))
                replies.append(reply)
                engine.send_up(reply)
    stage.set_training(True)
    return replies


def _infer_one(
    engine: "Engine", message: Message, finish: Callable[[Nest, Nest], Nest]
) -> Message | None:
    engine.doing = f"forward of micro-batch {message.index} without gradient"
    x, target = engine.read_input(message)
    with torch.no_grad():
        output = engine.stage.infer(x)
        if engine.stage.is_last:
            return replace(message, kind=Kind.RESULT, body=finish(output, target))
    engine.send_down(message.carrying((output, target)))
    return None


def state_dict(engine: "Engine") -> "Steps":
    """The whole model's weights and buffers."""
    return (yield from engine.fold(engine.stage.state_dict(), merge))


def load(engine: "Engine") -> "Steps":
    """Take this stage's part of a whole model's weights and buffers."""
    incoming, engine.incoming = engine.incoming, {}
    engine.stage.load_state_dict(incoming)
    yield from engine.stage.peers.publish(engine)


def save(engine: "Engine") -> "Steps":
    """Begin to make a checkpoint; a thread writes it."""
    yield from engine.saver(engine, Message(Kind.SAVE))


def restore(engine: "Engine") -> "Steps":
    """Go on from a checkpoint."""
    engine.restoring(engine)
    yield from engine.stage.peers.publish(engine)


def shard_statistics(engine: "Engine") -> "Steps":
    """The figures of every stage's parameter server."""
    own = yield from engine.stage.peers.statistics(engine)
    mine = {str(engine.stage.index): torch.tensor(own, dtype=torch.float64)}
    rows = yield from engine.fold(mine, merge)
    return [ShardStatistics.from_numbers(row.tolist()) for row in rows.values() if len(row)]


def stage_statistics(engine: "Engine") -> "Steps":
    """Every stage's figures."""
    stage, figures = engine.stage, engine.stage.rule.figures
    busy, waiting, data = engine.shares()
    own = StageStatistics(
        stage=stage.index,
        updates=stage.version,
        skipped=stage.skipped,
        staleness=dict(stage.staleness),
        busy=busy,
        waiting=waiting,
        data=data,
        learning_rate=stage.learning_rate,
        in_flight=stage.most_in_flight,
        copies=stage.rule.copies,
        lag=dict(stage.lag),
        synthesizer_loss=known(figures.synthesizer_loss),
        cosine=known(figures.cosine),
        local_loss=known(figures.local_loss),
    )
    mine = {str(stage.index): torch.tensor(own.numbers(), dtype=torch.float64)}
    rows = yield from engine.fold(mine, merge)
    return [StageStatistics.from_numbers(row.tolist()) for row in rows.values()]


def timeline(engine: "Engine") -> "Steps":
    """Every stage's spans, on the first stage's clock."""
    _, ahead = (0.0, 0.0) if engine.stage.is_last else (yield from measure_hop(engine, 8))
    flat = [number for span in engine.spans for number in span]
    mine = {str(engine.stage.index): torch.tensor([ahead, *flat], dtype=torch.float64)}
    rows = [row.tolist() for row in (yield from engine.fold(mine, merge)).values()]
    # What each clock is ahead of the first one: the sum over the hops before it.
    shifts = accumulate((row[0] for row in rows[:-1]), initial=0.0)
    return Timeline.of(
        [_read_span(row[k : k + 4], shift) for k in range(1, len(row), 4)]
        for row, shift in zip(rows, shifts, strict=True)
    )


def measure_links(engine: "Engine") -> "Steps":
    """The link of each hop, by a small message and a large one."""
    mine = [0.0, math.inf]
    if not engine.stage.is_last:
        size = max(LARGE, engine.hop_bytes)
        small, _ = yield from measure_hop(engine, 8)
        large, _ = yield from measure_hop(engine, size)
        mine = [small, (size - 8) / (large - small) if large > small else math.inf]
    row = {str(engine.stage.index): torch.tensor(mine, dtype=torch.float64)}
    rows = [each.tolist() for each in (yield from engine.fold(row, merge)).values()]
    return [Link(*each) for each in rows[:-1]]


def nothing(engine: "Engine") -> "Steps":
    """Ask for nothing but what every call begins with: a drain."""
    yield from ()


def close(engine: "Engine") -> "Steps":
    """Leave together."""
    # Nobody leaves before the last stage has come to its end: a failure there is everybody's.
    yield from engine.fold(torch.zeros(()), torch.add)


def measure_hop(engine: "Engine", size: int) -> Generator[Inbox, None, tuple[float, float]]:
    """Seconds, one way, for a message of so many bytes, the median of a few; and by how much
    the next stage's clock is ahead, by the quickest one.
    """
    ping = Message(Kind.ECHO, body=torch.zeros(size, dtype=torch.uint8, device=engine.stage.device))
    hops = []
    for _ in range(1 + PINGS):  # the first one waits until the next stage is listening
        start = time.perf_counter()
        engine.send_down(ping)
        reply = yield from engine.take(engine.links.from_downstream)
        end = time.perf_counter()
        hops.append(((end - start) / 2, reply.numbers[0] - (start + end) / 2))
    return statistics.median(hop for hop, _ in hops[1:]), min(hops[1:])[1]


def merge(above: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Combine what the stages before have with this one's."""
    return {**above, **own}


def _read_span(numbers: list[float], shift: float) -> Span:
    work, index, start, end = numbers
    return Span(Work(int(work)), int(index), start - shift, end - shift)
