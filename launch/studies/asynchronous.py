"""What stale gradients cost, and what discounting them is worth: many replicas, simulated.

python -m headrace.launch.studies.asynchronous [--seeds 3] [--short] [--picture FILE]

Trains small networks on scikit-learn's digits by asynchronous SGD: in one process the servers'
shards, and learners that take drawn times (`event_simulator`). A mini-batch takes a mean of 1 and a
standard deviation of 0.2, gamma-distributed; the next one of an epoch's random order goes to
whoever begins. A fetch comes after the replica's own pushes, as in the product. Prints the tables
in Markdown, a row as it comes, and ends with 1 if a claim does not hold.
"""

import argparse
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import MultiStepLR

from headrace.models import mlp
from headrace.pipeline.corrections import Correction, LearningRate
from headrace.pipeline.replicas import Downpour
from headrace.pipeline.replicas.shard import Shard
from headrace.pipeline.settings import Settings

from ..data import Digits
from ..data.checks import import_extra
from ..metrics import accuracy
from .event_simulator import Times, simulate

__all__ = ["CLAIMS", "Outcome", "Runs", "Setting", "check", "main", "train"]

WIDTH = 64
LEARNERS, REPLICAS = 30, 32
"""Of Zhang et al., and of Downpour."""

SLOW, SLOWNESS = 6, 10.0
"""Learners that are slow, and how many times."""

FAR = 2 * LEARNERS


def _unless_far(staleness: int) -> float:
    return 1 / max(1, staleness) if staleness <= FAR else 0.0


DISCOUNTS: dict[str, str | float | Callable[[int], float] | None] = {
    "α": None,
    "α/√τ": "inverse_sqrt",
    "α/30": 1 / LEARNERS,
    "α/τ": "inverse",
    "α/τ²": "inverse_square",
    f"α/τ, 0 if τ > {FAR}": _unless_far,
}
"""Learning rates for a gradient of staleness τ, from the boldest to the most cautious."""

IGNORING = f"α/τ, 0 if τ > {FAR}"


@dataclass(frozen=True)
class Setting:
    """A way of training.

    Args:
        hidden: layers of 64 units.
        rate: the learning rate α.
        sync: as in `Downpour`.
        discount: one of `DISCOUNTS`.
        cut: whether the learning rate falls to a tenth in the last fifth of the updates.
        slow: learners that are `SLOWNESS` times slower.
        latency: mean time of a message.
        split: whether each layer's weights are on a shard of their own.
        every: updates of a replica's from a fetch, and a push, to the next.
        warm_up: epochs that the first replica makes alone.
        warm_up_factor: of the learning rate, afterwards.
    """

    learners: int
    batch: int
    hidden: int
    epochs: float
    rate: float
    optimizer: Literal["SGD", "Adagrad"] = "SGD"
    momentum: float = 0.0
    sync: int | Literal["hard"] | None = None
    discount: str = "α"
    cut: bool = False
    slow: int = 0
    latency: float = 0.0
    split: bool = False
    every: int = 1
    warm_up: float = 0.0
    warm_up_factor: float = 1.0


ZHANG = Setting(LEARNERS, 4, 2, 20, 0.02, momentum=0.9, cut=True)
DOWNPOUR = Setting(REPLICAS, 16, 3, 8, 0.03, latency=0.3, split=True)
WARM = replace(DOWNPOUR, rate=0.05)


@dataclass(frozen=True)
class Outcome:
    """What became of a network.

    Args:
        accuracy: on the test images; a network of NaNs says 0 to all, which is right for a tenth.
        loss: on the training images, in the end.
        staleness: how many gradients had which, over all shards.
    """

    accuracy: float
    loss: float
    staleness: Mapping[int, int]

    @property
    def diverged(self) -> bool:
        """Whether it ended in NaNs."""
        return math.isnan(self.loss)


def _batches(data: Digits, batch: int, count: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    def forever() -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(data), generator=generator)
            for rows in order[: len(data) // batch * batch].view(-1, batch):
                yield data.inputs[rows], data.targets[rows]

    return islice(forever(), count)


def train(setting: Setting, seed: int, share: float = 1.0) -> Outcome:
    """Simulate a training; `share` is of its epochs."""
    data, test = Digits("train"), Digits("test")
    an_epoch = len(data) // setting.batch
    count = round(share * setting.epochs * an_epoch)
    protocol = Downpour(
        sync=setting.sync,
        prefetch=0,
        n_fetch=setting.every,
        n_push=setting.every,
        warm_up=round(share * setting.warm_up * an_epoch),
        warm_up_factor=setting.warm_up_factor,
    ).protocol(setting.learners)
    milestone = round(0.8 * count / protocol.gradients)
    momentum = {"momentum": setting.momentum} if setting.momentum else {}
    optimizer = partial(getattr(torch.optim, setting.optimizer), lr=setting.rate, **momentum)
    factor = DISCOUNTS[setting.discount]
    corrections: tuple[Correction, ...] = () if factor is None else (LearningRate(factor),)
    settings = Settings(
        cross_entropy,
        optimizer,
        partial(MultiStepLR, milestones=[milestone], gamma=0.1) if setting.cut else None,
        corrections=corrections,
    )
    torch.manual_seed(seed)
    model = mlp([64, *[WIDTH] * setting.hidden, 10])
    paces = [*[1.0] * (setting.learners - setting.slow), *[SLOWNESS] * setting.slow]
    simulate(
        model,
        cross_entropy,
        _batches(data, setting.batch, count, seed),
        shards := [
            Shard(k, weights, settings, protocol, range(setting.learners))
            for k, weights in enumerate(_shares(model, setting.split))
        ],
        setting.learners,
        Times(latency=setting.latency, paces=paces, seed=seed),
        n_fetch=setting.every,
        n_push=setting.every,
        optimizer=optimizer,
    )
    staleness: Counter[int] = Counter()
    for shard in shards:
        staleness.update(shard.staleness)
    with torch.no_grad():
        return Outcome(
            float(accuracy(model(test.inputs), test.targets)),
            float(cross_entropy(model(data.inputs), data.targets)),
            dict(staleness),
        )


def _shares(model: nn.Sequential, split: bool) -> list[dict[str, Tensor]]:
    """The weights of each shard: of a layer each, or all on one."""
    if not split:
        return [dict(model.named_parameters())]
    layers = (dict(layer.named_parameters(name)) for name, layer in model.named_children())
    return [weights for weights in layers if weights]
