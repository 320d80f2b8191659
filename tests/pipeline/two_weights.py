"""output = v (u x), in three stages: the problem on which corrections are computed by hand.

u is at the first stage, and seen `depth` micro-batches late; v is at the last, and seen as it is.
The oracle runs nothing in a pipeline: it keeps what it knew of u at every version, and takes from
there what a forward saw. A number is moved by a real torch optimizer, or by a formula.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from headrace.pipeline import Pipeline
from headrace.pipeline.corrections import Correction

from .simulator import Batch, OptimizerFactory
from .test_corrections import Scale, half_square, three_stages

__all__ = ["Weight", "by_hand", "in_a_pipeline"]

U, V = 0.5, 1.5


class Weight:
    """One number under a torch optimizer; what is done about a late gradient is for subclasses.

    Args:
        schedule: what the learning rate is multiplied by at update k.
    """

    def __init__(
        self,
        start: float,
        optimizer: OptimizerFactory,
        schedule: Callable[[int], float] = lambda k: 1.0,
    ) -> None:
        self.parameter = nn.Parameter(torch.tensor(start, dtype=torch.float64))
        self.optimizer = optimizer([("w", self.parameter)])
        self.group: dict[str, Any] = self.optimizer.param_groups[0]
        self.base, self.schedule = float(self.group["lr"]), schedule
        self.updates, self.before = 0, start

    @property
    def value(self) -> float:
        return self.parameter.item()

    @property
    def state(self) -> dict[str, Any]:
        return self.optimizer.state[self.parameter]

    def rate(self, update: int) -> float:
        return self.base * self.schedule(update)

    def ahead(self, age: int) -> float:
        """What a forward runs with whose gradient will be this old."""
        return self.value

    def corrected(self, g: float, then: float, age: int) -> float:
        return g

    def factor(self, age: int) -> float:
        return 1.0

    def move(self, g: float, factor: float, age: float) -> None:
        self.before = self.value
        self.group["lr"] = self.rate(self.updates) * factor
        self.step(g, age)
        self.updates += 1

    def step(self, g: float, age: float) -> None:
        self.parameter.grad = torch.full_like(self.parameter, g)
        self.optimizer.step()

    def skip(self) -> None:
        """An update that was none; the schedule goes on."""
        self.before = self.value
        self.updates += 1


def by_hand(
    batches: Sequence[Batch], depth: int, u: Weight, v: Weight, every: int = 1
) -> tuple[float, float]:
    """du = mean (v u x - y) v x, at the u that the forward had and the v of now; dv alike."""
    past = [copy.deepcopy(u)]
    for first in range(0, len(batches), every):
        update, total, weight, ages = first // every, 0, 0.0, []
        du = dv = 0.0
        for k in range(first, first + every):
            x, y = batches[k]
            version = max(0, k - depth) // every
            age = update - version
            then = past[version].ahead(age)
            error, n, f = v.value * then * x - y, len(x), u.factor(age)
            g = u.corrected(float((error * v.value * x).mean()), then, age)
            du, dv = du + n * f * g, dv + n * float((error * then * x).mean())
            total, weight = total + n, weight + n * f
            ages.append(age)
        if du - du == dv - dv == 0:
            u.move(du / weight, weight / total, sum(ages) / len(ages))
            v.move(dv / total, v.factor(0), 0)
        else:
            u.skip()
            v.skip()
        past.append(copy.deepcopy(u))
    return u.value, v.value


def in_a_pipeline(
    corrections: Sequence[Correction],
    optimizer: Callable[..., Optimizer | Sequence[Optimizer]],
    batches: Sequence[Batch],
    **more: Any,
) -> tuple[float, float]:
    """u and v after the same, trained by Headrace."""
    with Pipeline(
        three_stages(U, Scale(V)), half_square, optimizer, stages=3, balance=[1, 1, 1],
        corrections=corrections, **more,
    ) as pipe:  # fmt: skip
        pipe.train(batches)
        state = pipe.state_dict()
        return state["0.w"].item(), state["2.w"].item()
