"""What to expect: samples a second of each system, of more stages, and on other links.

Pure functions of measured costs; the simulation itself is `headrace.pipeline.throughput`.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from headrace.pipeline import Link
from headrace.pipeline.schedule import SCHEDULES
from headrace.pipeline.slack import LARGEST, TOLERANCE
from headrace.pipeline.throughput import StageWork, period

from .contest import Entry
from .costs import Costs

__all__ = [
    "BANDWIDTHS",
    "COPIES",
    "STAGE_COUNTS",
    "Curve",
    "by_bandwidth",
    "by_stages",
    "predict",
    "winners",
]

STAGE_COUNTS = tuple(2**k for k in range(1, 11))
"""2 to 1024."""

BANDWIDTHS = tuple(12.5e6 * (450e9 / 12.5e6) ** (k / 24) for k in range(25))
"""Bytes a second, from 100 Mbit/s to NVLink's 450 GB/s."""

COPIES = {"stream:current": 0, "stream:stash": 1, "stream:stash+auto": 1, "stream:predict": 2}
"""Of the weights, that each micro-batch makes."""


@dataclass(frozen=True)
class Curve:
    """A named line: y over x."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]


def by_stages(costs: Costs, counts: Iterable[int] = STAGE_COUNTS) -> list[Curve]:
    """Speed-up over one device against the number of stages, of a network that grows with it.

    Its stages repeat the measured ones, its links the slowest one; the mini-batch stays as it is,
    cut into as many micro-batches as is best for the schedules that flush.
    """
    counts = tuple(counts)
    works = costs.streamed(1)
    link = _slowest(costs.links, works[0].activation_bytes)

    def repeat(each: Sequence[StageWork], n: int) -> list[StageWork]:
        return [each[j % len(each)] for j in range(n)]

    def stream(slack: int) -> Callable[[int], float]:
        return lambda n: period(SCHEDULES["stream"], repeat(works, n), [link] * (n - 1), slack)

    def chosen(n: int) -> float:
        return min(stream(s)(n) for s in _uniform_slacks(repeat(works, n), link))

    def flushing(name: str) -> Callable[[int], float]:
        def best(n: int) -> float:
            return min(
                period(SCHEDULES[name], repeat(costs.flushed(m), n), [link] * (n - 1), 0, m)
                for m in _parts(costs.samples)
            )

        return best

    ways = {"stream, slack 0": stream(0), "1F1B": flushing("1f1b"), "GPipe": flushing("gpipe")}
    if _worth(works, link):
        ways = {"stream, slack auto": chosen, **ways}

    def speed_up(n: int, seconds: float) -> float:
        return sum(w.total for w in repeat(costs.stages(costs.samples), n)) / seconds

    return [
        Curve(name, tuple(map(float, counts)), tuple(speed_up(n, way(n)) for n in counts))
        for name, way in ways.items()
    ]


def _slowest(links: Sequence[Link], size: float = 1e6) -> Link:
    return max(links, key=lambda link: link.seconds(size), default=Link())


def _parts(samples: int) -> list[int]:
    return [2**k for k in range(9) if 2**k <= samples]


def _uniform_slacks(works: Sequence[StageWork], link: Link) -> list[int]:
    """The smallest slack of all hops that hides the links, found on few of the stages."""
    few = list(works[: min(len(works), 8)])
    goal = TOLERANCE * max(work.total for work in few)
    for slack in range(LARGEST + 1):
        if period(SCHEDULES["stream"], few, [link] * (len(few) - 1), slack) <= goal:
            return [slack]
    return [LARGEST]


def _worth(works: Sequence[StageWork], link: Link) -> bool:
    """Whether slack auto would be more than none."""
    return _uniform_slacks([works[j % len(works)] for j in range(8)], link) != [0]


def by_bandwidth(costs: Costs, bandwidths: Iterable[float] = BANDWIDTHS) -> list[Curve]:
    """Samples a second of the measured stages against the links' bandwidth, in bytes a second.

    The latency is as measured; the stream takes the slack that hides its links, 1F1B the best
    number of micro-batches.
    """
    x = tuple(bandwidths)
    rows: dict[str, list[float]] = {"stream, slack auto": [], "1F1B": [], "DDP": []}
    latency = max((link.latency for link in costs.links), default=0.0)
    for bandwidth in x:
        link = Link(latency, bandwidth)
        there = replace(costs, links=(link,) * len(costs.links))
        slack = _uniform_slacks(there.streamed(1), link)[0]
        rows["stream, slack auto"].append(there.stream(slack))
        rows["1F1B"].append(max(there.flushing("1f1b", m) for m in _parts(costs.samples)))
        rows["DDP"].append(there.data_parallel(link))
    return [Curve(name, x, tuple(y)) for name, y in rows.items()]


def winners(curves: Sequence[Curve]) -> list[tuple[str, float, float]]:
    """Which curve is the highest, and from where to where.

    Between two points at which different ones win, the border is where the two lines cross, on a
    logarithmic axis.
    """
    x = curves[0].x
    first = [max(range(len(curves)), key=lambda c: curves[c].y[k]) for k in range(len(x))]
    borders, names = [x[0]], [curves[first[0]].name]
    for k, (a, b) in enumerate(pairwise(first)):
        if a != b:
            gaps = [curves[a].y[i] - curves[b].y[i] for i in (k, k + 1)]
            share = gaps[0] / (gaps[0] - gaps[1])
            borders.append(math.exp(math.log(x[k]) + share * math.log(x[k + 1] / x[k])))
            names.append(curves[b].name)
    return list(zip(names, borders, [*borders[1:], x[-1]], strict=True))


def predict(
    costs: Costs, entries: Iterable[Entry], micro_batches: int, update_every: int
) -> dict[tuple[str, int | None], float]:
    """Samples a second of the systems that the simulation knows, by (system, micro-batches).

    Args:
        micro_batches, update_every: the stream's.
    """
    rates: dict[tuple[str, int | None], float] = {}
    for entry in entries:
        if entry.refused is not None:
            continue
        name, parts = entry.system, entry.micro_batches
        if name == "ceiling":
            rates[name, parts] = costs.ceiling()
        elif name in COPIES:
            depths = [fact.depth or 0 for fact in entry.facts]
            slack = [a - b - 1 for a, b in pairwise(depths)]
            rates[name, parts] = costs.stream(slack, micro_batches, update_every, COPIES[name])
        elif parts is not None and name in ("gpipe", "1f1b"):
            rates[name, parts] = costs.flushing(name, parts)
        elif name == "ddp":
            # What is measured as work has its links in it.
            link = Link() if costs.passes.reducing else _slowest(costs.links)
            rates[name, parts] = costs.data_parallel(link)
    return rates
