"""Weight prediction: its functions by hand, and what forwards run with in a pipeline.

What momentum alone will still move is found out by letting it: a copy of the real torch optimizer
steps on with gradients of 0.
"""

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer
from torch.optim import lr_scheduler as schedulers
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from headrace.pipeline import Pipeline
from headrace.pipeline.batch_size import Steps
from headrace.pipeline.corrections import (
    AsynchronousNesterov,
    BasisRotation,
    LearningRate,
    PipeMareT1,
    WeightPrediction,
)
from headrace.pipeline.corrections.weight_prediction import (
    ahead_of_adam,
    ahead_of_nadam,
    ahead_of_sgd,
    extrapolate,
)
from headrace.pipeline.errors import InputError
from headrace.pipeline.learning_rates import ComingRates, multiplied
from headrace.pipeline.rules import Delayed
from headrace.pipeline.simulation import Simulation

from .alone import MSE
from .helpers import SIZES, adamw, assert_close, assert_same, batches_of, clone, momentum, tanh_net
from .simulator import OptimizerFactory, cut, depths_of, simulate
from .test_corrections import Scale, g, half_square, numbers, run, sgd, three_stages
from .two_weights import Weight, by_hand, in_a_pipeline

FORMS = ["last_update", "linear", "momentum"]

OPTIMIZERS: dict[str, OptimizerFactory] = {
    "SGD": partial(SGD, lr=0.02, momentum=0.9),
    "Nesterov": partial(SGD, lr=0.02, momentum=0.8, nesterov=True),
    "dampened": partial(SGD, lr=0.05, momentum=0.9, dampening=0.5),
    "Adam": partial(Adam, lr=0.02, betas=(0.8, 0.9)),
    "amsgrad": partial(Adam, lr=0.02, betas=(0.8, 0.9), amsgrad=True),
    "AdamW": partial(AdamW, lr=0.02, betas=(0.8, 0.9), weight_decay=0.5),
    "NAdam": partial(NAdam, lr=0.02, betas=(0.9, 0.95), momentum_decay=0.01),
    "decoupled": partial(
        NAdam, lr=0.02, betas=(0.9, 0.95), weight_decay=0.5, decoupled_weight_decay=True
    ),
}


def near(name: str) -> float:
    """How near the numbers are; torch keeps NAdam's Π μ in float32."""
    return 1e-9 if name in ("NAdam", "decoupled") else 1e-12


# Each function by hand --------------------------------------------------------------------------


def test_extrapolation_by_hand() -> None:
    """5 + 3 (5 - 4) = 8, -1 + 3 (-1 - 1) = -7; of what has not moved, every bit stays."""
    weight, before = g(5, -1), g(4, 1)
    assert extrapolate(weight, before, 3).tolist() == [8, -7]
    assert extrapolate(weight, before, 0).tolist() == [5, -1]
    assert extrapolate(weight, before, 0.5).tolist() == [5.5, -2]
    odd = torch.randn(100, generator=torch.Generator().manual_seed(0))
    assert torch.equal(extrapolate(odd, odd.clone(), 7), odd)
    assert weight.tolist() == [5, -1] and before.tolist() == [4, 1]


def test_ahead_of_sgd_by_hand() -> None:
    """v = 2, m = 1/2, rates 1, 2, 4: 10 - 2 (1/2 + 2/4 + 4/8) = 7; Nesterov's, half of that."""
    weight, v = g(10), g(2)
    assert ahead_of_sgd(weight, v, [1, 2, 4], 0.5).tolist() == [7]
    assert ahead_of_sgd(weight, v, [1, 2, 4], 0.5, nesterov=True).tolist() == [8.5]
    assert ahead_of_sgd(weight, v, [1, 2, 4], 1.0).tolist() == [-4], "linear: w - v Σ η"
    assert ahead_of_sgd(weight, v, [], 0.5).tolist() == [10]
    # FTPipe's closed form for equal rates: η (γ - γ^{d+1}) / (1 - γ).
    got = ahead_of_sgd(weight, v, [0.1] * 5, 0.9).item()
    assert got == pytest.approx(10 - 2 * 0.1 * (0.9 - 0.9**6) / (1 - 0.9), rel=1e-14)


