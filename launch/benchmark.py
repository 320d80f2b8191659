"""Measure the stream against its ceiling and torch.distributed.pipelining, in one run.

    torchrun --nproc-per-node 2 -m headrace.launch.benchmark
    torchrun --nproc-per-node 4 -m headrace.launch.benchmark --emulated --slack 1

All systems train the same network on the same mini-batches with the same optimizer, in turn, a few
times over; each rank uses one thread. The ceiling is what as many independent copies as there are
ranks reach together. Ratios within one run are what counts: machines differ, and are noisy.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn.functional import cross_entropy

from headrace.models import emulated, mlp
from headrace.pipeline import Pipeline
from headrace.pipeline.rules import Delayed

__all__ = ["main"]

Batch = tuple[Tensor, Tensor]


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark on all ranks; the first prints the table."""
    options = _parse(argv)
    if "RANK" not in os.environ:
        sys.exit("headrace: start it with torchrun --nproc-per-node 2 -m headrace.launch.benchmark")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    batch = _batch(options)
    batches = [batch] * options.steps
    size = len(batch[0])
    largest = max(options.micro_batches) if options.emulated else size
    parts = [m for m in options.micro_batches if dist.get_world_size() <= m <= largest]
    with _stream(options) as pipe:
        pipe.prepare(batches)
        assert pipe.partition is not None
        systems: dict[str, Callable[[], float]] = {
            "ceiling: independent copies": _Copies(options, batch).samples_per_second,
            "headrace stream": _steady(pipe, batches),
        }
        for m in [] if options.no_torch else parts:
            system = _TorchPipelining(options, batch, pipe.partition.sizes, m)
            systems[f"torch 1F1B, {m} micro-batches"] = system.samples_per_second
        rates: dict[str, list[float]] = {name: [] for name in systems}
        for _ in range(options.rounds):
            for name, run in systems.items():
                dist.barrier()
                rates[name].append(run())
        if dist.get_rank() == 0:
            _print(options, rates, pipe)
    dist.barrier()


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="headrace.launch.benchmark", description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[440, *[1024] * 5, 2000])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--emulated", action="store_true", help="a layer a stage, which sleeps")
    parser.add_argument("--slack", type=int, default=0)
    parser.add_argument("--weights", default="stash")
    parser.add_argument("--steps", type=int, default=30, help="mini-batches per measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--no-torch", action="store_true")
    return parser.parse_args(argv)


def _network(options: argparse.Namespace) -> nn.Sequential:
    """The same weights on every rank."""
    torch.manual_seed(0)
    if options.emulated:
        return emulated(layers=dist.get_world_size(), forward_ms=10, backward_ms=20)
    return mlp(options.widths)


def _batch(options: argparse.Namespace) -> Batch:
    generator = torch.Generator().manual_seed(0)
    if options.emulated:
        return torch.randn(8, 8, generator=generator), torch.randint(8, (8,), generator=generator)
    x = torch.randn(options.batch, options.widths[0], generator=generator)
    return x, torch.randint(options.widths[-1], (options.batch,), generator=generator)


def _optimizer(parameters: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)  # type: ignore[arg-type]


def _stream(options: argparse.Namespace) -> Pipeline:
    rule = Delayed(options.weights)
    return Pipeline(_network(options), cross_entropy, _optimizer, rule=rule, slack=options.slack)


def _steady(pipe: Pipeline, batches: list[Batch]) -> Callable[[], float]:
    """A stream that is full before and after: what `train` returns without draining."""
    pipe.train(batches)

    def run() -> float:
        start = time.perf_counter()
        pipe.train(batches)
        return len(batches) * len(batches[0][0]) / (time.perf_counter() - start)

    return run


class _Copies:
    """Every rank trains a copy of the whole network by itself: what the machine can give."""

    def __init__(self, options: argparse.Namespace, batch: Batch) -> None:
        self._model, self._batch, self._steps = _network(options), batch, options.steps
        # An emulated copy takes as long as all stages together: fewer steps tell as much.
        self._steps = max(3, options.steps // 4) if options.emulated else options.steps
        self._optimizer = _optimizer(self._model.parameters())
        self._step()

    def _step(self) -> None:
        x, target = self._batch
        self._optimizer.zero_grad()
        torch.autograd.backward(cross_entropy(self._model(x), target))
        self._optimizer.step()

    def samples_per_second(self) -> float:
        start = time.perf_counter()
        for _ in range(self._steps):
            self._step()
        rate = torch.tensor(self._steps * len(self._batch[0]) / (time.perf_counter() - start))
        dist.all_reduce(rate)
        return float(rate)


class _TorchPipelining:
    """torch.distributed.pipelining's 1F1B on the same cut."""

    def __init__(
        self, options: argparse.Namespace, batch: Batch, sizes: tuple[int, ...], parts: int
    ) -> None:
        rank, world = dist.get_rank(), dist.get_world_size()
        start = sum(sizes[:rank])
        module = _network(options)[start : start + sizes[rank]]
        stage = PipelineStage(module, rank, world, torch.device("cpu"))
        self._schedule = Schedule1F1B(stage, parts, loss_fn=cross_entropy)
        self._optimizer = _optimizer(module.parameters())
        self._first, self._last = rank == 0, rank == world - 1
        # An emulated layer takes as long for a part as for the whole: give it whole ones.
        copies = parts if options.emulated else 1
        self._batch = (batch[0].repeat(copies, 1), batch[1].repeat(copies))
        self._steps = max(3, options.steps // parts) if options.emulated else options.steps
        self._step()

    def _step(self) -> None:
        x, target = self._batch
        self._optimizer.zero_grad()
        inputs = (x,) if self._first else ()
        self._schedule.step(*inputs, target=target if self._last else None)
        self._optimizer.step()

    def samples_per_second(self) -> float:
        start = time.perf_counter()
        for _ in range(self._steps):
            self._step()
        dist.barrier()
        return float(self._steps * len(self._batch[0]) / (time.perf_counter() - start))


def _print(options: argparse.Namespace, rates: dict[str, list[float]], pipe: Pipeline) -> None:
    assert pipe.partition is not None
    ranks = pipe.stages
    reference = next(iter(rates))
    allowed = pipe.partition.speed_up / ranks
    what = "emulated devices" if options.emulated else "-".join(map(str, options.widths))
    print(
        f"{what}, mini-batch {len(_batch(options)[0])}, {ranks} ranks, cut {pipe.partition.sizes}"
    )
    print(f"weights {options.weights}, slack {options.slack}, staleness {pipe.depths}")
    print(f"{'':30} {'samples/s':>10} {'spread':>14} {'x one device':>13} {'/ ceiling':>10}")
    for name, values in rates.items():
        # Rounds are paired: each system's rate over the ceiling's of the same round.
        pairs = [v / c for v, c in zip(values, rates[reference], strict=True)]
        ratio = statistics.median(pairs)
        spread = f"{min(values):.0f}..{max(values):.0f}"
        print(f"{name:30} {statistics.median(values):10.0f} {spread:>14} "
              f"{ratio * ranks:13.2f} {ratio:10.3f}")  # fmt: skip
    print(f"the best cut of the measured costs allows {allowed:.3f} of the ceiling")


if __name__ == "__main__":
    main()
