"""Look at the configuration's stream, and at 1F1B beside it: timelines, links, shares of time."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path

import torch

from headrace.pipeline import Link, Pipeline, Timeline
from headrace.pipeline.partition import Partition
from headrace.pipeline.timeline import Work

from ..assemble import make_loader
from .costs import Passes, measure_passes
from .systems.headrace import Flushing, Stream
from .workload import Batch, Workload

__all__ = ["Observation", "excerpt", "observe", "trace_kernels"]

RECORDED = 12
"""Mini-batches in a recording, at least; more if they take less than half a second."""

SHOWN = 4
"""Mini-batches of the slower system in a picture."""


@dataclass(frozen=True)
class Observation:
    """What was seen; the same on every rank.

    Args:
        timelines: of the stream's steady state, and of 1F1B's. batches: how many mini-batches each
            of them has, the pieces at its ends counted as such.
        slack: of each hop. busy, bubble: each stage's. data: the first stage's, with the loader.
    """

    timelines: dict[str, Timeline]
    batches: dict[str, float]
    links: list[Link]
    slack: list[int]
    busy: list[float]
    bubble: list[float]
    data: float
    passes: Passes


def observe(work: Workload, cut: Partition, weights: str, micro_batches: int) -> Observation:
    """Run both for some mini-batches.

    Args:
        weights: the stream's policy. micro_batches: 1F1B's; 0 leaves it out.
    """
    count = max(RECORDED, work.steps_of_a_second(cut) // 2)
    batches = work.of_steps(count).batches
    stream = Stream(weights)
    stream.build(work, cut, 1)
    stream.train(work.of_steps(stream.warm_up_steps()).batches)
    pipe = stream.pipe
    pipe.reset_shares()
    timelines = {"stream": _record(pipe, batches)}
    rows = pipe.statistics()
    slack = [a - b - 1 for a, b in pairwise(pipe.depths)]
    links = pipe.measure_links()
    data = _share_of_loading(work, pipe, count)
    stream.close()
    parts = {"stream": work.config.pipeline.micro_batches}
    if micro_batches:
        name = f"1F1B, {micro_batches} micro-batches"
        flush = Flushing("1f1b")
        flush.build(work, cut, micro_batches)
        flush.train(batches[:3])
        timelines[name], parts[name] = _record(flush.pipe, batches[: count // 2]), micro_batches
        flush.close()
    return Observation(
        timelines,
        {name: _backwards(timeline) / parts[name] for name, timeline in timelines.items()},
        links,
        slack,
        busy=[row.busy for row in rows],
        bubble=[row.waiting for row in rows],
        data=data,
        passes=measure_passes(work, sum(p.nbytes for p in work.model().parameters())),
    )


def _record(pipe: Pipeline, batches: list[Batch]) -> Timeline:
    with pipe.record() as recording:
        pipe.train(batches)
    return recording.timeline.steady()


def _backwards(timeline: Timeline) -> float:
    """Micro-batches in a timeline, by the first stage's backwards; those at its ends in part."""
    spans = [span for span in timeline.stages[0] if span.work is Work.BACKWARD]
    whole = spans[1:-1] or spans
    mean = sum(span.seconds for span in whole) / max(1, len(whole))
    return sum(span.seconds for span in spans) / mean if mean else math.nan


def _share_of_loading(work: Workload, pipe: Pipeline, count: int) -> float:
    """Of the first stage's time, when it reads the configuration's own loader."""
    pipe.reset_shares()
    data = work.config.data
    loader = make_loader(work.config, "data.train", data.train) if work.rank == 0 else ()
    pipe.train(islice(loader, count))
    return pipe.statistics()[0].data


def excerpt(timelines: Mapping[str, Timeline], batches: Mapping[str, float]) -> dict[str, Timeline]:
    """Cut all to one length, out of their middles: `SHOWN` mini-batches of the slowest.

    Args:
        batches: how many mini-batches each timeline has.
    """
    seconds = SHOWN * max(t.seconds / batches[name] for name, t in timelines.items())
    seconds = min([seconds, *(t.seconds for t in timelines.values())])
    return {
        name: t.window((t.seconds - seconds) / 2, (t.seconds + seconds) / 2)
        for name, t in timelines.items()
    }


def trace_kernels(work: Workload, cut: Partition, weights: str, path: Path) -> None:
    """Write this rank's torch.profiler trace of a few mini-batches, our spans in it."""
    system = Stream(weights)
    system.build(work, cut, 1)
    system.train(work.batches[:5])
    with torch.profiler.profile() as profiler, system.pipe.record():
        system.train(work.batches[:5])
    profiler.export_chrome_trace(str(path))
    system.close()