def test_ahead_of_adam_by_hand() -> None:
    """After one update, β1 = β2 = 1/2: M / (1 - β1) = 4 M, say; V̂ = V / (1/2) = 16, ε = 0.

    M = 3: step 2 moves η β1 M / (1 - 1/4) / 4 = η/2; step 3 η (1/4) 3 / (1 - 1/8) / 4 = η 3/14.
    """
    weight, mean, square = g(10), g(3), g(8)
    ahead = partial(ahead_of_adam, weight, mean, square, 1, betas=(0.5, 0.5), eps=0.0)
    assert ahead([1]).item() == pytest.approx(10 - 1 / 2, rel=1e-15)
    assert ahead([1, 7]).item() == pytest.approx(10 - 1 / 2 - 3 / 2, rel=1e-15)
    # Linear: M̂ / √V̂ = 6 / 4 for each.
    assert ahead([1, 7], linear=True).item() == pytest.approx(10 - 8 * 1.5, rel=1e-15)
    # Decoupled decay λ = 1/2 at rates 1/2, 1: ((10 · 3/4 - 1/4) · 1/2) - 3/14.
    assert ahead([0.5, 1], decay=0.5).item() == pytest.approx(7.25 / 2 - 3 / 14, rel=1e-15)
    assert ahead([]).item() == 10
    assert [t.tolist() for t in (weight, mean, square)] == [[10], [3], [8]]


def test_ahead_of_adam_has_epsilon_outside_of_the_root() -> None:
    got = ahead_of_adam(g(0), g(1), g(9), 1, [1], (0.5, 0.0), 2.0)
    assert got.item() == pytest.approx(-(0.5 / 0.75) / (3 + 2), rel=1e-15)


def test_ahead_of_nadam_by_hand() -> None:
    """ψ = 0: every μ is β1 / 2 = 1/4. After one update Π = 1/4, V̂ = 16, M = 4, ε = 0.

    Step 2 moves η μ β1 M / (1 - μ³) / 4 = η (1/8) / (63/64), and step 3 η (1/16) / (255/256).
    """
    ahead = partial(
        ahead_of_nadam, g(10), g(4), g(8), 1, 0.25,
        betas=(0.5, 0.5), eps=0.0, momentum_decay=0.0,
    )  # fmt: skip
    two, three = 1 / 8 * 64 / 63, 1 / 16 * 256 / 255
    assert ahead([1]).item() == pytest.approx(10 - two, rel=1e-15)
    assert ahead([1, 3]).item() == pytest.approx(10 - two - 3 * three, rel=1e-15)
    assert ahead([1, 3], linear=True).item() == pytest.approx(10 - 4 / (15 / 16), rel=1e-15)
    decayed = (10 * 0.5 - two) * (1 - 3 * 0.5) - 3 * three
    assert ahead([1, 3], decay=0.5).item() == pytest.approx(decayed, rel=1e-15)


def coast(parameter: Tensor, optimizer: Optimizer) -> None:
    """Let momentum alone move it once: a gradient of 0, and a debiased second moment that stays."""
    state, group = optimizer.state[parameter], optimizer.param_groups[0]
    if "exp_avg_sq" in state:
        beta, t = group["betas"][1], int(state["step"])
        growth = (1 - beta ** (t + 1)) / (1 - beta**t)
        state["exp_avg_sq"].mul_(growth / beta)
        if "max_exp_avg_sq" in state:
            state["max_exp_avg_sq"].mul_(growth)
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()


