"""HOGWILD! on sparse logistic regression: as good with more processes, and how fast.

python -m headrace.launch.studies.hogwild [--processes 1,2,4] [--epochs 3]

The problem is `SparseClassification`, a sample an update, rate 0.2 · 0.8^epoch. Each line is a job
of so many replicas (torchrun), with and without a lock around each update; the loss is that of the
training samples afterwards.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from headrace.models import sparse_logistic
from headrace.pipeline import Pipeline
from headrace.pipeline.replicas import Hogwild
from headrace.pipeline.rules import Delayed

from ..data import SparseClassification
from ..display import bars
from ..ranks import processes, rank, refuse
from .sparsity import sparsity

__all__ = ["main", "train"]

Batch = tuple[tuple[Tensor, Tensor], Tensor]


def _load(samples: int, features: int) -> Batch:
    """The whole of the data, as one batch."""
    data = SparseClassification(samples=samples, features=features)
    rows = [data[k] for k in range(len(data))]
    indices = torch.stack([indices for (indices, _), _ in rows])
    values = torch.stack([values for (_, values), _ in rows])
    return (indices, values), torch.stack([target for _, target in rows])


def _one_by_one(data: Batch, seed: int) -> Iterator[Batch]:
    """Every sample once, in a new order: the same one in every replica."""
    (indices, values), targets = data
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    indices, values, targets = indices[order], values[order], targets[order]
    for k in range(len(targets)):
        yield (indices[k : k + 1], values[k : k + 1]), targets[k : k + 1]


def train(samples: int, features: int, epochs: int, lock: bool) -> dict[str, Any]:
    """What one rank of a job does, and what it saw: the loss, updates a second, and staleness."""
    data, many = _load(samples, features), processes() or 1

    def scheduler(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
        each = -(-samples // many)
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 0.8 ** (update // each))

    with Pipeline(
        sparse_logistic(features),
        nn.BCEWithLogitsLoss(),
        lambda parameters: torch.optim.SGD(parameters, lr=0.2),
        scheduler=scheduler,
        rule=Delayed("current"),
        stages=1,
        replicas=Hogwild(lock=lock),
        balance="parameters",
    ) as pipe:
        pipe.drain()  # all are there: begin together
        start = time.perf_counter()
        for epoch in range(epochs):
            pipe.train(_one_by_one(data, epoch))
        pipe.drain()
        seconds = time.perf_counter() - start
        loss = pipe.evaluate([data])["loss"]
        staleness: Counter[int] = Counter()
        for row in pipe.statistics():
            staleness.update(row.staleness)
    rate = samples * epochs / seconds
    return {"loss": loss, "rate": rate, "staleness": dict(staleness)}


def _start(many: int, options: argparse.Namespace, lock: bool) -> dict[str, Any]:
    """Start a job, and hear what its first rank saw."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(many), "-m", __spec__.name, "--worker"]
    command += ["--samples", str(options.samples), "--features", str(options.features)]
    command += ["--epochs", str(options.epochs), *(["--lock"] if lock else [])]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.returncode)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a job for each number of processes, and print a line of each."""
    parser = argparse.ArgumentParser(
        prog="python -m headrace.launch.studies.hogwild",
        description=(__doc__ or "").splitlines()[0],
    )
    parser.add_argument("--processes", default="1,2,4", help="replicas of each job (1,2,4)")
    parser.add_argument("--samples", type=int, default=20000, help="to train on (20000)")
    parser.add_argument("--features", type=int, default=20000, help="weights (20000)")
    parser.add_argument("--epochs", type=int, default=3, help="passes over them (3)")
    parser.add_argument("--lock", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    if options.worker:
        torch.set_num_threads(1)
        saw = train(options.samples, options.features, options.epochs, options.lock)
        if rank() == 0:
            print(json.dumps(saw), flush=True)
        return
    try:
        counts = [int(count) for count in options.processes.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        refuse(f"--processes {options.processes}: give numbers, as in 1,2,4")
    (indices, _), _ = _load(options.samples, options.features)
    figures = sparsity(indices)
    print(
        f"{options.samples:,} samples, {options.features:,} weights: Omega = {figures.omega}, "
        f"Delta = {figures.delta:.3f}, rho {'=' if figures.exact else '>='} {figures.rho:.3f}\n"
        f"{'replicas':<18}{'loss':>8}{'of serial':>11}{'updates/s':>11}   staleness, in updates",
        flush=True,
    )
    serial = None
    for many in counts:
        for lock in (False, True):
            saw = _start(many, options, lock)
            serial = saw["loss"] if serial is None else serial
            counts_of = {int(value): count for value, count in saw["staleness"].items()}
            mean = sum(v * c for v, c in counts_of.items()) / max(1, sum(counts_of.values()))
            name = f"{many}, locked" if lock else f"{many}"
            share = saw["loss"] / serial
            print(
                f"{name:<18}{saw['loss']:>8.4f}{share:>11.3f}{saw['rate']:>11,.0f}   {mean:.2f} "
                f"{bars(counts_of)}",
                flush=True,
            )


if __name__ == "__main__":
    main()
