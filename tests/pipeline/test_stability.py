"""The delay law, what it says of a pipeline, and when a user is warned."""

import math
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from headrace.pipeline import Pipeline
from headrace.pipeline.batch_size import Steps
from headrace.pipeline.corrections import Auto, LearningRate, SynchronousWarmUp, TwoVersions
from headrace.pipeline.rules import Delayed
from headrace.pipeline.stability import Stability, StabilityWarning, largest_rate

from .helpers import batches_of, tanh_net

Factory = Any
BATCHES = batches_of(20, 5)


@pytest.mark.parametrize(
    ("staleness", "plain", "heavy"),
    [
        (0, 2.0, 3.8),
        (1, 1.0, 0.1),
        (2, 0.618, None),
        (4, 0.3473, None),
        (6, 0.2411, 0.0182),
        (14, 0.1083, None),
        (30, 0.0515, 0.0043),
    ],
)
def test_the_bound_is_the_delay_laws(staleness: int, plain: float, heavy: float | None) -> None:
    assert largest_rate(staleness) == pytest.approx(2 * math.sin(math.pi / (4 * staleness + 2)))
    assert largest_rate(staleness) == pytest.approx(plain, abs=5e-5)
    if heavy is not None:
        assert largest_rate(staleness, 0.9) == pytest.approx(heavy, abs=5e-5)


def test_without_delay_it_is_the_text_books() -> None:
    for m in (0.0, 0.5, 0.9):
        assert largest_rate(0, m) == pytest.approx(2 * (1 + m))
        assert largest_rate(0, m, nesterov=True) == pytest.approx(2 * (1 + m) / (1 + 2 * m))


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("staleness", [0, 0.25, 0.5, 0.75, 1, 1.5, 3, 7])
def test_the_recursion_decays_just_below_it_and_grows_just_above(
    staleness: float, momentum: float, nesterov: bool
) -> None:
    bound = largest_rate(staleness, momentum, nesterov)

    def grows(rate: float) -> bool:
        """Whether the optimizer's recursion on h = 1 does, from a random start."""
        whole = math.floor(staleness)
        late, buffer, weights = staleness - whole, 0.0, [1.0, *torch.rand(whole + 1).tolist()]
        for _ in range(10000):
            gradient = (1 - late) * weights[-1 - whole] + late * weights[-2 - whole]
            buffer = momentum * buffer + gradient
            step = gradient + momentum * buffer if nesterov else buffer
            weights.append(weights[-1] - rate * step)
            if not 1e-20 < max(map(abs, weights[-2 - whole :])) < 1e20:
                break
        return abs(weights[-1]) > 1

    assert not grows(0.97 * bound)
    assert grows(1.03 * bound)


def test_what_no_bound_has_is_refused() -> None:
    with pytest.raises(ValueError, match=r"momentum=1\.0: give a number from 0 to below 1"):
        largest_rate(1, 1.0)
    with pytest.raises(ValueError, match="staleness=-1: give a number of updates, 0 or more"):
        largest_rate(-1)


def test_figures_are_of_the_same_run_and_of_plain_sgd() -> None:
    law = Stability(0, 1, 0.1, momentum=0.9)
    assert law.effective_rate == pytest.approx(1.0)
    assert law.factor == pytest.approx(38)
    assert law.plain_factor == pytest.approx(2)
    adam = Stability(0, 1, 0.1, momentum=0.9, dampening=0.9, preconditions=True)
    assert adam.undelayed_bound == pytest.approx(38)  # the adaptive edge of stability
    assert adam.effective_rate == pytest.approx(0.1)
    assert (adam.factor, adam.plain_factor) == pytest.approx((38, 2))


def test_a_verdict_tells_the_delays_part() -> None:
    law = Stability(2, 1, 0.1, momentum=0.9)
    stable, words = law.verdict(0.9)
    assert stable and words.startswith("stable at these weights")
    stable, words = law.verdict(1.1)
    assert not stable and words.startswith(
        "stable without delay, unstable with: η·h = 0.11 at stage 2 (curvature 1.1), and staleness "
        "1 allows 0.1, no delay 3.8; lower the learning rate or the momentum, or write "
        "corrections=[LearningRate()]"
    )
    stable, words = law.verdict(39)
    assert not stable and words.startswith("unstable with or without delay")


# Pipelines ----------------------------------------------------------------------------------


def sgd(rate: float = 0.01, momentum: float = 0.9, **options: Any) -> Factory:
    return lambda params: torch.optim.SGD(params, lr=rate, momentum=momentum, **options)


def trained(stages: int = 8, optimizer: Factory | None = None, **options: Any) -> Pipeline:
    with Pipeline(
        tanh_net(), nn.MSELoss(), optimizer or sgd(), stages=stages, balance="parameters", **options
    ) as pipe:
        pipe.train(BATCHES)
    return pipe