@pytest.mark.parametrize("name", list(OPTIMIZERS))
@pytest.mark.parametrize("maximize", [False, True])
def test_the_momentum_form_is_what_torch_moves_on_gradients_of_0(name: str, maximize: bool) -> None:
    """At rates that change, from a state 5 updates old; asked of the correction itself.

    What torch keeps under maximize is the moments of -g: they need no other sign.
    """
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, 7, generator=generator, dtype=torch.float64)
    parameter, rates = nn.Parameter(draw()), [0.02, 0.05, 0.01, 0.04]
    optimizer = OPTIMIZERS[name]([("w", parameter)])
    (group,) = optimizer.param_groups
    group["maximize"] = maximize
    for _ in range(5):
        parameter.grad = draw()
        optimizer.step()
    got = WeightPrediction("momentum")._with_rates(
        optimizer, group, optimizer.state[parameter], parameter.detach().clone(), rates
    )
    started = parameter.detach().clone()
    for rate in rates:
        group["lr"] = rate
        coast(parameter, optimizer)
    assert (parameter.detach() - started).abs().min() > 1e-5
    torch.testing.assert_close(got, parameter.detach(), rtol=near(name), atol=near(name))


@pytest.mark.parametrize("form", ["linear", "momentum"])
@pytest.mark.parametrize("kind", [SGD, Adam, AdamW, NAdam])
def test_to_climb_is_to_descend_the_negative(kind: Any, form: str) -> None:
    batches = numbers([4] * 15)
    more: dict[str, Any] = {"momentum": 0.9} if kind is SGD else {}
    corrections = [WeightPrediction(form)]
    down = in_a_pipeline(corrections, partial(kind, lr=0.02, **more), batches)
    with Pipeline(
        three_stages(0.5, Scale(1.5)),
        lambda output, target: -half_square(output, target),
        partial(kind, lr=0.02, maximize=True, **more),
        stages=3, balance=[1, 1, 1], corrections=corrections,
    ) as pipe:  # fmt: skip
        pipe.train(batches)
        assert (pipe.state_dict()["0.w"].item(), pipe.state_dict()["2.w"].item()) == down


# The learning rates to come ---------------------------------------------------------------------


def sequence(optimizer: Optimizer) -> LRScheduler:
    warm = schedulers.LinearLR(optimizer, 0.1, total_iters=4)
    after = schedulers.CosineAnnealingLR(optimizer, 20, 0.001)
    return schedulers.SequentialLR(optimizer, [warm, after], [4])


SCHEDULERS: dict[str, Callable[[Optimizer], LRScheduler]] = {
    "lambda": partial(LambdaLR, lr_lambda=lambda k: 1 / (1 + k)),
    "lambdas": partial(LambdaLR, lr_lambda=[lambda k: 1 / (1 + k), lambda k: 0.5**k]),
    "cosine": partial(schedulers.CosineAnnealingLR, T_max=9, eta_min=0.001),
    "step": partial(schedulers.StepLR, step_size=3),
    "exponential": partial(schedulers.ExponentialLR, gamma=0.8),
    "warm restarts": partial(schedulers.CosineAnnealingWarmRestarts, T_0=3, T_mult=2),
    "one cycle": partial(schedulers.OneCycleLR, max_lr=[0.3, 0.1], total_steps=100),
    "sequential": sequence,
}


def two_groups() -> Optimizer:
    one, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    return SGD(
        [{"params": [("a", one)], "lr": 0.2}, {"params": [("b", other)], "lr": 0.05}], momentum=0.9
    )


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_the_rates_to_come_are_those_that_come(name: str) -> None:
    """Of both groups, at each of 12 updates, 3 ahead; the optimizer's own rates are let be."""
    optimizer = two_groups()
    scheduler = SCHEDULERS[name](optimizer)
    coming = ComingRates(optimizer, SCHEDULERS[name])
    told, came = [], []
    for _ in range(12):
        told.append([coming.of(group, 3) for group in (0, 1)])
        came.append([float(group["lr"]) for group in optimizer.param_groups])
        assert [coming.of(group, 0) for group in (0, 1)] == [[], []]
        scheduler.step()
        coming.passed()
    for k in range(10):
        for group in (0, 1):
            assert told[k][group] == [came[k + j][group] for j in range(3)]
    assert len({rates[0] for rates in came}) > 2


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_the_rates_to_come_of_adams() -> None:
    """One cycle turns betas too, of an optimizer that has them: not of the real one twice."""
    make = partial(schedulers.OneCycleLR, max_lr=0.3, total_steps=40)
    for kind in (Adam, AdamW, NAdam):
        optimizer = kind([("a", nn.Parameter(torch.ones(1)))], lr=1.0)
        scheduler = make(optimizer)
        coming = ComingRates(optimizer, make)
        betas = optimizer.param_groups[0]["betas"]
        told = coming.of(0, 4)
        assert optimizer.param_groups[0]["betas"] == betas
        for rate in told:
            assert optimizer.param_groups[0]["lr"] == rate
            scheduler.step()


