"""How long simulating stages takes, as ratios to plain training of the same model.

python -m headrace.launch.studies.simulation_speed [--stages 8] [--rounds 8]

A character GPT (8 blocks, width 32, 16 sequences of 32, AdamW) and an MLP (8 layers of 64 units, 32
images like the digits, SGD with momentum), one thread. Plain training is a loop over the same
mini-batches with one optimizer of all parameters. Each round runs every way in turn; processor time
is counted, and the ratio is the median over the rounds.

What torch itself takes for stages is there too, in plain loops without any staleness: with an
optimizer for each stage, and with a graph for each stage as well, as stages in turn have.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from headrace.models import TokenCrossEntropy, gpt, mlp
from headrace.pipeline import Pipeline
from headrace.pipeline.partition import count, partition
from headrace.pipeline.rules import Delayed
from headrace.pipeline.simulation import Simulation

__all__ = ["WORKS", "Work", "cut_up", "main", "ratios", "train", "ways"]


@dataclass(frozen=True)
class Work:
    """A model, how it is trained, and its mini-batches of random numbers."""

    model: Callable[[], nn.Sequential]
    loss_fn: Callable[[Any, Any], Tensor]
    optimizer: Callable[[Iterable[tuple[str, nn.Parameter]]], torch.optim.Optimizer]
    batches: Callable[[int], list[tuple[Tensor, Tensor]]]
    count: int


def _tokens(count: int) -> list[tuple[Tensor, Tensor]]:
    tokens = torch.randint(0, 97, (count, 16, 33), generator=torch.Generator().manual_seed(1))
    return [(window[:, :-1], window[:, 1:]) for window in tokens]


def _images(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 32, 64, generator=generator)
    return list(zip(x, torch.randint(0, 10, (count, 32), generator=generator), strict=True))


WORKS = {
    "character GPT": Work(
        partial(gpt, vocabulary=97, context=32, blocks=8, width=32, heads=2),
        TokenCrossEntropy(),
        partial(torch.optim.AdamW, lr=1e-3),
        _tokens,
        30,
    ),
    "MLP": Work(
        partial(mlp, [64] * 8 + [10]),
        nn.CrossEntropyLoss(),
        partial(torch.optim.SGD, lr=0.01, momentum=0.9),
        _images,
        150,
    ),
}


def ways(work: Work, stages: int, share: float = 1.0) -> dict[str, Callable[[], object]]:
    """Ways to train a model on a share of the mini-batches, the plain one first."""
    batches = work.batches(max(1, round(share * work.count)))

    def made() -> nn.Sequential:
        torch.manual_seed(0)
        return work.model()

    def pipeline(kind: type[Pipeline], weights: str) -> Callable[[], object]:
        pipe = kind(
            made(),
            work.loss_fn,
            work.optimizer,
            rule=Delayed(weights),
            stages=stages,
            balance="parameters",
            device="cpu",
        )
        return lambda: pipe.train(batches)

    def loop(graphs: int, optimizers: int) -> Callable[[], object]:
        model = made()
        return partial(
            train,
            cut_up(model, graphs),
            [work.optimizer([*part.named_parameters()]) for part in cut_up(model, optimizers)],
            work.loss_fn,
            batches,
        )

    return {
        "plain": loop(1, 1),
        "an optimizer a stage": loop(1, stages),
        "a graph a stage": loop(stages, stages),
        "stages in turn, stash": pipeline(Pipeline, "stash"),
        **{weights: pipeline(Simulation, weights) for weights in ("stash", "predict", "current")},
    }


def cut_up(model: nn.Sequential, stages: int) -> list[nn.Module]:
    """The stages that a pipeline would make of a model, as models."""
    sizes = partition(model, stages, "parameters", count(model)).sizes
    return [model[end - size : end] for size, end in zip(sizes, accumulate(sizes), strict=True)]


def train(
    parts: Sequence[nn.Module],
    optimizers: Sequence[torch.optim.Optimizer],
    loss_fn: Callable[[Any, Any], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
) -> None:
    """A plain loop, with a graph for each part of the model."""
    for x, target in batches:
        for optimizer in optimizers:
            optimizer.zero_grad()
        inputs, outputs = [x], [parts[0](x)]
        for part in parts[1:]:
            inputs.append(outputs[-1].detach().requires_grad_())
            outputs.append(part(inputs[-1]))
        torch.autograd.backward(loss_fn(outputs[-1], target))
        for leaf, output in zip(inputs[:0:-1], outputs[-2::-1], strict=True):
            torch.autograd.backward(output, leaf.grad)
        for optimizer in optimizers:
            optimizer.step()


def ratios(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median over the rounds of each way's time over that of the first."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for k in range(rounds + 1):
        for name, run in ways.items():
            start = time.process_time()
            run()
            if k:  # the first round warms up
                seconds[name].append(time.process_time() - start)
    first = next(iter(seconds.values()))
    return {
        name: statistics.median(a / b for a, b in zip(each, first, strict=True))
        for name, each in seconds.items()
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the ratios as a table in Markdown."""
    parser = argparse.ArgumentParser(
        prog="python -m headrace.launch.studies.simulation_speed",
        description=(__doc__ or "").splitlines()[0],
    )
    parser.add_argument("--stages", type=int, default=8, help="how many (8)")
    parser.add_argument("--rounds", type=int, default=8, help="measurements of each way (8)")
    parser.add_argument("--share", type=float, default=1.0, help="of the mini-batches (1)")
    own = parser.parse_args(arguments)
    if own.rounds < 1:
        parser.error(f"--rounds {own.rounds}: give a whole number of at least 1")
    most = min(sum(1 for layer in work.model() if [*layer.parameters()]) for work in WORKS.values())
    if not 1 <= own.stages <= most:
        parser.error(
            f"--stages {own.stages}: give a whole number from 1 to {most}, the layers with weights"
        )
    if not 0 < own.share < math.inf:
        parser.error(f"--share {own.share:g}: give a number above 0, as 0.1")
    torch.set_num_threads(1)
    print(f"{own.stages} stages, times those of plain training\n")
    for k, (title, work) in enumerate(WORKS.items()):
        found = ratios(ways(work, own.stages, own.share), own.rounds)
        if not k:
            print(f"| {'':<13} | {' | '.join(found)} |\n|{'---|' * (len(found) + 1)}")
        cells = " | ".join(f"{value:.2f}".ljust(len(name)) for name, value in found.items())
        print(f"| {title:<13} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
