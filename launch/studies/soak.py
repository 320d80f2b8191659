"""Whether a long stream grows: memory, threads, open files, objects, or its time a micro-batch.

python -m headrace.launch.studies.soak [--micro-batches 50000] [--stages 4] [--every 2500]

An MLP on scikit-learn's digits, stashed weights, momentum, a scheduler, a log in runs' own format,
checkpoints, and an evaluation now and then. Every rank is looked at after each `--every`
micro-batches, in the midst of the stream. Starts its own processes, or is started with torchrun;
ends with 1, and says what grew, if anything did.
"""

import argparse
import gc
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from headrace.models import mlp
from headrace.pipeline import Pipeline, Progress
from headrace.pipeline.checkpoints import Checkpoints
from headrace.pipeline.rules import Delayed

from ..data import Digits
from ..metrics import accuracy
from ..ranks import hear, processes, rank, refuse, stop, tell
from ..run_files import RunFiles
from ..schedulers import cosine_with_warmup
from .growth import Limits, Sample, growth, slowdown, take, what_grew

__all__ = ["main", "soak"]

Batch = tuple[Tensor, Tensor]

BATCH = 32
EVALUATE_EVERY = 4
"""Samples from one evaluation to the next; the first is before the first sample."""

KEEP = 2
"""Checkpoints: from the third on, each removes one."""

LINGERING = 5.0
"""Seconds for which a thread that is more than usual may be one that has ended."""

LEAST = 10
"""Samples that a trend needs."""


