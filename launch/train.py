"""Train as a configuration says: under torchrun one stage a process, alone all stages in one.

torchrun --nproc-per-node N -m headrace.launch.train --config FILE [--dotted.key VALUE ...]
"""

import signal
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from headrace.pipeline import Pipeline
from headrace.pipeline.errors import InputError, NonFiniteError
from headrace.pipeline.grid import Grid
from headrace.pipeline.stability import StabilityWarning

from .assemble import (
    make_grid,
    make_loader,
    make_metrics,
    make_model,
    make_pipeline,
    make_replicas,
    samples_per_epoch,
    seed_others,
    updates,
    uses_total,
)
from .config import Config, parse
from .journal import Journal
from .ranks import check_stages, hear, rank, refuse_error, stop, tell
from .resume import (
    Beginning,
    check_notes,
    differences,
    find_beginning,
    past_the_end,
    plan_checkpoints,
    run_folder,
)
from .wording import engine_in_yaml

__all__ = ["main"]


@engine_in_yaml()
def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and train; ends the process with 2 where that cannot be done."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    try:
        config = parse(sys.argv[1:] if arguments is None else arguments)
        replicas = make_replicas(config.pipeline)
        if replicas is None:
            check_stages(config.stages)
        grid = make_grid(config, replicas)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        data = _make_data(config, grid)
        beginning = find_beginning(config)
        seed_others(config.seed)
        pipe = make_pipeline(config, make_model(config), data.updates)
    except (ValueError, TypeError) as error:
        refuse_error(error)
    try:
        with pipe, warnings.catch_warnings():
            warnings.simplefilter("ignore", StabilityWarning)  # the journal says it
            _run(config, data, pipe, beginning)
    except InputError as error:
        refuse_error(error)
    except NonFiniteError as error:
        refuse_error(error, 1)


@dataclass(frozen=True)
class _Data:
    """What a first stage feeds; the other ranks know how many updates there will be."""

    train: Iterable[Any]
    test: Iterable[Any] | None
    samples: int | None
    updates: int | None


def _make_data(config: Config, grid: Grid) -> _Data:
    has_test = config.data.test is not None
    if grid.stage or grid.is_server:
        total = hear("updates") if uses_total(config.scheduler) else ""
        return _Data((), () if has_test else None, None, int(total) if total else None)
    train = make_loader(config, "data.train", config.data.train)
    test = make_loader(config, "data.test", config.data.test) if config.data.test else None
    total_updates = updates(config, train)
    if rank() == 0:
        tell("updates", "" if total_updates is None else str(total_updates))
    return _Data(train, test, samples_per_epoch(config, train), total_updates)


def _run(config: Config, data: _Data, pipe: Pipeline, beginning: Beginning) -> None:
    """Every rank does the same; the first one keeps the journal."""
    if beginning.checkpoint is not None:
        pipe.load(beginning.checkpoint)
        check_notes(beginning.checkpoint, pipe.notes)
        if pipe.rank == 0 and (line := differences(config, pipe.notes)):
            print(f"headrace: {line}", flush=True)
    pipe.prepare(data.train)
    if beginning.checkpoint is not None and pipe.position.epochs < config.epochs:
        done = max((row.updates for row in pipe.statistics()), default=0)
        if pipe.rank == 0 and (line := past_the_end(config, done, data.updates)):
            print(f"headrace: {line}", flush=True)
    folder = run_folder(config, beginning) if pipe.rank == 0 else None
    begun = pipe.state_dict() if config.pipeline.check_stability else None
    journal = Journal(config, pipe, data.samples, folder, begun) if folder else None
    try:
        plan = plan_checkpoints(config, folder)
        while pipe.position.epochs < config.epochs:
            epoch = pipe.position.epochs + 1
            log = partial(journal.progress, epoch) if journal else None
            at_end = partial(journal.epoch, epoch) if journal else None
            pipe.train(
                data.train, log=log, log_every=config.log_every, checkpoints=plan, at_end=at_end
            )
        if plan is not None and plan.every is not None:  # else it is saved
            pipe.save(plan.path(pipe.position), plan.keep)
        scores = pipe.evaluate(data.test, make_metrics(config)) if data.test is not None else {}
        statistics, shards = pipe.statistics(), pipe.shard_statistics()
        weights = pipe.state_dict()
        if journal:
            journal.finish(scores, statistics, shards, weights)
    finally:
        if journal:
            journal.close()


if __name__ == "__main__":
    main()
