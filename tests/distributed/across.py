"""Programs for stages on several hosts: they train, and tell by what their links went."""

import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from headrace.models import emulated
from headrace.pipeline import Pipeline
from headrace.pipeline.rules import Delayed

from ..pipeline.helpers import momentum
from .failing import Plan, misfortune

__all__ = [
    "PAYLOAD",
    "Slack",
    "Trip",
    "measure_paces",
    "train_among_files",
    "train_and_wait",
    "train_here",
    "train_twice",
]

WIDTH, SAMPLES, BATCHES, EPOCHS = 64, 256, 20, 2

PAYLOAD = SAMPLES * WIDTH * 4 * BATCHES * EPOCHS
"""Bytes of activations that pass each cut; of targets, and of gradients that come back, too."""


Slack = int | Literal["auto"]


@dataclass(frozen=True)
class Trip:
    """What a rank has seen.

    Args:
        links: the kinds of its outboxes to the stages after and before it, '' for none.
    """

    host: str
    links: tuple[str, str]
    losses: list[float]
    depths: tuple[int, ...]
    weights: dict[str, Tensor]


def train(slack: Slack = 1) -> Trip:
    """Train, as many stages as ranks."""
    return _train(int(os.environ["WORLD_SIZE"]), slack)


def train_twice() -> list[Trip]:
    """With a slack of one, then with what the links ask for."""
    return [train(), train("auto")]


def train_and_wait(plan: Plan) -> None:
    """Train, tell it; then, when the file `go` is there, run into a misfortune."""
    rank = os.environ["RANK"]
    torch.save(train(), f"result{rank}")
    Path(f"trained{rank}").touch()
    while not Path("go").exists():
        time.sleep(0.01)
    misfortune(plan, epochs=100_000)


def train_among_files() -> Trip:
    """Do so; whatever number the first rank's memory has, the second has this file under it."""
    with open("clutter", "r+b") as file:
        many = 200 if os.environ["RANK"] == "1" else 0
        for _ in range(many):
            os.dup(file.fileno())
    return train()


def train_here(stages: int, slack: int) -> Trip:
    """The same in one process."""
    return _train(stages, slack, stages=stages)


def _train(count: int, slack: Slack, **options: Any) -> Trip:
    torch.manual_seed(7)
    layers: list[nn.Module] = []
    for _ in range(count):
        layers += [nn.Linear(WIDTH, WIDTH), nn.Dropout(0.1), nn.Tanh()]
    batches = [(torch.randn(SAMPLES, WIDTH), torch.randn(SAMPLES, WIDTH)) for _ in range(BATCHES)]
    with Pipeline(
        nn.Sequential(*layers),
        nn.MSELoss(),
        momentum,
        balance=[3] * count,
        rule=Delayed("stash"),
        slack=slack,
        timeout=(60.0, 20.0),
        **options,
    ) as pipe:
        losses = [pipe.train(batches).loss for _ in range(EPOCHS)]
        links = pipe._links[0]
        ways = links.to_downstream, links.to_upstream
        down, up = ["" if way is None else type(way).__name__ for way in ways]
        return Trip(socket.gethostname(), (down, up), losses, pipe.depths, pipe.state_dict())


def measure_paces(
    width: int, samples: int, slacks: list[Slack], batches: int
) -> list[tuple[float, int]]:
    """Two stages of 2 ms each; for each slack, seconds a micro-batch and the first one's depth."""
    return [_measure_pace(width, samples, slack, batches) for slack in slacks]


def _measure_pace(width: int, samples: int, slack: Slack, batches: int) -> tuple[float, int]:
    loader = [(torch.randn(samples, width), torch.randn(samples, width))] * batches
    with Pipeline(
        emulated(layers=2, forward_ms=0.7, backward_ms=1.3, width=width),
        nn.MSELoss(),
        momentum,
        balance=[1, 1],
        rule=Delayed("stash"),
        slack=slack,
    ) as pipe:
        pipe.train(loader)  # until it is warm, and `auto` has chosen
        pipe.drain()
        start = time.perf_counter()
        pipe.train(loader)
        pipe.drain()
        return (time.perf_counter() - start) / batches, pipe.depths[0]