def _forever(data: Digits) -> Iterator[Batch]:
    """Full mini-batches, a new order in every epoch."""
    generator = torch.Generator().manual_seed(0)
    while True:
        order = torch.randperm(len(data), generator=generator)
        for rows in order[: len(data) // BATCH * BATCH].view(-1, BATCH):
            yield data.inputs[rows], data.targets[rows]


def _data() -> tuple[Iterator[Batch], list[Batch]]:
    """To train on and to evaluate with; only the first stage reads it."""
    if rank() > 0:
        return iter(()), []
    test = Digits("test")
    batches = zip(*(torch.split(each, BATCH) for each in (test.inputs, test.targets)), strict=True)
    return _forever(Digits("train")), list(batches)


def _pipeline(stages: int, updates: int, device: str | None) -> Pipeline:
    """Two hidden layers to a stage."""
    torch.manual_seed(0)
    return Pipeline(
        mlp([64, *[64] * (2 * stages - 1), 10], he=True),
        nn.CrossEntropyLoss(),
        partial(torch.optim.SGD, lr=0.002, momentum=0.9),
        scheduler=partial(cosine_with_warmup, total=updates),
        rule=Delayed("stash"),
        balance="parameters",
        device=device,
    )


def soak(
    micro_batches: int,
    every: int,
    device: str | None,
    log: Callable[[Progress], None] | None,
    checkpoints: Checkpoints,
) -> tuple[Tensor, dict[str, float]]:
    """What each rank does: its own samples, a row each, and the scores in the end.

    The samples have their memory from the beginning: they are not to be what grows. What importing
    has made is not looked at again, which would take longer than the training.
    """
    gc.freeze()
    stream, test = _data()
    usual = sys.maxsize
    found = torch.empty(micro_batches // every, Sample.WIDTH, dtype=torch.float64)
    with _pipeline(processes() or 1, micro_batches, device) as pipe:
        for k in range(len(found)):
            if k % EVALUATE_EVERY == 0:
                pipe.evaluate(test, {"accuracy": accuracy})
            processor, wall = time.process_time(), time.perf_counter()
            pipe.train(islice(stream, every), log=log, checkpoints=checkpoints)
            _await_writer(usual)
            processor, wall = time.process_time() - processor, time.perf_counter() - wall
            sample = take((k + 1) * every, processor / every, wall / every)
            found[k] = torch.tensor(sample.numbers(), dtype=found.dtype)
            usual = min(usual, sample.threads)
        return found, pipe.evaluate(test, {"accuracy": accuracy})


def _await_writer(usual: int) -> None:
    """A checkpoint that is being written has a thread and files of its own, while it is, and
    a busy system keeps a thread that has ended for a moment more.

    Args:
        usual: number of threads, as far as is known.
    """
    for thread in threading.enumerate():
        if thread.name == "headrace-saver":
            thread.join()
    end = time.monotonic() + LINGERING
    while len(os.listdir("/proc/self/task")) > usual and time.monotonic() < end:
        time.sleep(0.01)


def _gather(found: Tensor) -> list[list[Sample]]:
    """Every rank's samples."""
    all_ranks = [torch.empty_like(found) for _ in range(processes() or 1)]
    dist.all_gather(all_ranks, found)
    return [[Sample.from_numbers(row) for row in each.tolist()] for each in all_ranks]


COLUMNS: dict[str, Callable[[Sample], str]] = {
    "resident MiB": lambda s: f"{s.memory / 2**20:.1f}",
    "objects": lambda s: f"{s.objects}",
    "GPU MiB": lambda s: f"{s.device_memory / 2**20:.2f}",
    "threads": lambda s: f"{s.threads}",
    "files": lambda s: f"{s.files}",
    "segments": lambda s: f"{s.segments}",
    "processor ms": lambda s: f"{1000 * s.processor:.3f}",
    "wall ms": lambda s: f"{1000 * s.wall:.3f}",
}


def table(ranks: Sequence[Sequence[Sample]]) -> str:
    """All samples in Markdown: a row for each moment, in each cell one number a stage."""
    on_gpu = any(sample.device_memory for samples in ranks for sample in samples)
    columns = {name: cell for name, cell in COLUMNS.items() if on_gpu or name != "GPU MiB"}
    lines = [f"| micro-batches | {' | '.join(columns)} |", "|--:" * (1 + len(columns)) + "|"]
    for moment in zip(*ranks, strict=True):
        cells = [" ".join(map(cell, moment)) for cell in columns.values()]
        lines.append(f"| {moment[0].micro_batches:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def trends(ranks: Sequence[Sequence[Sample]]) -> str:
    """What each stage gained after the first fifth, in Markdown."""
    lines = ["| stage | resident KiB gained | objects gained | time, last fifth over second |"]
    lines.append("|--:" * 4 + "|")
    for stage, samples in enumerate(ranks):
        lines.append(
            f"| {stage} | {growth(samples, 'memory') / 1024:+.0f} "
            f"| {growth(samples, 'objects'):+.0f} | {slowdown(samples):.3f} |"
        )
    return "\n".join(lines)


def _log(files: RunFiles, progress: Progress) -> None:
    files.log("progress", progress.micro_batch * BATCH, asdict(progress))


def _shared(folder: str) -> str:
    """The first rank's folder."""
    if rank():
        return hear("folder")
    tell("folder", folder)
    return folder


def _work(options: argparse.Namespace) -> int:
    """On every rank; the first one prints. The exit code."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        files = RunFiles(Path(folder), "") if rank() == 0 else None
        log = partial(_log, files) if files else None
        checkpoints = Checkpoints(_shared(folder), options.checkpoint_every, KEEP)
        found, scores = soak(options.micro_batches, options.every, options.device, log, checkpoints)
        if files:
            files.close()
        ranks = _gather(found)  # nobody writes into the first rank's folder any more
    limits = Limits(slowdown=options.slowdown)
    grew = [
        f"stage {j}: {line}" for j, each in enumerate(ranks) for line in what_grew(each, limits)
    ]
    if rank() == 0:
        score = f"loss {scores['loss']:.4f}, accuracy {scores['accuracy']:.3f} on the test images"
        print(f"{table(ranks)}\n\n{trends(ranks)}\n\n{score}")
        print("\n".join(grew) if grew else "nothing grew", flush=True)
    dist.barrier()  # torchrun ends all as soon as one has ended: not before the lines are out
    return 1 if grew else 0


def _start(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Start a rank for each stage; their exit code."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(options.stages), "-m", __spec__.name, *arguments]
    return subprocess.run(command, env={"OMP_NUM_THREADS": "1", **os.environ}).returncode


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m headrace.launch.studies.soak",
        description=(__doc__ or "").splitlines()[0],
    )
    parser.add_argument("--micro-batches", type=int, default=50_000, help="in all (50000)")
    parser.add_argument("--stages", type=int, default=4, help="where torchrun does not say (4)")
    parser.add_argument("--every", type=int, default=2500, help="from sample to sample (2500)")
    parser.add_argument(
        "--checkpoint-every", type=int, default=1000, help="micro-batches between two (1000)"
    )
    parser.add_argument("--slowdown", type=float, default=Limits.slowdown, help="allowed (1.25)")
    parser.add_argument("--device", help="a GPU for each rank if there are enough, else the CPU")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, look, and say what grew; on every rank, or else start them."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parse(given)
    if not sys.platform.startswith("linux"):
        refuse(f"this looks into /proc, which {sys.platform} has not: run it on Linux")
    if options.stages < 1:
        refuse(f"--stages {options.stages}: give a whole number >= 1")
    if options.checkpoint_every < 1:
        refuse(f"--checkpoint-every {options.checkpoint_every}: give a whole number >= 1")
    if options.every < 1 or options.micro_batches < LEAST * options.every:
        refuse(
            f"--micro-batches {options.micro_batches} with a sample every {options.every}: a trend "
            f"needs {LEAST} samples, so write --every {max(1, options.micro_batches // 20)}"
        )
    if processes() is None:
        try:
            raise SystemExit(_start(options, given))
        except KeyboardInterrupt:  # a rank says so
            raise SystemExit(128 + signal.SIGINT) from None
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    raise SystemExit(_work(options))


if __name__ == "__main__":
    main()