def test_without_a_scheduler_the_rates_stay() -> None:
    optimizer = two_groups()
    coming = ComingRates(optimizer, None)
    assert [coming.of(0, 3), coming.of(1, 2)] == [[0.2] * 3, [0.05] * 2]
    optimizer.param_groups[0]["lr"] = 0.1
    coming.passed()
    assert coming.of(0, 2) == [0.1, 0.1]


def test_the_rates_to_come_beyond_what_was_foreseen() -> None:
    """slack='auto' deepens a stage after it was made."""
    make = partial(schedulers.StepLR, step_size=2, gamma=0.5)
    optimizer = two_groups()
    make(optimizer)
    assert ComingRates(optimizer, make).of(0, 5) == [0.2, 0.2, 0.1, 0.1, 0.05]


# A scheduler that ran further ahead than asked would step past total_steps, and end the training.
def test_a_scheduler_that_ends_with_the_training() -> None:
    """One cycle of as many steps as there are updates: nobody asks what comes after it."""
    steps, optimizer = 20, OPTIMIZERS["SGD"]
    make = partial(schedulers.OneCycleLR, max_lr=0.02, total_steps=steps, cycle_momentum=False)
    batches = numbers([4] * steps)
    for form in FORMS:
        u, _ = in_a_pipeline([WeightPrediction(form)], optimizer, batches, scheduler=make)
        assert math.isfinite(u)


def test_a_scheduler_that_cannot_be_made_twice_is_told_so() -> None:
    made: list[Optimizer] = []

    def once(optimizer: Optimizer) -> LRScheduler:
        if not isinstance(optimizer, AdamW):
            raise KeyError("betas")
        made.append(optimizer)
        return LambdaLR(optimizer, lambda k: 1.0)

    with pytest.raises(InputError, match=r"KeyError.*write form='last_update', which needs no"):
        Pipeline(
            tanh_net(), MSE, adamw, stages=3, balance=SIZES[3], scheduler=once,
            corrections=[WeightPrediction("momentum")],
        )  # fmt: skip
    assert made


def test_multiplied_gives_the_rates_back() -> None:
    optimizer = two_groups()
    with pytest.raises(RuntimeError), multiplied([optimizer], 0.5):
        assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.025]
        raise RuntimeError
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.05]


# In a pipeline, by hand -------------------------------------------------------------------------


class Predicted(Weight):
    """Forwards run with where the weight will be."""

    form, strength, scale = "last_update", 1.0, staticmethod(lambda age: 1.0)

    def factor(self, age: int) -> float:
        return self.scale(age)

    def ahead(self, age: int) -> float:
        if not age or not self.updates:
            return self.value
        if self.form == "last_update":
            return self.value + self.strength * age * (self.value - self.before)
        rates = [self.rate(self.updates + j) * self.factor(age) * self.strength for j in range(age)]
        return self.coasted(rates) if self.form == "momentum" else self.straight(rates)

    def coasted(self, rates: Sequence[float]) -> float:
        twin = copy.deepcopy(self)
        for rate in rates:
            twin.group["lr"] = rate
            coast(twin.parameter, twin.optimizer)
        return twin.value

    def straight(self, rates: Sequence[float]) -> float:
        """w ← w (1 - η λ) - η times the direction of the momentum by now, τ times."""
        state, group, w = self.state, self.group, self.value
        if isinstance(self.optimizer, SGD):
            return w - sum(rates) * float(state["momentum_buffer"])
        (beta1, beta2), t = group["betas"], int(state["step"])
        left = beta1**t
        if isinstance(self.optimizer, NAdam):  # Π μ_i, of the step to come too
            left = math.prod(
                beta1 * (1 - 0.96 ** (i * group["momentum_decay"]) / 2) for i in range(1, t + 2)
            )
        square = float(state.get("max_exp_avg_sq", state["exp_avg_sq"])) / (1 - beta2**t)
        way = float(state["exp_avg"]) / (1 - left) / (math.sqrt(square) + group["eps"])
        for rate in rates:
            w = w * (1 - rate * group["weight_decay"]) - rate * way
        return w


