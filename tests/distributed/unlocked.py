"""A program in which a stage stops in the middle, until the last one has come so far."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from headrace.pipeline import Pipeline
from headrace.pipeline.rules import Synthetic

from ..pipeline.helpers import momentum

__all__ = ["AHEAD", "STOP", "Stall", "stall"]

STOP, AHEAD = 10, 8
"""The forward in which a stage stops; micro-batches that may be on their way."""


@dataclass(frozen=True)
class Stall:
    """Which stage stops, until the last stage has run forward how many more micro-batches.

    Args:
        seconds: after which it gives up, and goes on.
    """

    stage: int
    more: int
    inputs: str
    seconds: float


class Gate(nn.Module):
    """Of the stage that stops, or of the last one, which says how far it is."""

    def __init__(self, plan: Stall, stops: bool, tells: bool) -> None:
        super().__init__()
        self.plan, self.stops, self.tells = plan, stops, tells
        self.count, self.released = -1, True

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        if self.tells:
            Path(f"ran{self.count}").touch()
        if self.stops and self.count == STOP:
            end = time.monotonic() + self.plan.seconds
            goal = Path(f"ran{STOP + self.plan.more}")
            while not goal.exists() and time.monotonic() < end:
                time.sleep(0.002)
            self.released = goal.exists()
        return x


def stall(plan: Stall) -> bool:
    """Train; whether the stage that stopped was released before it gave up."""
    ranks, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for j in range(ranks):
        layers += [nn.Linear(4, 4), Gate(plan, j == plan.stage, j == ranks - 1)]
    rule = Synthetic(lag="free", ahead=AHEAD, inputs=plan.inputs)  # type: ignore[arg-type]
    batches = [(torch.randn(6, 4), torch.randn(6, 4)) for _ in range(60)]
    with Pipeline(
        nn.Sequential(*layers), nn.MSELoss(), momentum, rule=rule, balance=[2] * ranks
    ) as pipe:
        pipe.train(batches)
        pipe.evaluate(batches[:2])
        statistics = pipe.statistics()
    # Everything was learned from in the end, by every stage.
    assert [sum(row.lag.values()) for row in statistics[:-1]] == [60] * (ranks - 1)
    gate = layers[2 * rank + 1]
    assert isinstance(gate, Gate)
    return gate.released
