"""Look at the configuration's stream, and at 1F1B beside it: timelines, links, shares of time."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, pairwise
from pathlib import Path

import torch

from headrace.pipeline import Link, Pipeline, Timeline
from headrace.pipeline.partition import Partition
from headrace.pipeline.timeline import Work

from ..assemble import make_loader
from .costs import Passes, measure_passes
from .systems import SYSTEMS
from .systems.headrace import Flushing, Stream
from .workload import Batch, Workload

__all__ = ["Observation", "Recorded", "excerpt", "observe", "slack_of", "trace_kernels"]

RECORDED = 12
"""Mini-batches in a recording, at least; more if they take less than half a second."""

SHOWN = 4
"""Mini-batches of the slower system in a picture."""


@dataclass(frozen=True)
class Recorded:
    """A system's timeline, of its steady state.

    Args:
        parts: micro-batches of a mini-batch.
    """

    name: str
    timeline: Timeline
    parts: int

    @cached_property
    def micro_batches(self) -> float:
        """How many it has, by the first stage's backwards; those at its ends in part."""
        spans = [span for span in self.timeline.stages[0] if span.work is Work.BACKWARD]
        whole = spans[1:-1] or spans
        mean = sum(span.seconds for span in whole) / max(1, len(whole))
        return sum(span.seconds for span in spans) / mean if mean else math.nan

    @property
    def mini_batches(self) -> float:
        """How many it has."""
        return self.micro_batches / self.parts


@dataclass(frozen=True)
class Observation:
    """What was seen; the same on every rank.

    Args:
        stream: at work. flush: 1F1B, if it can be.
        slack: of each hop; empty where not all stages wait for gradients.
        busy: each stage's share. data: the first stage's, with the loader.
    """

    stream: Recorded
    flush: Recorded | None
    links: list[Link]
    slack: list[int]
    busy: list[float]
    data: float
    passes: Passes

    @property
    def recorded(self) -> list[Recorded]:
        """What there is."""
        return [each for each in (self.stream, self.flush) if each is not None]


def observe(work: Workload, cut: Partition, row: str, micro_batches: int) -> Observation:
    """Run both for some mini-batches.

    Args:
        row: the stream's. micro_batches: 1F1B's; 0 leaves it out.
    """
    count = max(RECORDED, work.steps_of_a_second(cut) // 2)
    batches = work.of_steps(count).batches
    stream = _stream(row)
    stream.build(work, cut, 1)
    stream.train(work.of_steps(stream.warm_up_steps()).batches)
    pipe = stream.pipe
    pipe.reset_shares()
    slack = slack_of(pipe.depths)
    streamed = _record(
        "stream" if slack else row, pipe, batches, work.config.pipeline.micro_batches
    )
    busy = [row.busy for row in pipe.statistics()]
    links = pipe.measure_links()
    data = _share_of_loading(work, pipe, count)
    stream.close()
    flushed = None
    if micro_batches:
        name = f"1F1B, {micro_batches} micro-batches"
        flush = Flushing("1f1b")
        flush.build(work, cut, micro_batches)
        flush.train(batches[:3])
        flushed = _record(name, flush.pipe, batches[: count // 2], micro_batches)
        flush.close()
    passes = measure_passes(work, sum(p.nbytes for p in work.model().parameters()))
    return Observation(streamed, flushed, links, slack, busy, data, passes)


def slack_of(depths: Sequence[int]) -> list[int]:
    """Of each hop, by how many micro-batches each stage has in flight; empty where not all wait."""
    return [a - b - 1 for a, b in pairwise(depths)] if all(depths[:-1]) else []


def _stream(row: str) -> Stream:
    system = SYSTEMS[row]()
    assert isinstance(system, Stream)
    return system


def _record(name: str, pipe: Pipeline, batches: list[Batch], parts: int) -> Recorded:
    with pipe.record() as recording:
        pipe.train(batches)
    return Recorded(name, recording.timeline.steady(), parts)


def _share_of_loading(work: Workload, pipe: Pipeline, count: int) -> float:
    """Of the first stage's time, when it reads the configuration's own loader."""
    pipe.reset_shares()
    data = work.config.data
    loader = make_loader(work.config, "data.train", data.train) if work.rank == 0 else ()
    pipe.train(islice(loader, count))
    return pipe.statistics()[0].data


def excerpt(recorded: Sequence[Recorded]) -> dict[str, Timeline]:
    """Cut all to one length, out of their middles: `SHOWN` mini-batches of the slowest."""
    seconds = SHOWN * max(each.timeline.seconds / each.mini_batches for each in recorded)
    seconds = min([seconds, *(each.timeline.seconds for each in recorded)])
    windows = {}
    for each in recorded:
        middle = each.timeline.seconds / 2
        windows[each.name] = each.timeline.window(middle - seconds / 2, middle + seconds / 2)
    return windows


def trace_kernels(work: Workload, cut: Partition, row: str, path: Path) -> None:
    """Write this rank's torch.profiler trace of a few mini-batches, our spans in it."""
    system = _stream(row)
    system.build(work, cut, 1)
    system.train(work.batches[:5])
    with torch.profiler.profile() as profiler, system.pipe.record():
        system.train(work.batches[:5])
    profiler.export_chrome_trace(str(path))
    system.close()