def predicted(form: str, strength: float = 1.0, scale: Callable[[int], float] | None = None) -> Any:
    more: dict[str, Any] = {"form": form, "strength": strength}
    return type("Predicted", (Predicted,), more | ({"scale": staticmethod(scale)} if scale else {}))


def inverse_of(age: int) -> float:
    return 1 / max(1, age)


def falling(k: int) -> float:
    return 1 / (1 + 0.2 * k)


@pytest.mark.parametrize("name", list(OPTIMIZERS))
@pytest.mark.parametrize("form", FORMS)
def test_prediction_by_hand(form: str, name: str) -> None:
    """As it is; under a schedule, whose rates to come count; and with a factor for each age."""
    batches, make = numbers([4] * 12), OPTIMIZERS[name]
    for schedule, divides, slack in ((None, False, 2), (falling, False, 0), (falling, True, 2)):
        kind = predicted(form, scale=inverse_of if divides else None)
        both = [schedule] if schedule else []
        expected = by_hand(batches, 2 + 2 * slack, kind(0.5, make, *both), Weight(1.5, make, *both))
        corrections = [WeightPrediction(form), *([LearningRate("inverse")] if divides else [])]
        more: dict[str, Any] = {"slack": slack}
        if schedule:
            more["scheduler"] = partial(LambdaLR, lr_lambda=schedule)
        got = in_a_pipeline(corrections, make, batches, **more)
        assert got == pytest.approx(expected, rel=near(name))
    without = in_a_pipeline(corrections[1:], make, batches, **more)
    assert abs(got[0] - without[0]) > 1e-7, "the prediction must act"
    assert in_a_pipeline(corrections[::-1], make, batches, **more) == got


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("every", [2, 3])
def test_prediction_with_several_micro_batches_to_an_update(form: str, every: int) -> None:
    """At slack 1, 4 are in flight: the ages differ within an update, and so do the predictions."""
    batches, make = numbers([3, 1, 4] * 10), OPTIMIZERS["SGD"]
    expected = by_hand(
        batches, 4, predicted(form, scale=inverse_of)(0.5, make), Weight(1.5, make), every
    )
    got = in_a_pipeline(
        [LearningRate("inverse"), WeightPrediction(form)], make, batches,
        slack=1, update_every=every,
    )  # fmt: skip
    assert got == pytest.approx(expected, rel=1e-12)


# The rates to come once left out what a growing batch makes of them.
@pytest.mark.parametrize("kind", [Pipeline, Simulation])
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
@pytest.mark.parametrize("form", ["linear", "momentum"])
@pytest.mark.parametrize("parts", [[(2,), (8,)], [(1, 1), (3, 5)]], ids=["1", "2"])
def test_prediction_where_the_rate_grows_with_the_batch(
    parts: Sequence[Sequence[int]], form: str, name: str, kind: type[Pipeline]
) -> None:
    """8 updates of 2 samples, then 8 of 8 at twice the rate; 4 in flight, of both sizes once."""
    epochs, make = [numbers([*sizes] * 8) for sizes in parts], OPTIMIZERS[name]

    def rate(update: int) -> float:
        return 1.0 if update < 8 else 2.0

    u, v = predicted(form)(0.5, make, rate), Weight(1.5, make, rate)
    expected = by_hand(epochs[0] + epochs[1], 4, u, v, len(parts[0]))
    with kind(
        three_stages(0.5, Scale(1.5)), half_square, make, stages=3, balance=[1, 1, 1], slack=1,
        batch_size=Steps([2, 8], at=[1], rate="sqrt"), corrections=[WeightPrediction(form)],
    ) as pipe:  # fmt: skip
        for batches in epochs:
            pipe.train(batches)
        state = pipe.state_dict()
    assert (state["0.w"].item(), state["2.w"].item()) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_half_of_the_way(form: str) -> None:
    batches, make = numbers([4] * 15), OPTIMIZERS["AdamW"]
    expected = by_hand(batches, 2, predicted(form, 0.5)(0.5, make), Weight(1.5, make))
    got = in_a_pipeline([WeightPrediction(form, 0.5)], make, batches)
    assert got == pytest.approx(expected, rel=1e-12)
    assert got != in_a_pipeline([WeightPrediction(form)], make, batches)


