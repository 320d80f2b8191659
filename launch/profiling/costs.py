"""What layers cost at any number of samples, and what that makes of each system's speed."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.distributed as dist

from headrace.pipeline import Link, Timeline
from headrace.pipeline.measure import ROUNDS, measure
from headrace.pipeline.microbatch import split
from headrace.pipeline.partition import LayerCost, Partition
from headrace.pipeline.schedule import SCHEDULES
from headrace.pipeline.throughput import StageWork, data_parallel_period, period
from headrace.pipeline.timeline import Work

from ..assemble import make_settings
from .workload import Batch, Workload

__all__ = ["Costs", "Passes", "beside_the_layers", "measure_layers", "measure_passes", "typical"]


def measure_layers(work: Workload, samples: int) -> tuple[LayerCost, ...]:
    """Each layer's cost for so many samples of a mini-batch: the median, and the mean over ranks.

    All ranks measure at once, so that they get in each other's way as they do in training.
    """
    inputs, target = cast(Batch, split(work.batches[0], max(1, work.samples // samples))[0])
    settings, seed = make_settings(work.config), work.config.seed
    # First once, in vain: who comes late to that finds the others gone.
    for rounds in (1, ROUNDS):
        work.barrier()
        costs = measure(
            work.model(), inputs, target, settings, work.device, seed, rounds, statistics.median
        )
    times = torch.tensor([[c.forward, c.backward, c.update] for c in costs]).double()
    dist.all_reduce(times)
    return tuple(
        replace(cost, forward=f, backward=b, update=u)
        for cost, (f, b, u) in zip(costs, (times / work.ranks).tolist(), strict=True)
    )


@dataclass(frozen=True)
class Passes:
    """What work on all gradients or weights costs, in seconds a byte.

    Args:
        adding: one tensor to another; copying takes as long.
        reducing: what averaging over ranks takes of the processor that also runs the layers; 0
            where a GPU does.
    """

    adding: float = 0.0
    reducing: float = 0.0


def measure_passes(work: Workload, size: int) -> Passes:
    """Measure them on gradients of so many bytes, on all ranks at once."""
    held, new = (torch.ones(max(1, size // 4), device=work.device) for _ in range(2))
    adding, reducing = [], [0.0]
    for _ in range(ROUNDS):
        adding.append(_timed(work, lambda: held.add_(new)))
        if work.device.type == "cpu":
            # DDP copies gradients into its buckets, and back.
            held.copy_(new)
            reducing.append(_timed(work, lambda: dist.all_reduce(held)) + 2 * adding[-1])
    mine = [statistics.median(seconds) / size for seconds in (adding, reducing)]
    every = work.gather(mine)
    return Passes(*(statistics.mean(column) for column in zip(*every, strict=True)))


def _timed(work: Workload, act: Callable[[], object]) -> float:
    work.barrier()
    start = time.perf_counter()
    act()
    if work.device.type == "cuda":
        torch.cuda.synchronize(work.device)
    return time.perf_counter() - start


def typical(measured: Sequence[tuple[LayerCost, ...]]) -> tuple[LayerCost, ...]:
    """Each layer's median cost of several measurements."""
    return tuple(
        replace(
            layer[0],
            forward=statistics.median(cost.forward for cost in layer),
            backward=statistics.median(cost.backward for cost in layer),
            update=statistics.median(cost.update for cost in layer),
        )
        for layer in zip(*measured, strict=True)
    )


def beside_the_layers(
    timeline: Timeline, micro_batches: float, works: Sequence[StageWork], update_every: int
) -> float:
    """Seconds that a micro-batch cost a stage beside its layers, the mean over stages.

    That is what the engine and its messages take, and what stages lose by working side by side.

    Args:
        micro_batches: in the timeline. works: of each stage, for one of them.
        update_every: micro-batches to an update.
    """
    spent = [
        timeline.seconds * (1 - timeline.share(stage, Work.WAIT, Work.DATA)) / micro_batches
        - (work.forward + work.backward + work.update / update_every)
        for stage, work in enumerate(works)
    ]
    return max(0.0, statistics.mean(spent))


@dataclass(frozen=True)
class Costs:
    """What was measured, and how a mini-batch's cost follows from the samples: a + b · samples.

    Args:
        samples: of a mini-batch. cut: the layers at that size, and which stage has them.
        few: of a small micro-batch. small: the layers at that size.
        parameter_bytes: of all gradients.
        links: one a hop.
        streaming, in_flushes: seconds that a micro-batch costs a stage beside its layers.
    """

    samples: int
    cut: Partition
    few: int
    small: tuple[LayerCost, ...]
    parameter_bytes: float
    links: tuple[Link, ...]
    passes: Passes = Passes()
    streaming: float = 0.0
    in_flushes: float = 0.0

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

    def streamed(self, parts: int, update_every: int = 1, copies: int = 0) -> list[StageWork]:
        """Each stage's work for a micro-batch of a stream, a mini-batch being cut into so many.

        Args:
            copies: of the weights that each micro-batch makes on every stage but the last.
        """
        works = self._accumulating(parts, update_every, self.streaming)
        copying = [copies * self.passes.adding * size for size in self._weights_of_stages()]
        copying[-1] = 0.0
        return [
            replace(work, forward=work.forward + seconds)
            for work, seconds in zip(works, copying, strict=True)
        ]

    def flushed(self, parts: int) -> list[StageWork]:
        """Each stage's work for a micro-batch, a mini-batch being cut into so many and flushed."""
        return self._accumulating(parts, parts, self.in_flushes)

    def _accumulating(self, parts: int, accumulated: int, engine: float) -> list[StageWork]:
        # The gradients of the micro-batches to an update are added up.
        adding = (accumulated - 1) / accumulated * self.passes.adding
        return [
            replace(
                work,
                forward=work.forward + engine / 2,
                backward=work.backward + engine / 2 + adding * size,
            )
            for work, size in zip(
                self.stages(self.samples / parts), self._weights_of_stages(), strict=True
            )
        ]

    def _weights_of_stages(self) -> list[float]:
        """In bytes."""
        counts = [sum(layer.parameters for layer in stage) for stage in self.cut.stages]
        return [self.parameter_bytes * count / max(1, sum(counts)) for count in counts]

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

    def stream(
        self,
        slack: Sequence[int] | int,
        micro_batches: int = 1,
        update_every: int = 1,
        copies: int = 0,
    ) -> float:
        """A stream; see `streamed`."""
        parts = min(micro_batches, self.samples)
        works = self.streamed(parts, update_every, copies)
        stream = SCHEDULES["stream"]
        return self.samples / period(stream, works, self.links, slack, parts, update_every)

    def flushing(self, schedule: str, micro_batches: int) -> float:
        """GPipe or 1F1B."""
        works = self.flushed(micro_batches)
        seconds = period(SCHEDULES[schedule], works, self.links, 0, micro_batches)
        return self.samples / seconds

    def data_parallel(self, link: Link) -> float:
        """DDP over as many ranks as there are stages, on such links."""
        ranks = len(self.cut.sizes)
        whole, reducing = self.whole(self.samples / ranks), self.passes.reducing
        period = data_parallel_period(whole, self.parameter_bytes, ranks, link, reducing)
        return self.samples / period
