"""Look at the configuration's stream, and at 1F1B beside it: timelines, links, shares of time."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from headrace.pipeline import Link, Pipeline, Timeline
from headrace.pipeline.partition import Partition

from ..assemble import make_loader
from .systems.headrace import Flushing, Stream
from .workload import Workload

__all__ = ["Observation", "excerpt", "observe", "trace_kernels"]

RECORDED = 12
"""Mini-batches in a recording."""

SHOWN = 4
"""Mini-batches of the slower system in a picture."""


@dataclass(frozen=True)
class Observation:
    """What was seen; the same on every rank.

    Args:
        timelines: of the stream's steady state, and of 1F1B's.
        slack: of each hop. busy, bubble: each stage's. data: the first stage's, with the loader.
    """

    timelines: dict[str, Timeline]
    links: list[Link]
    slack: list[int]
    busy: list[float]
    bubble: list[float]
    data: float


def observe(work: Workload, cut: Partition, weights: str, micro_batches: int) -> Observation:
    """Run both for some mini-batches.

    Args:
        weights: the stream's policy. micro_batches: 1F1B's.
    """
    count = RECORDED
    batches = (work.batches * (count // len(work.batches) + 1))[:count]
    stream = Stream(weights)
    stream.build(work, cut, 1)
    stream.train((work.batches * (stream.warm_up_steps() // len(work.batches) + 1))[:-1])
    pipe = stream.pipe
    pipe.reset_shares()
    with pipe.record() as recording:
        pipe.train(batches)
    timelines = {"stream": recording.timeline.steady()}
    rows = pipe.statistics()
    slack = [a - b - 1 for a, b in zip(pipe.depths, pipe.depths[1:], strict=False)]
    links = pipe.measure_links()
    data = _share_of_loading(work, pipe, count)
    stream.close()
    if micro_batches >= 1:
        flush = Flushing("1f1b")
        flush.build(work, cut, micro_batches)
        flush.train(batches[:3])
        with flush.pipe.record() as recording:
            flush.train(batches[: count // 2])
        timelines[f"1F1B, {micro_batches} micro-batches"] = recording.timeline.steady()
        flush.close()
    busy, bubble = [row.busy for row in rows], [row.waiting for row in rows]
    return Observation(timelines, links, slack, busy, bubble, data)


def _share_of_loading(work: Workload, pipe: Pipeline, count: int) -> float:
    """Of the first stage's time, when it reads the configuration's own loader."""
    pipe.reset_shares()
    data = work.config.data
    loader = make_loader(work.config, "data.train", data.train) if work.rank == 0 else ()
    pipe.train(list(islice(loader, 0)) if work.rank else islice(loader, count))
    return pipe.statistics()[0].data


def excerpt(timelines: dict[str, Timeline], batches: Sequence[int]) -> dict[str, Timeline]:
    """Cut all to one length, out of their middles: `SHOWN` mini-batches of the slowest.

    Args:
        batches: how many mini-batches each timeline has.
    """
    seconds = SHOWN * max(
        t.seconds / count for t, count in zip(timelines.values(), batches, strict=True)
    )
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