@pytest.mark.parametrize("form", FORMS)
def test_prediction_with_asynchronous_nesterov(form: str) -> None:
    """Nesterov's momentum, and each update to come at the rate η (1 - γ)."""
    batches, make = numbers([4] * 20), partial(SGD, lr=0.2, momentum=0.9)
    kind = predicted(form, scale=lambda age: 1 - 0.9)
    nesterov = partial(SGD, lr=0.2, momentum=0.9, nesterov=True)
    last = type("Fresh", (Weight,), {"factor": lambda self, age: 1 - 0.9})
    expected = by_hand(batches, 2, kind(0.5, nesterov), last(1.5, nesterov))
    for corrections in (
        [AsynchronousNesterov(), WeightPrediction(form)],
        [WeightPrediction(form), AsynchronousNesterov()],
    ):
        got = in_a_pipeline(corrections, make, batches)
        assert got == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_a_skipped_update_is_not_extrapolated(form: str) -> None:
    """Its micro-batch has a target that is no number; the schedule goes on over it."""
    batches = numbers([4] * 20)
    for k in (7, 8, 13):
        batches[k] = (batches[k][0], batches[k][1] * math.nan)
    for name in ("SGD", "AdamW", "NAdam"):
        make = OPTIMIZERS[name]
        u, v = predicted(form)(0.5, make, falling), Weight(1.5, make, falling)
        got = in_a_pipeline(
            [WeightPrediction(form)], make, batches, on_nonfinite="skip",
            scheduler=partial(LambdaLR, lr_lambda=falling),
        )  # fmt: skip
        assert got == pytest.approx(by_hand(batches, 2, u, v), rel=near(name))


# The last update, and the rule that extrapolates it ----------------------------------------------


@pytest.mark.parametrize("slack", [0, 2])
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("optimizer", [momentum, adamw])
def test_the_last_update_is_the_predict_rule_bitwise(
    optimizer: OptimizerFactory, every: int, slack: int
) -> None:
    batches, more = batches_of(75, 5), {"slack": slack, "update_every": every}
    got = run([WeightPrediction()], optimizer, batches, rule=Delayed("stash"), **more)
    assert_same(got, run([], optimizer, batches, rule=Delayed("predict"), **more))
    expected = simulate(
        cut(tanh_net(), SIZES[3]), MSE, optimizer, batches, depths=depths_of(3, slack),
        policy="predict", update_every=every,
    ).weights  # fmt: skip
    assert_close(got, expected)


def test_the_last_update_and_the_predict_rule_skip_alike() -> None:
    batches = batches_of(75, 5)
    for k in (6, 11):
        batches[k] = (batches[k][0], batches[k][1] * math.inf)
    more: dict[str, Any] = {"on_nonfinite": "skip", "slack": 1}
    got = run([WeightPrediction()], adamw, batches, **more)
    assert_same(got, run([], adamw, batches, rule=Delayed("predict"), **more))
    assert all(torch.isfinite(value).all() for value in got.values())


@pytest.mark.parametrize("optimizer", [torch.optim.Adagrad, torch.optim.RMSprop, torch.optim.SGD])
def test_the_last_update_is_defined_for_every_optimizer(optimizer: Any) -> None:
    batches, make = batches_of(40, 5), partial(optimizer, lr=0.01)
    got = run([WeightPrediction()], make, batches)
    assert_same(got, run([], make, batches, rule=Delayed("predict")))


