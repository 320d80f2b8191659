"""From a configuration to objects: the model, the data, the pipeline."""

import importlib.util
import math
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from headrace.pipeline import Link, Pipeline
from headrace.pipeline.batch_size import Growth
from headrace.pipeline.corrections import Correction
from headrace.pipeline.gathering import Gathering
from headrace.pipeline.grid import Grid
from headrace.pipeline.replicas import Replicas
from headrace.pipeline.replicas.served import Served
from headrace.pipeline.rules import Rule
from headrace.pipeline.schedule import SCHEDULES
from headrace.pipeline.settings import Settings

from .components import Component, build, call, find
from .config import Config, PipelineOptions
from .ranks import processes, rank, say_nothing_of_a_parent_that_ended

__all__ = [
    "count_replicas",
    "expected_staleness",
    "make_corrections",
    "make_grid",
    "make_growth",
    "make_loader",
    "make_loss",
    "make_metrics",
    "make_model",
    "make_pipeline",
    "make_replicas",
    "make_rules",
    "make_scheduler",
    "make_settings",
    "samples_per_epoch",
    "seed_others",
    "updates",
    "uses_total",
]

Metric = Callable[[Any, Any], Tensor]


def make_model(config: Config) -> nn.Sequential:
    """The model, its first weights from the seed: the same on every rank."""
    torch.manual_seed(config.seed)
    model: nn.Sequential = call("model", build("model", config.model))
    return model


def seed_others(seed: int) -> None:
    """Seed Python's and NumPy's random numbers, which a data set may draw from."""
    random.seed(seed)
    if importlib.util.find_spec("numpy") is not None:
        import numpy as np

        np.random.seed(seed % 2**32)


def make_loss(config: Config) -> Callable[[Any, Any], Tensor]:
    """A loss object, of a class; a function is a loss as it is."""
    loss: Callable[[Any, Any], Tensor] = build("loss", config.loss)
    if isinstance(find("loss", config.loss.class_path), type):
        loss = call("loss", loss)
    return loss


def make_metrics(config: Config) -> dict[str, Metric]:
    """Metrics by the last part of their paths."""
    return {path.rpartition(".")[2]: find("metrics", path) for path in config.metrics}


def make_loader(config: Config, key: str, component: Component) -> DataLoader[Any]:
    """Mini-batches of the dataset `component`; `key` is "data.train" or "data.test".

    Raises:
        ValueError: the dataset cannot be made, or has nothing in it.
    """
    data, training = config.data, key == "data.train"
    dataset: Dataset[Any] = call(key, build(key, component))
    samples, drop_last = samples_in(dataset), data.drop_last and training
    if samples is not None and samples < (data.batch_size if drop_last else 1):
        least = f"of {data.batch_size}, and drop_last drops smaller ones" if drop_last else ""
        raise ValueError(f"{key}: {samples} samples make no mini-batch {least}".rstrip())
    return DataLoader(
        dataset,
        batch_size=data.batch_size,
        shuffle=data.shuffle and training and not isinstance(dataset, IterableDataset),
        drop_last=drop_last,
        num_workers=data.workers,
        worker_init_fn=say_nothing_of_a_parent_that_ended,
        persistent_workers=data.workers > 0 and training,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(config.seed),
    )


def samples_in(dataset: Dataset[Any]) -> int | None:
    """How many samples it has; None where it does not say."""
    return len(dataset) if hasattr(dataset, "__len__") else None


def samples_per_epoch(config: Config, loader: DataLoader[Any]) -> int | None:
    """How many samples a pass over the training data has."""
    samples = samples_in(loader.dataset)
    if samples is None or not config.data.drop_last:
        return samples
    return samples - samples % config.data.batch_size


def updates(config: Config, loader: DataLoader[Any]) -> int | None:
    """How many updates the run will make; None where nobody knows: the data does not say how much
    it has, or the size of an update depends on what is measured.

    Raises:
        ValueError: the size of an update cannot be as it is told.
    """
    samples = samples_per_epoch(config, loader)
    if samples is None:
        return None
    full, rest = divmod(samples, config.data.batch_size)
    options = config.pipeline
    if (growth := make_growth(options)) is not None:
        return _growing_updates(config, growth, [config.data.batch_size] * full + [rest])
    if options.schedule == "stream":  # a mini-batch of few samples has one micro-batch for each
        cuts = min(options.micro_batches, config.data.batch_size)
        per_epoch = full * cuts + min(options.micro_batches, rest)
    else:
        per_epoch = full + (rest > 0)
    total = math.ceil(config.epochs * per_epoch / options.update_every)
    replicas = make_replicas(options)
    return total if replicas is None else replicas.updates(total, count_replicas(config, replicas))


def _growing_updates(config: Config, growth: Growth, mini_batches: Sequence[int]) -> int | None:
    """Play all epochs, whose mini-batches have so many samples; the first one where it measures."""
    options, updates = config.pipeline, 0
    gathering = Gathering(1, growth, SCHEDULES[options.schedule].flushes)
    closes = True
    for _ in range(1 if growth.measures else config.epochs):
        gathering.begin()
        for samples in filter(None, mini_batches):
            parts = min(options.micro_batches, samples)
            for k in range(parts):  # as `split` cuts it
                piece = samples // parts + (k < samples % parts)
                closes = gathering.closes(piece, k == parts - 1)
                updates += closes
    # What is left is applied when the pipeline is closed.
    return None if growth.measures else updates + (not closes)


