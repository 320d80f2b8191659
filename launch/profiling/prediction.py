"""What to expect: samples a second of each system, of more stages, and on other links.

Pure functions of measured costs; the simulation itself is `headrace.pipeline.throughput`.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from headrace.pipeline import Link
from headrace.pipeline.partition import LayerCost, Partition
from headrace.pipeline.schedule import SCHEDULES
from headrace.pipeline.slack import LARGEST, TOLERANCE
from headrace.pipeline.throughput import StageWork, data_parallel_period, period

from .contest import Entry

__all__ = [
    "BANDWIDTHS",
    "STAGE_COUNTS",
    "Costs",
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


@dataclass(frozen=True)
class Curve:
    """A named line: y over x."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]


@dataclass(frozen=True)
class Costs:
    """What was measured, and how a mini-batch's cost follows from the samples: a + b · samples.

    Args:
        samples: of a mini-batch. cut: the layers at that size, and which stage has them.
        few: of a small micro-batch. small: the layers at that size.
        parameter_bytes: of all gradients.
        links: one a hop.
    """

    samples: int
    cut: Partition
    few: int
    small: tuple[LayerCost, ...]
    parameter_bytes: float
    links: tuple[Link, ...]

    def stages(self, samples: float) -> list[StageWork]:
        """Each stage's work for a micro-batch of so many samples."""
        works: list[StageWork] = []
        start = 0
        for size in self.cut.sizes:
            layers = [self._layer(k, samples) for k in range(start, start + size)]
            start += size
            last = start - 1
            sent = self.cut.layers[last].activation_bytes * samples / self.samples
            taken = self.cut.layers[start - size - 1].activation_bytes if works else 0
            works.append(
                StageWork(
                    sum(w.forward for w in layers),
                    sum(w.backward for w in layers),
                    sum(w.update for w in layers),
                    sent,
                    taken * samples / self.samples,
                )
            )
        return works

    def _layer(self, k: int, samples: float) -> StageWork:
        few, many = self.small[k], self.cut.layers[k]

        def at(small: float, large: float) -> float:
            if self.samples == self.few:
                return large * samples / self.samples
            slope = max(0.0, (large - small) / (self.samples - self.few))
            return max(0.0, large - slope * (self.samples - samples))

        return StageWork(
            at(few.forward, many.forward), at(few.backward, many.backward), many.update
        )

    def whole(self, samples: float) -> StageWork:
        """The whole network's work for so many samples."""
        works = self.stages(samples)
        return StageWork(
            sum(w.forward for w in works),
            sum(w.backward for w in works),
            sum(w.update for w in works),
        )

    # Samples a second --------------------------------------------------------------------------

    def one_device(self) -> float:
        """The plain loop."""
        return self.samples / self.whole(self.samples).total

    def ceiling(self) -> float:
        """n plain loops at once."""
        return len(self.cut.sizes) * self.one_device()

    def stream(self, slack: Sequence[int] | int, micro_batches: int, update_every: int) -> float:
        """A stream."""
        parts = min(micro_batches, self.samples)
        works = self.stages(self.samples / parts)
        stream = SCHEDULES["stream"]
        return self.samples / period(stream, works, self.links, slack, parts, update_every)

    def flushing(self, schedule: str, micro_batches: int) -> float:
        """GPipe or 1F1B."""
        works = self.stages(self.samples / micro_batches)
        seconds = period(SCHEDULES[schedule], works, self.links, 0, micro_batches)
        return self.samples / seconds

    def data_parallel(self) -> float:
        """DDP over as many ranks as there are stages, on the slowest of the links."""
        ranks = len(self.cut.sizes)
        whole = self.whole(self.samples / ranks)
        slowest = max(self.links, key=lambda link: link.seconds(1e6), default=Link())
        return self.samples / data_parallel_period(whole, self.parameter_bytes, ranks, slowest)


def by_stages(costs: Costs, counts: Iterable[int] = STAGE_COUNTS) -> list[Curve]:
    """Speed-up over one device against the number of stages, of a network that grows with it.

    Its stages repeat the measured ones, its links the slowest one; the mini-batch stays as it is,
    cut into as many micro-batches as is best for the schedules that flush.
    """
    counts = tuple(counts)
    works = costs.stages(costs.samples)
    link = max(
        costs.links, key=lambda each: each.seconds(works[0].activation_bytes), default=Link()
    )

    def repeat(samples: float, n: int) -> list[StageWork]:
        each = costs.stages(samples)
        return [each[j % len(each)] for j in range(n)]

    def stream(slack: int) -> Callable[[int], float]:
        return lambda n: period(
            SCHEDULES["stream"], repeat(costs.samples, n), [link] * (n - 1), slack
        )

    def chosen(n: int) -> float:
        return min(stream(s)(n) for s in _uniform_slacks(repeat(costs.samples, n), link))

    def flushing(name: str) -> Callable[[int], float]:
        def best(n: int) -> float:
            return min(
                period(SCHEDULES[name], repeat(costs.samples / m, n), [link] * (n - 1), 0, m)
                for m in _parts(costs.samples)
            )

        return best

    ways = {"stream, slack 0": stream(0), "1F1B": flushing("1f1b"), "GPipe": flushing("gpipe")}
    if _worth(works, link):
        ways = {"stream, slack auto": chosen, **ways}

    def speed_up(n: int, seconds: float) -> float:
        return sum(w.total for w in repeat(costs.samples, n)) / seconds

    return [
        Curve(name, tuple(map(float, counts)), tuple(speed_up(n, way(n)) for n in counts))
        for name, way in ways.items()
    ]


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
        there = Costs(
            costs.samples, costs.cut, costs.few, costs.small, costs.parameter_bytes,
            (link,) * len(costs.links),
        )  # fmt: skip
        slack = _uniform_slacks(there.stages(costs.samples), link)[0]
        rows["stream, slack auto"].append(there.stream(slack, 1, 1))
        rows["1F1B"].append(max(there.flushing("1f1b", m) for m in _parts(costs.samples)))
        rows["DDP"].append(there.data_parallel())
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


def predict(costs: Costs, entries: Iterable[Entry]) -> dict[tuple[str, int | None], float]:
    """Samples a second of the systems that the simulation knows, by (system, micro-batches)."""
    rates: dict[tuple[str, int | None], float] = {}
    for entry in entries:
        if entry.refused is not None:
            continue
        name, parts = entry.system, entry.micro_batches
        if name == "ceiling":
            rates[name, parts] = costs.ceiling()
        elif name in ("stream:stash", "stream:current", "stream:predict"):
            depths = [fact.depth or 0 for fact in entry.facts]
            slack = [a - b - 1 for a, b in pairwise(depths)]
            rates[name, parts] = costs.stream(slack, 1, 1)
        elif parts is not None and name.removeprefix("torch-") in ("gpipe", "1f1b"):
            rates[name, parts] = costs.flushing(name.removeprefix("torch-"), parts)
        elif name == "ddp":
            rates[name, parts] = costs.data_parallel()
    return rates