def test_loaded_weights_are_no_update_to_extrapolate() -> None:
    """SGD keeps nothing: after a load the pipeline is as a new one that began there."""
    batches, loaded = batches_of(40, 5), tanh_net(9).state_dict()
    with Pipeline(
        tanh_net(), MSE, sgd, stages=3, balance=SIZES[3], corrections=[WeightPrediction()]
    ) as pipe:
        pipe.train(batches)
        pipe.load_state_dict(loaded)
        pipe.train(batches)
        got = clone(pipe.state_dict())
    with Pipeline(
        tanh_net(9), MSE, sgd, stages=3, balance=SIZES[3], corrections=[WeightPrediction()]
    ) as pipe:
        pipe.train(batches)
        assert_same(got, pipe.state_dict())


@pytest.mark.parametrize("form", FORMS)
def test_a_drain_is_followed_by_what_is_fresh(form: str) -> None:
    """Nothing is in flight after it: the first forward has the newest weights, as at the start."""
    batches, make = numbers([4] * 20), OPTIMIZERS["SGD"]
    past = [predicted(form)(0.5, make)]
    u, v = predicted(form)(0.5, make), Weight(1.5, make)
    for k, (x, y) in enumerate(batches):
        version = max(10 if k >= 10 else 0, k - 2)
        then = past[version].ahead(k - version)
        error = v.value * then * x - y
        du, dv = float((error * v.value * x).mean()), float((error * then * x).mean())
        u.move(du, 1.0, k - version)
        v.move(dv, 1.0, 0)
        past.append(copy.deepcopy(u))
    with Pipeline(
        three_stages(0.5, Scale(1.5)), half_square, make,
        stages=3, balance=[1, 1, 1], corrections=[WeightPrediction(form)],
    ) as pipe:  # fmt: skip
        pipe.train(batches[:10])
        pipe.drain()
        pipe.train(batches[10:])
        state = pipe.state_dict()
    assert [state["0.w"].item(), state["2.w"].item()] == pytest.approx(
        [u.value, v.value], rel=1e-12
    )


# Several optimizers, groups, and weights that none moves -----------------------------------------


def weights_and_biases(params: Sequence[tuple[str, nn.Parameter]]) -> Any:
    """Two optimizers, with schedules of different rates; nobody moves the biases of layer 2."""
    weights = [(n, p) for n, p in params if n.endswith("weight")]
    biases = [(n, p) for n, p in params if n.endswith("bias") and not n.startswith("2.")]
    return [AdamW(weights, lr=0.003), SGD(biases, lr=0.05, momentum=0.9)]


def one_by_one(params: Sequence[tuple[str, nn.Parameter]]) -> Any:
    """The same, with an optimizer for each weight."""
    made: list[Optimizer] = []
    for name, parameter in params:
        if name.endswith("weight"):
            made.append(AdamW([(name, parameter)], lr=0.003))
        elif not name.startswith("2."):
            made.append(SGD([(name, parameter)], lr=0.05, momentum=0.9))
    return made


@pytest.mark.parametrize("form", FORMS)
def test_several_optimizers_to_a_stage(form: str) -> None:
    batches, decay = batches_of(40, 5), partial(schedulers.ExponentialLR, gamma=0.9)
    got = run([WeightPrediction(form)], weights_and_biases, batches, scheduler=decay)
    assert_same(got, run([WeightPrediction(form)], one_by_one, batches, scheduler=decay))
    assert torch.equal(got["2.bias"], tanh_net().state_dict()["2.bias"])
    uncorrected = run([], weights_and_biases, batches, scheduler=decay)
    assert not torch.equal(got["0.weight"], uncorrected["0.weight"])