def make_growth(options: PipelineOptions) -> Growth | None:
    """How many samples an update has, if that is to grow.

    Raises:
        ValueError: it cannot be made.
    """
    if options.batch_size is None:
        return None
    key = "pipeline.batch_size"
    growth: Growth = call(key, build(key, options.batch_size))
    return growth


def make_replicas(options: PipelineOptions) -> Replicas | None:
    """How the replicas share their weights, if there are to be any.

    Raises:
        ValueError: it cannot be made.
    """
    if options.replicas is None:
        return None
    replicas: Replicas = call("pipeline.replicas", build("pipeline.replicas", options.replicas))
    return replicas


def count_replicas(config: Config, replicas: Replicas) -> int:
    """How many there are."""
    if isinstance(replicas, Served) and replicas.address is not None:
        return replicas.count or 1
    return make_grid(config, replicas).replicas


def make_grid(config: Config, replicas: Replicas | None) -> Grid:
    """Who is who among the processes.

    Raises:
        ValueError: as many do not make whole pipelines.
    """
    ranks, stages = processes(), config.stages
    if replicas is None or ranks is None:
        return Grid(stages or ranks or 1, rank=rank())
    if stages is None:
        raise ValueError("pipeline.replicas needs `stages`, the number of stages of each replica")
    return replicas.lay_out(ranks, rank(), stages)


def make_corrections(options: PipelineOptions) -> list[Correction]:
    """The corrections, in order.

    Raises:
        ValueError: one cannot be made.
    """
    keyed = [(f"pipeline.corrections[{k}]", each) for k, each in enumerate(options.corrections)]
    return [call(key, build(key, component)) for key, component in keyed]


def make_pipeline(
    config: Config,
    model: nn.Sequential,
    total_updates: int | None,
    emulated_link: Link | None = None,
    kind: type[Pipeline] = Pipeline,
) -> Pipeline:
    """The pipeline, of `stages` stages or of torchrun's processes.

    Args:
        emulated_link: how slow every hop is to be, for measuring.
        kind: `Pipeline`, or `Simulation`.

    Raises:
        ValueError, TypeError: something in it cannot be; `Pipeline` says what.
    """
    options = config.pipeline
    growth = make_growth(options)
    if growth is not None and growth.measures and uses_total(config.scheduler):
        raise ValueError(
            "scheduler: pipeline.batch_size decides by what it measures, so `total` is unknown: "
            "write the number of updates, or another scheduler"
        )
    return kind(
        model,
        make_loss(config),
        build("optimizer", config.optimizer),
        scheduler=make_scheduler(config.scheduler, total_updates),
        schedule=options.schedule,
        rule=make_rules(options),
        corrections=make_corrections(options),
        replicas=make_replicas(options),
        balance=options.balance,
        stages=config.stages,
        slack=options.slack,
        micro_batches=options.micro_batches,
        update_every=options.update_every,
        batch_size=growth,
        clip_grad_norm=options.clip_grad_norm,
        autocast=_dtype(options.autocast),
        compile=options.compile,
        device=options.device,
        seed=config.seed,
        on_nonfinite=options.on_nonfinite,
        timeout=options.timeout,
        emulated_link=emulated_link,
    )


def make_rules(options: PipelineOptions) -> Rule | list[Rule] | None:
    """The rule of all stages, one for each, or None for the schedule's own.

    Raises:
        ValueError: one cannot be made.
    """

    def make(key: str, component: Component) -> Rule:
        rule: Rule = call(key, build(key, component))
        return rule

    if isinstance(options.rule, list):
        return [make(f"pipeline.rule[{k}]", each) for k, each in enumerate(options.rule)]
    return None if options.rule is None else make("pipeline.rule", options.rule)


def expected_staleness(config: Config, depths: Sequence[int]) -> tuple[float, ...]:
    """The mean staleness of each stage's gradients once it is warm, in updates; where the batch
    grows, at the start, and it falls as much as the batch grows.

    Args:
        depths: each stage's micro-batches in flight behind a forward.
    """
    options = config.pipeline
    if SCHEDULES[options.schedule].flushes:
        return tuple(0.0 for _ in depths)
    every = options.update_every
    if (growth := make_growth(options)) is not None:
        every = math.ceil(growth.start * options.micro_batches / config.data.batch_size)
    return tuple(depth / every for depth in depths)


def make_settings(config: Config) -> Settings:
    """What measuring a layer needs to know of the pipeline."""
    options = config.pipeline
    return Settings(
        loss_fn=make_loss(config),
        optimizer=build("optimizer", config.optimizer),
        autocast=_dtype(options.autocast),
    )


def _dtype(name: str | None) -> torch.dtype | None:
    return getattr(torch, name) if name else None


def uses_total(component: Component | None) -> bool:
    """Whether the scheduler wants to know the number of updates."""
    return component is not None and "total" in component.init_args.values()


def make_scheduler(component: Component | None, total_updates: int | None) -> Any:
    """A function from an optimizer to its scheduler, if there is to be one.

    Raises:
        ValueError: it wants to know the number of updates, and nobody does.
    """
    if component is None:
        return None
    if uses_total(component) and total_updates is None:
        raise ValueError(
            "scheduler: data.train does not say how many samples it has, so `total` is unknown:"
            " write the number of updates"
        )
    arguments: Iterable[tuple[str, Any]] = component.init_args.items()
    known = {name: total_updates if value == "total" else value for name, value in arguments}
    return build("scheduler", Component(component.class_path, known))
