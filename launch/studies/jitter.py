"""A stage that is slow at times, under delayed and under synthetic gradients: on emulated devices.

torchrun --nproc-per-node N -m headrace.launch.studies.jitter [--rounds 3] [--ms 60]

Every stage takes as long for a micro-batch; one in the middle thrice as long in random spells.
No pipeline can be faster than that stage's own mean rate: how near does each rule come? Then a
stage near the front stops once, for as long as six micro-batches take: for how long do those behind
it stop?
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn

from headrace.models import EmulatedLayer, emulated
from headrace.pipeline import Pipeline
from headrace.pipeline.rules import Delayed, Rule, Synthetic
from headrace.pipeline.synthesizers import Linear
from headrace.pipeline.timeline import Work

from ..ranks import processes, rank, refuse

__all__ = ["main", "spells"]

COUNT, SPELL, SLOWDOWN, SHARE = 96, 8, 3.0, 0.3
"""Micro-batches of a measurement and of a spell; how slow; the share of spells that are."""

STALL, AHEAD = 6, 8
"""Micro-batches' time that a stage stops for; those that may be on their way."""


def spells(seed: int) -> list[float]:
    """Factors of a stage's time, micro-batch by micro-batch: 1, or `SLOWDOWN` for a spell."""
    draws = random.Random(seed)
    slow = [draws.random() < SHARE for _ in range(-(-COUNT // SPELL))]
    return [SLOWDOWN if slow[k // SPELL] else 1.0 for k in range(COUNT)]


@dataclass(frozen=True)
class Row:
    """A rule, and the slack it has."""

    name: str
    rule: Callable[[], Rule]
    slack: int = 0


ROWS = (
    Row("delayed, slack 0", Delayed),
    Row("delayed, slack 2", Delayed, 2),
    Row("synthetic, lag 2", partial(Synthetic, Linear)),
    Row("synthetic, lag free", partial(Synthetic, Linear, lag="free", ahead=AHEAD)),
    Row(
        "  and synthetic inputs",
        partial(
            Synthetic,
            Linear,
            lag="free",
            ahead=AHEAD,
            inputs="synthetic",
            input_synthesizer=Linear,
        ),
    ),
)


def _batches(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        yield (
            torch.randn(16, 8, generator=generator),
            torch.randint(0, 8, (16,), generator=generator),
        )


def _pipeline(model: nn.Sequential, row: Row) -> Pipeline:
    return Pipeline(
        model,
        nn.CrossEntropyLoss(),
        partial(torch.optim.SGD, lr=0.01),
        rule=row.rule(),
        slack=row.slack,
        balance=[1] * len(model),
    )


def _rate(model: nn.Sequential, row: Row) -> float:
    """Micro-batches a second of a stream that is full, as the slowest rank sees it."""
    with _pipeline(model, row) as pipe:
        pipe.train(_batches(4 * len(model)))
        start = time.perf_counter()
        pipe.train(_batches(COUNT))
        seconds = torch.tensor(time.perf_counter() - start)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        return COUNT / seconds.item()


def _times(milliseconds: float) -> tuple[float, float]:
    """Of a micro-batch, forward and backward."""
    return milliseconds / 3, milliseconds * 2 / 3


def _own_rate(model: nn.Sequential) -> float:
    """Micro-batches a second of the slowest stage alone, by its given times."""

    def mean(layer: EmulatedLayer) -> float:
        pace = statistics.mean(layer.pace) if layer.pace else 1.0
        return pace * (layer.forward_ms + layer.backward_ms) / 1000

    return 1 / max(mean(layer) for layer in model if isinstance(layer, EmulatedLayer))


def _pause(stages: int, row: Row, milliseconds: float) -> float:
    """The longest time between two forwards of the last stage while stage 1 stops, in periods."""
    warm = 4 * stages
    pace = [*[1.0] * (warm + 4), float(STALL + 1), *[1.0] * 200]
    model = emulated(stages, *_times(milliseconds), slowed=1, pace=pace)
    with _pipeline(model, row) as pipe:
        pipe.train(_batches(warm))
        with pipe.record() as recording:
            pipe.train(_batches(4 * STALL))
        spans = recording.timeline.stages[-1]
    starts = [span.start for span in spans if span.work is Work.FORWARD]
    return max(b - a for a, b in pairwise(starts)) / (milliseconds / 1000)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all, on every rank; the first prints."""
    parser = argparse.ArgumentParser(
        prog="torchrun --nproc-per-node N -m headrace.launch.studies.jitter",
        description=(__doc__ or "").splitlines()[0],
    )
    parser.add_argument("--rounds", type=int, default=3, help="times each is measured (3)")
    parser.add_argument("--ms", type=float, default=60.0, help="of a micro-batch on a stage (60)")
    options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    stages = processes() or 1
    if stages < 3:
        refuse("the stage in the middle needs one on either side: start 3 or more with torchrun")
    if options.rounds < 1:
        refuse(f"--rounds {options.rounds}: give a whole number >= 1")
    if not options.ms > 0:
        refuse(f"--ms {options.ms}: give milliseconds above 0")
    torch.set_num_threads(1)
    times = _times(options.ms)
    calm = partial(emulated, stages, *times)
    pace = spells(1)
    one = partial(calm, slowed=stages // 2, pace=pace)

    def every() -> nn.Sequential:
        return nn.Sequential(*(EmulatedLayer(*times, 8, pace=spells(j)) for j in range(stages)))

    def say(text: str) -> None:
        if rank() == 0:
            print(text, flush=True)

    say(
        f"EMULATED devices: {stages} stages of {options.ms:g} ms a micro-batch; medians of "
        f"{options.rounds}\nof the slowest stage's own mean rate:\n"
        f"{'':<24}{'all calm':>10}{'one slow at times':>20}{'all slow at times':>20}{'pause':>8}"
    )
    for row in ROWS:
        cells = []
        for make in (calm, one, every):
            rates = [_rate(make(), row) for _ in range(options.rounds)]
            cells.append(statistics.median(rates) / _own_rate(make()))
        pauses = [_pause(stages, row, options.ms) for _ in range(options.rounds)]
        say(
            f"{row.name:<24}{cells[0]:>10.3f}{cells[1]:>20.3f}{cells[2]:>20.3f}"
            f"{statistics.median(pauses):>8.1f}"
        )
    say(
        f"slow at times: {SLOWDOWN:.0f} times as slow in random spells of {SPELL}, "
        f"{statistics.mean(factor > 1 for factor in pace):.0%} of the time in the middle stage;\n"
        f"pause: periods between two forwards of the last stage, at most, while stage 1 stops for "
        f"{STALL}; 1 is none"
    )


if __name__ == "__main__":
    main()