def test_groups_of_one_optimizer_have_their_own_numbers() -> None:
    def two(params: Sequence[tuple[str, nn.Parameter]]) -> Optimizer:
        weights = [(n, p) for n, p in params if n.endswith("weight")]
        biases = [(n, p) for n, p in params if n.endswith("bias")]
        return SGD(
            [{"params": weights, "lr": 0.02, "momentum": 0.9}, {"params": biases, "momentum": 0.5}],
            lr=0.05,
        )

    def apart(params: Sequence[tuple[str, nn.Parameter]]) -> Any:
        weights = [(n, p) for n, p in params if n.endswith("weight")]
        biases = [(n, p) for n, p in params if n.endswith("bias")]
        return [SGD(weights, lr=0.02, momentum=0.9), SGD(biases, lr=0.05, momentum=0.5)]

    batches, decay = batches_of(40, 5), partial(schedulers.StepLR, step_size=4)
    for form in FORMS:
        got = run([WeightPrediction(form)], two, batches, scheduler=decay)
        assert_same(got, run([WeightPrediction(form)], apart, batches, scheduler=decay))


# What is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["", "Linear", "nesterov", None, 1])
def test_forms_that_are_refused(form: Any) -> None:
    with pytest.raises(ValueError, match=r"form=.*: write one of last_update, linear, momentum"):
        WeightPrediction(form)


@pytest.mark.parametrize("strength", [0, -1, math.nan, math.inf, "all", None])
def test_strengths_that_are_refused(strength: Any) -> None:
    with pytest.raises(ValueError, match=r"strength=.*: give a number above 0, 1 for all of the"):
        WeightPrediction(strength=strength)


@pytest.mark.parametrize("form", ["linear", "momentum"])
@pytest.mark.parametrize("kind", ["Adagrad", "RMSprop", "Adamax", "Rprop"])
def test_optimizers_whose_momentum_is_not_known_are_refused(kind: str, form: str) -> None:
    make = partial(getattr(torch.optim, kind), lr=0.01)
    with pytest.raises(InputError, match=rf"form='{form}'.*is {kind}: write form='last_update'"):
        run([WeightPrediction(form)], make, batches_of(10, 5))


@pytest.mark.parametrize("form", ["linear", "momentum"])
def test_sgd_without_momentum_has_none_to_predict_by(form: str) -> None:
    """It would be accepted, and predict nothing."""
    with pytest.raises(InputError, match=r"momentum"):
        run([WeightPrediction(form)], sgd, batches_of(10, 5))


@pytest.mark.parametrize("form", ["linear", "momentum"])
def test_moments_in_a_rotated_basis_are_not_the_weights_own(form: str) -> None:
    """Basis rotation keeps Adam's moments in another basis than the weights that they predict."""
    for corrections in (
        [BasisRotation(), WeightPrediction(form)],
        [WeightPrediction(form), BasisRotation()],
    ):
        with pytest.raises((ValueError, InputError), match=r"form='last_update'"):
            run(corrections, adamw, batches_of(30, 5))


@pytest.mark.parametrize("policy", ["current", "replay", "predict"])
@pytest.mark.parametrize("form", FORMS)
def test_rules_that_do_not_keep_what_was_predicted_are_refused(form: str, policy: str) -> None:
    with pytest.raises(ValueError, match=r"WeightPrediction.*write rule=Delayed\(weights='stash'"):
        run([WeightPrediction(form)], momentum, batches_of(10, 5), rule=Delayed(policy))


def test_two_predictions_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"has weight_prediction and weight_prediction.*all but one"
    ):
        run([WeightPrediction(), PipeMareT1(3), WeightPrediction("linear")], momentum, [])


def test_weights_of_one_optimizer_alone() -> None:
    """A stage without it predicts nothing; a name that torch has not is refused."""
    batches = batches_of(40, 5)
    assert_same(run([WeightPrediction(of="Muon")], momentum, batches), run([], momentum, batches))
    every = run([WeightPrediction()], momentum, batches)
    assert_same(run([WeightPrediction(of="SGD")], momentum, batches), every)
    with pytest.raises(InputError, match=r"of='Moun' is no optimizer of torch"):
        run([WeightPrediction(of="Moun")], momentum, batches)