def test_many_stages_and_momentum_are_warned_of_once() -> None:
    with pytest.warns(StabilityWarning) as caught:
        pipe = Pipeline(tanh_net(), nn.MSELoss(), sgd(), stages=8, balance="parameters")
        assert not caught.list  # not before it is trained
        for _ in range(2):
            pipe.train(BATCHES)
        pipe.close()
    (warning,) = caught
    assert warning.filename == __file__  # the call of `train`
    assert str(warning.message) == (
        "staleness 7 at stage 0 divides the largest stable learning rate by 241, and leaves "
        "η/(1-m), here 0.1, 1/12.7 of what plain SGD bears without delay. If this rate was found "
        "without delay, lower the learning rate or the momentum, or write "
        "corrections=[LearningRate()], update_every= larger, or rule=Delayed('predict')"
    )


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": "1f1b"},
        {"schedule": "gpipe"},
        {"stages": 1},
        {"corrections": [LearningRate("inverse")]},
        {"rule": Delayed("predict")},
        {"optimizer": lambda params: torch.optim.Adagrad(params)},
    ],
)
def test_silent_where_the_law_has_nothing_to_say(options: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", StabilityWarning)
        assert trained(**options).stability is None


@pytest.mark.parametrize(
    "options",
    [
        {"corrections": [SynchronousWarmUp(1)]},
        {"corrections": [Auto()], "optimizer": sgd(0.1, 0.0)},  # for which it chooses nothing
    ],
    ids=["warm-up", "auto"],
)
def test_corrections_that_leave_the_delay_as_it_is_do_not_silence(options: dict[str, Any]) -> None:
    with pytest.warns(StabilityWarning, match=r"^staleness 7 at stage 0 divides"):
        assert trained(**options).stability is not None


def test_where_the_batch_grows_nobody_knows_the_delay_in_updates_beforehand() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", StabilityWarning)
        law = trained(batch_size=Steps([8, 16], at=[1])).stability
    assert law is not None and law.staleness == 7, "the most that it can be"


def test_what_auto_chooses_silences() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", StabilityWarning)
        assert trained(corrections=[Auto()]).stability is None


@pytest.mark.parametrize(
    ("options", "staleness", "factor"),
    [
        ({"stages": 2, "optimizer": sgd(0.1, 0.5)}, 1, 6.0),  # as the digits example
        ({"stages": 2}, 1, 38.0),
        ({"stages": 4, "optimizer": sgd(0.1, 0.0)}, 3, 4.494),
        ({"update_every": 7}, 1, 38.0),
        ({"update_every": 7, "corrections": [TwoVersions()]}, 1, 38.0),
        ({"optimizer": lambda p: torch.optim.AdamW(p, lr=1e-3)}, 7, 241.24),
    ],
)
def test_figures_without_a_warning(
    options: dict[str, Any], staleness: float, factor: float
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", StabilityWarning)
        law = trained(**options).stability
    assert law is not None and (law.stage, law.staleness) == (0, staleness)
    assert law.factor == pytest.approx(factor, rel=1e-4)


def test_staleness_is_in_updates_and_so_is_what_is_seen() -> None:
    pipe = Pipeline(tanh_net(), nn.MSELoss(), sgd(), stages=4, balance="parameters", update_every=2)
    for _ in range(10):
        pipe.train(BATCHES)
    law, (first, *_) = pipe.stability, pipe.statistics()
    pipe.close()
    assert law is not None and law.staleness == 1.5
    assert set(first.staleness) - {0} == {1, 2}  # half and half, once warm
    assert first.staleness[1] == pytest.approx(first.staleness[2], abs=2)


def test_the_rate_is_the_one_after_a_warm_up() -> None:
    def warm_up(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: k / 10)

    law = trained(2, sgd(0.2, 0.5), scheduler=warm_up).stability
    assert law is not None and law.effective_rate == pytest.approx(0.4)


def test_of_several_groups_and_optimizers_the_tightest_counts() -> None:
    def several(params: list[tuple[str, nn.Parameter]]) -> list[torch.optim.Optimizer]:
        biases = [p for n, p in params if n.endswith("bias")]
        rest = [p for n, p in params if not n.endswith("bias")]
        groups = [{"params": rest[:1]}, {"params": rest[1:], "lr": 0.2}] if rest[1:] else rest
        return [torch.optim.Adagrad(biases), torch.optim.SGD(groups, lr=0.1, nesterov=False)]

    law = trained(2, several).stability
    assert law is not None and law.rate == 0.2


def test_a_frozen_first_stage_does_not_count() -> None:
    model = tanh_net()
    for parameter in model[:4].parameters():
        parameter.requires_grad_(False)
    with Pipeline(model, nn.MSELoss(), sgd(), stages=3, balance=[4, 6, 6]) as pipe:
        law = pipe.stability
    assert law is not None and (law.stage, law.staleness) == (1, 1)
