"""Learning rates on another cut: those of the weights' own groups, whichever stage they were on."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    SequentialLR,
)

from headrace.pipeline import Pipeline
from headrace.pipeline.checkpoints import CheckpointError

from .helpers import assert_close, batches_of, tanh_net

Named = list[tuple[str, nn.Parameter]]
SIZES = {1: [16], 2: [12, 4], 3: [4, 10, 2]}
BATCHES = batches_of(20, 5)


def parts(params: Named) -> tuple[Named, Named]:
    """The body's and the head's."""
    heads = ("12.", "14.")
    body = [each for each in params if not each[0].startswith(heads)]
    return body, [each for each in params if each[0].startswith(heads)]


def groups(params: Named) -> Optimizer:
    both = zip(parts(params), (0.01, 0.2), strict=True)
    return SGD([{"params": part, "lr": rate} for part, rate in both if part])


def always_two_groups(params: Named) -> Optimizer:
    """One of which is empty on a stage without such weights."""
    both = zip(parts(params), (0.01, 0.2), strict=True)
    return SGD([{"params": [p for _, p in part], "lr": rate} for part, rate in both])


def two_optimizers(params: Named) -> list[Optimizer]:
    both = zip(parts(params), (0.01, 0.2), strict=True)
    return [SGD(part, lr=rate) for part, rate in both if part]


SCHEDULERS: dict[str, Callable[[Any], LRScheduler]] = {
    "LambdaLR": lambda o: LambdaLR(o, lambda update: 0.9**update),
    "CyclicLR": lambda o: CyclicLR(
        o, [0.01] * len(o.param_groups), [g["lr"] for g in o.param_groups], 9, cycle_momentum=False
    ),
    "SequentialLR": lambda o: SequentialLR(
        o, [LinearLR(o, 0.1, 1.0, 4), LambdaLR(o, lambda update: 0.9**update)], [4]
    ),
    "ChainedScheduler": lambda o: ChainedScheduler(
        [LinearLR(o, 0.1, 1.0, 9), ExponentialLR(o, 0.9)]
    ),
}


def built(stages: int, optimizer: Any, scheduler: Any, net: int = 0) -> tuple[Pipeline, Any]:
    """A pipeline, under a flush, so that the cut changes no number; and what gives the rate of each
    weight by name.
    """
    made: list[tuple[Named, list[Optimizer]]] = []

    def make(params: Named) -> Any:
        given = optimizer(params)
        made.append((params, given if isinstance(given, list) else [given]))
        return given

    def rates() -> dict[str, float]:
        where = {
            id(p): group["lr"]
            for _, each in made
            for one in each
            for group in one.param_groups
            for p in group["params"]
        }
        return {name: where[id(p)] for params, _ in made for name, p in params}

    pipe = Pipeline(
        tanh_net(net), nn.MSELoss(), make, stages=stages, balance=SIZES[stages],
        schedule="1f1b", micro_batches=2, scheduler=scheduler,
    )  # fmt: skip
    return pipe, rates


@pytest.mark.parametrize(
    ("optimizer", "cuts"), ((two_optimizers, (1, 2)), (groups, (1, 2)), (always_two_groups, (3, 1)))
)
@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
def test_rates_follow_the_weights(
    optimizer: Any, cuts: tuple[int, int], scheduler: Any, tmp_path: Path
) -> None:
    """Schedulers were paired by their order on a stage, and nested ones refused as damaged."""
    whole, expected = built(cuts[0], optimizer, scheduler)
    whole.train(BATCHES)
    whole.save(tmp_path / "one")
    again, rates = built(cuts[1], optimizer, scheduler, net=9)
    again.load(tmp_path / "one")
    assert rates() == expected()
    for pipe in (whole, again):
        pipe.train(BATCHES)
    assert rates() == expected()
    assert len({*rates().values()}) == 2, "of the body and of the head"
    assert_close(again.state_dict(), whole.state_dict(), 1e-12)


def test_the_first_rate_is_the_checkpoints(tmp_path: Path) -> None:
    """As on the same cut: on another one the configured rate of by now came back in."""
    scheduler = SCHEDULERS["LambdaLR"]
    whole, expected = built(3, lambda p: SGD(p, lr=0.1), scheduler)
    whole.train(BATCHES)
    whole.save(tmp_path / "one")
    again, rates = built(2, lambda p: SGD(p, lr=0.4), scheduler)
    again.load(tmp_path / "one")
    for pipe in (whole, again):
        pipe.train(BATCHES)
    assert rates() == expected()


def test_another_scheduler_of_one_optimizer(tmp_path: Path) -> None:
    """Only that optimizer's tells."""

    def by_rate(other: Any) -> Callable[[Any], LRScheduler]:
        usual = SCHEDULERS["LambdaLR"]
        return lambda o: (other if o.param_groups[0]["lr"] == 0.2 else usual)(o)

    whole, _ = built(1, two_optimizers, by_rate(SCHEDULERS["LambdaLR"]))
    whole.train(BATCHES)
    whole.save(tmp_path / "one")
    again, _ = built(2, two_optimizers, by_rate(partial(CosineAnnealingLR, T_max=9)))
    with pytest.raises(CheckpointError, match="scheduler LambdaLR, and this pipeline CosineAnneal"):
        again.load(tmp_path / "one")
