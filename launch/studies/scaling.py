"""How much faster replicas are together, and what a slow one costs the others: on emulated devices.

torchrun --nproc-per-node 4 -m headrace.launch.studies.scaling [--stages 2] [--ms 60] [--rounds 3]

All ranks are replicas of `--stages` stages; servers live beside the first one. Each trains for
a while; then the last one's devices are 5 times slower, and each trains again. "Of linear" is the
updates a second of all, over R times those of one pipeline whose ranks have the machine for
themselves; "the others" are all but the slow one.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from headrace.models import emulated
from headrace.pipeline import Link, Pipeline
from headrace.pipeline.replicas import Allreduce, Downpour, Elastic, Hogwild, Replicas
from headrace.pipeline.replicas.peers import Peers
from headrace.pipeline.replicas.replicas import Meeting
from headrace.pipeline.rules import Delayed

from ..ranks import processes, rank, refuse

__all__ = ["main"]

SLOWDOWN = 5.0
"""Of the slow replica's devices."""


class Strangers(Replicas):
    """Replicas that share nothing: what the machine could do if sharing cost nothing."""

    def join(self, meeting: Meeting) -> Peers:
        return Peers()


@dataclass(frozen=True)
class Row:
    """A way of sharing."""

    name: str
    replicas: Callable[[], Replicas]


ROWS = (
    Row("share nothing", Strangers),
    Row("allreduce", Allreduce),
    Row("hogwild", Hogwild),
    Row("downpour", partial(Downpour, beside=True)),
    Row("elastic, every 4", partial(Elastic, beside=True, every=4)),
)


@dataclass(frozen=True)
class Setting:
    """What all rows have in common."""

    stages: int
    milliseconds: float
    seconds: float
    width: int
    link: Link | None

    @property
    def replicas(self) -> int:
        """R."""
        return (processes() or 1) // self.stages

    def model(self, factor: float) -> nn.Sequential:
        """A device's layer to each stage, as slow as told."""
        third = factor * self.milliseconds / 3
        return emulated(self.stages, third, 2 * third, self.width)


def _batches(width: int, seconds: float) -> Iterator[tuple[Tensor, Tensor]]:
    """The same mini-batch until the time is over."""
    batch = (torch.randn(4, width), torch.randint(0, width, (4,)))
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        yield batch


def _rates(setting: Setting, row: Row, slow: float, alone: bool = False) -> list[float]:
    """Updates a second of each replica.

    Args:
        slow: the last replica's devices take so many times as long.
        alone: only the first replica trains.
    """
    replica = rank() // setting.stages
    factor = slow if replica == setting.replicas - 1 else 1.0
    with Pipeline(
        setting.model(factor),
        nn.CrossEntropyLoss(),
        partial(torch.optim.SGD, lr=0.01),
        rule=Delayed("current"),
        stages=setting.stages,
        replicas=row.replicas(),
        balance=[1] * setting.stages,
        emulated_link=setting.link,
    ) as pipe:
        rate = 0.0
        if replica == 0 or not alone:
            # The stream is full then, and stays so.
            pipe.train(_batches(setting.width, 0.25 * setting.seconds))
            report = pipe.train(_batches(setting.width, setting.seconds))
            rate = report.micro_batches / report.seconds
        rates = [torch.zeros(()) for _ in range(processes() or 1)]
        dist.all_gather(rates, torch.tensor(rate))
    return [float(each) for each in rates[:: setting.stages]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all, on every rank; the first prints."""
    parser = argparse.ArgumentParser(
        prog="torchrun --nproc-per-node N -m headrace.launch.studies.scaling",
        description=(__doc__ or "").splitlines()[0],
    )
    parser.add_argument("--stages", type=int, default=1, help="of each replica (1)")
    parser.add_argument("--ms", type=float, default=60.0, help="of a micro-batch on a device (60)")
    parser.add_argument("--seconds", type=float, default=6.0, help="of each measurement (6)")
    parser.add_argument("--rounds", type=int, default=3, help="times each is measured (3)")
    parser.add_argument("--width", type=int, default=1024, help="weights of a stage (1024)")
    parser.add_argument("--link-ms", type=float, default=0.0, help="one way, of every link (0)")
    options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    ranks = processes() or 1
    if options.stages < 1 or ranks % options.stages or ranks < 2 * options.stages:
        refuse(f"--stages {options.stages}: {ranks} processes do not make 2 or more replicas of it")
    for name in ("ms", "seconds", "rounds", "width"):
        if not getattr(options, name) > 0:
            refuse(f"--{name} {getattr(options, name)}: give a number above 0")
    link = Link(options.link_ms / 1000) if options.link_ms else None
    setting = Setting(options.stages, options.ms, options.seconds, options.width, link)
    torch.set_num_threads(1)

    def say(text: str) -> None:
        if rank() == 0:
            print(text, flush=True)

    many = setting.replicas
    slowly = f", {options.link_ms:g} ms on every link" if link else ""
    say(
        f"EMULATED devices: {many} replicas x {setting.stages} stages, {options.ms:g} ms a "
        f"micro-batch{slowly}; medians of {options.rounds}\n"
        f"{'':<18}{'updates/s':>11}{'of linear':>11}   "
        f"{f'one {SLOWDOWN:g}x slower: the others, of linear':<42}{'the slow one, of its own pace'}"
    )
    even: dict[str, list[float]] = {row.name: [] for row in ROWS}
    together: dict[str, list[float]] = {row.name: [] for row in ROWS}
    others: dict[str, list[float]] = {row.name: [] for row in ROWS}
    slowest: dict[str, list[float]] = {row.name: [] for row in ROWS}
    for _ in range(options.rounds):
        one = _rates(setting, ROWS[0], 1.0, alone=True)[0]
        for row in ROWS:
            rates = _rates(setting, row, 1.0)
            together[row.name].append(sum(rates))
            even[row.name].append(sum(rates) / (many * one))
            *quick, last = _rates(setting, row, SLOWDOWN)
            others[row.name].append(sum(quick) / ((many - 1) * one))
            slowest[row.name].append(last * SLOWDOWN / one)
    for row in ROWS:
        cells = [statistics.median(each[row.name]) for each in (together, even, others, slowest)]
        say(f"{row.name:<18}{cells[0]:>11.1f}{cells[1]:>11.3f}   {cells[2]:<42.3f}{cells[3]:.3f}")


if __name__ == "__main__":
    main()
