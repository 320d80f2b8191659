"""Corrections side by side: where none has anything to do, in order, and what is refused."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer

from headrace.pipeline import Pipeline
from headrace.pipeline.corrections import (
    AsynchronousNesterov,
    BasisRotation,
    Correction,
    DelayCompensation,
    GapAware,
    LearningRate,
    PipeMareT1,
    PipeMareT2,
    SpikeCompensation,
    SynchronousWarmUp,
    TwoVersions,
    WeightPrediction,
)
from headrace.pipeline.corrections.learning_rate import inverse
from headrace.pipeline.errors import InputError
from headrace.pipeline.rules import Delayed

from .alone import MSE
from .helpers import SIZES, adamw, assert_close, assert_same, batches_of, clone, momentum, tanh_net
from .helpers import plain as plainly
from .simulator import OptimizerFactory
from .test_correction_kinds import Annealed, Gapped, Spiked
from .test_corrections import numbers, run, sgd
from .two_weights import Weight, by_hand, in_a_pipeline

Make = Callable[[], Correction]

# name: the correction, an optimizer that it is defined for, and the weights that a backward uses.
KINDS: dict[str, tuple[Make, OptimizerFactory, str]] = {
    "last update": (WeightPrediction, adamw, "stash"),
    "linear": (partial(WeightPrediction, "linear"), adamw, "stash"),
    "momentum": (partial(WeightPrediction, "momentum"), momentum, "stash"),
    "spike": (SpikeCompensation, momentum, "stash"),
    "gap": (GapAware, momentum, "stash"),
    "gap, AdamW": (GapAware, adamw, "stash"),
    "T1": (partial(PipeMareT1, 5), adamw, "stash"),
    "T2": (PipeMareT2, momentum, "current"),
    "warm-up": (partial(SynchronousWarmUp, 3), adamw, "stash"),
    "basis": (BasisRotation, adamw, "stash"),
}


def nesterov_at(rate: float) -> OptimizerFactory:
    return partial(SGD, lr=rate, momentum=0.9, nesterov=True)


# Where nothing is late --------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(KINDS))
def test_one_stage_is_plain_torch_bitwise(name: str) -> None:
    make, optimizer, policy = KINDS[name]
    batches, model = batches_of(43, 5), tanh_net()
    plainly(model, MSE, optimizer, batches)
    with Pipeline(
        tanh_net(), MSE, optimizer, stages=1, rule=Delayed(policy), corrections=[make()]
    ) as pipe:
        pipe.train(batches)
        assert_same(pipe.state_dict(), model.state_dict())


def test_all_at_once_on_one_stage_are_plain_torch_bitwise() -> None:
    batches, model = batches_of(43, 5), tanh_net()
    plainly(model, MSE, momentum, batches)
    corrections: list[Correction] = [
        GapAware(), WeightPrediction("momentum"), SpikeCompensation(), LearningRate(),
        PipeMareT1(9), PipeMareT2(), SynchronousWarmUp(2), TwoVersions(), DelayCompensation(),
    ]  # fmt: skip
    with Pipeline(tanh_net(), MSE, momentum, stages=1, corrections=corrections) as pipe:
        pipe.train(batches)
        assert_same(pipe.state_dict(), model.state_dict())


def test_two_versions_on_one_stage_are_one() -> None:
    batches = batches_of(40, 5)
    with Pipeline(
        tanh_net(), MSE, momentum, stages=1, update_every=2, corrections=[TwoVersions()]
    ) as pipe:
        pipe.train(batches)
        got = clone(pipe.state_dict())
        assert [(row.copies, row.staleness) for row in pipe.statistics()] == [(0, {0: 8})]
    with Pipeline(tanh_net(), MSE, momentum, stages=1, update_every=2) as pipe:
        pipe.train(batches)
        assert_same(got, pipe.state_dict())


def test_asynchronous_nesterov_on_one_stage_is_nesterovs_at_a_lower_rate_bitwise() -> None:
    batches, model = batches_of(43, 5), tanh_net()
    plainly(model, MSE, nesterov_at(0.05 * (1 - 0.9)), batches)
    with Pipeline(
        tanh_net(), MSE, momentum, stages=1, corrections=[AsynchronousNesterov()]
    ) as pipe:
        pipe.train(batches)
        assert_same(pipe.state_dict(), model.state_dict())


@pytest.mark.parametrize("name", [name for name in KINDS if name != "warm-up"])
def test_the_last_stage_is_left_alone_bitwise(name: str) -> None:
    """With nothing to train before it, which there is then nothing to do about."""
    make, optimizer, policy = KINDS[name]
    states = []
    for corrections in ([], [make()]):
        model = tanh_net()
        model[: sum(SIZES[3][:2])].requires_grad_(False)
        with Pipeline(
            model, MSE, optimizer, stages=3, balance=SIZES[3], rule=Delayed(policy),
            corrections=corrections,
        ) as pipe:  # fmt: skip
            pipe.train(batches_of(43, 5))
            states.append(clone(pipe.state_dict()))
    assert_same(*states)


@pytest.mark.parametrize(
    ("name", "schedule"), [*((name, "1f1b") for name in KINDS), ("momentum", "gpipe")]
)
def test_under_a_flush_nothing_is_corrected(name: str, schedule: str) -> None:
    """Two versions included, which a flush does not need."""
    make, optimizer, _ = KINDS[name]
    batches = batches_of(32, 8)
    more: dict[str, Any] = {"schedule": schedule, "micro_batches": 4}
    assert_same(
        run([make(), TwoVersions()], optimizer, batches, **more),
        run([], optimizer, batches, **more),
    )


@pytest.mark.parametrize("name", list(KINDS))
def test_each_does_something_where_something_is_late(name: str) -> None:
    """Or the tests above would show nothing."""
    make, optimizer, policy = KINDS[name]
    batches = batches_of(40, 5)
    more: dict[str, Any] = {"rule": Delayed(policy)}
    got, plain = run([make()], optimizer, batches, **more), run([], optimizer, batches, **more)
    assert (got["0.weight"] - plain["0.weight"]).abs().max() > 1e-7


@pytest.mark.parametrize("name", list(KINDS))
def test_the_users_own_object_is_not_changed(name: str) -> None:
    """A second pipeline with the same object begins anew."""
    make, optimizer, policy = KINDS[name]
    correction, batches = make(), batches_of(30, 5)
    first = run([correction], optimizer, batches, rule=Delayed(policy))
    assert_same(run([correction], optimizer, batches, rule=Delayed(policy)), first)


# In order ---------------------------------------------------------------------------------------


class GappedAndSpiked(Gapped, Spiked):
    """The gradient is dampened as it comes; the spike is made of what is accumulated."""

    def step(self, g: float, age: float) -> None:
        Spiked.step(self, g, age)
        moved = (self.before - self.value) / self.group["lr"]
        self.squares = self.decay * self.squares + (1 - self.decay) * moved**2
        self.highest = max(self.highest, self.group["lr"])
        self.moves += 1


@pytest.mark.parametrize("slack", [0, 2])
@pytest.mark.parametrize("order", [[0, 1], [1, 0]], ids=["gap first", "spike first"])
def test_gap_aware_and_spike_compensation(order: Sequence[int], slack: int) -> None:
    """What the gap is measured by is what updates do, spikes included, in either order."""
    batches, make = numbers([4] * 20), partial(SGD, lr=0.005, momentum=0.9)
    both: list[Correction] = [GapAware(), SpikeCompensation()]
    expected = by_hand(batches, 2 + 2 * slack, GappedAndSpiked(0.5, make), Weight(1.5, make))
    got = in_a_pipeline([both[j] for j in order], make, batches, slack=slack)
    assert got == pytest.approx(expected, rel=1e-9)


class SpikedAndAnnealed(Annealed, Spiked):
    def factor(self, age: int) -> float:
        return super().factor(age) * math.sqrt(inverse(age))


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 0, 2]])
def test_spike_compensation_and_two_factors(order: Sequence[int]) -> None:
    """The factors are multiplied; the spike is made at the rate that they leave."""
    batches, make = numbers([4] * 20), partial(SGD, lr=0.02, momentum=0.9, weight_decay=0.1)
    all_of: list[Correction] = [
        SpikeCompensation(), PipeMareT1(8), LearningRate(lambda age: math.sqrt(inverse(age)))
    ]  # fmt: skip
    expected = by_hand(batches, 4, SpikedAndAnnealed(0.5, make), Weight(1.5, make))
    got = in_a_pipeline([all_of[j] for j in order], make, batches, slack=1)
    assert got == pytest.approx(expected, rel=1e-12)


class GappedAfter(Gapped):
    """Delay-compensated, and then dampened; or the other way round."""

    compensates_first = True

    def corrected(self, g: float, then: float, age: int) -> float:
        if self.compensates_first:
            return super().corrected(g + 2.0 * g * g * (self.value - then), then, age)
        g = super().corrected(g, then, age)
        return g + 2.0 * g * g * (self.value - then)


def test_two_changes_of_the_gradient_go_in_order() -> None:
    batches, make = numbers([4] * 20), partial(SGD, lr=0.02, momentum=0.9)
    results = []
    for first in (True, False):
        kind = type("Both", (GappedAfter,), {"compensates_first": first})
        expected = by_hand(batches, 2, kind(0.5, make), Weight(1.5, make))
        both = [DelayCompensation(2.0), GapAware()]
        got = in_a_pipeline(both if first else both[::-1], make, batches)
        assert got == pytest.approx(expected, rel=1e-9)
        results.append(got)
    assert results[0] != results[1]


def test_pipemare_whole() -> None:
    """T1, T2 and T3: nothing is late for 4 updates; then all three act."""
    batches = batches_of(60, 5)
    more: dict[str, Any] = {"rule": Delayed("current")}
    whole: list[Correction] = [PipeMareT1(30), PipeMareT2(), SynchronousWarmUp(4)]
    states = [
        run([c for k, c in enumerate(whole) if k != left_out], momentum, batches, **more)
        for left_out in (None, 0, 1, 2)
    ]
    for other in states[1:]:
        assert (states[0]["0.weight"] - other["0.weight"]).abs().max() > 1e-7
    assert_same(states[0], run(whole[::-1], momentum, batches, **more))
    early = [run(c, momentum, batches[:5], **more) for c in (whole, [SynchronousWarmUp(4)])]
    assert_same(*early)


@pytest.mark.parametrize("every", [2, 3, 4])
def test_two_versions_with_a_prediction(every: int) -> None:
    """Nothing is more than one update late. What is predicted of a version is a copy of its own.

    Of a version, some forwards are late and some are not: with 3 micro-batches to an update, and
    2 in flight behind a forward, 3 of those are in use at once.
    """
    with Pipeline(
        tanh_net(), MSE, momentum, stages=3, balance=SIZES[3], update_every=every,
        corrections=[TwoVersions(), WeightPrediction()],
    ) as pipe:  # fmt: skip
        pipe.train(batches_of(200, 5))
        rows = pipe.statistics()
        assert [max(row.staleness) for row in rows] == [1, 1, 0]
        assert rows[0].copies == (3 if every == 3 else 2)


# Skipped updates, several optimizers, odd weights and dtypes --------------------------------------


@pytest.mark.parametrize("name", list(KINDS))
def test_what_is_skipped_leaves_no_trace_in_the_corrections(name: str) -> None:
    """Neither NaN nor infinity stays in what they keep, whether it comes first or later."""
    make, optimizer, policy = KINDS[name]
    batches, start = batches_of(70, 5), tanh_net().state_dict()
    for k in (0, 5, 6):
        batches[k] = (batches[k][0], batches[k][1] * (math.nan if k % 2 else math.inf))
    got = run([make()], optimizer, batches, rule=Delayed(policy), on_nonfinite="skip", slack=1)
    assert all(torch.isfinite(value).all() for value in got.values())
    assert all((got[name] - start[name]).abs().max() > 1e-4 for name in got)


@pytest.mark.parametrize("kind", [Spiked, Annealed, Weight], ids=["spike", "T1", "nothing"])
def test_skipped_updates_by_hand(kind: type[Weight]) -> None:
    """Momentum does not move in them; PipeMare's p does."""
    batches, make = numbers([4] * 20), partial(SGD, lr=0.01, momentum=0.9)
    for k in (3, 9, 10):
        batches[k] = (batches[k][0], batches[k][1] * math.nan)
    corrections: dict[type[Weight], list[Correction]] = {
        Spiked: [SpikeCompensation()], Annealed: [PipeMareT1(8)], Weight: []
    }  # fmt: skip
    expected = by_hand(batches, 2, kind(0.5, make), Weight(1.5, make))
    got = in_a_pipeline(corrections[kind], make, batches, on_nonfinite="skip")
    assert got == pytest.approx(expected, rel=1e-12)


def split(optimizer: OptimizerFactory) -> Any:
    def make(params: Sequence[tuple[str, nn.Parameter]]) -> list[Optimizer]:
        weights = [(n, p) for n, p in params if n.endswith("weight")]
        return [optimizer(weights), optimizer([(n, p) for n, p in params if n.endswith("bias")])]

    return make


@pytest.mark.parametrize("name", list(KINDS))
def test_two_optimizers_to_a_stage_are_as_one_bitwise(name: str) -> None:
    make, optimizer, policy = KINDS[name]
    batches, rule = batches_of(40, 5), Delayed(policy)
    got = run([make()], split(optimizer), batches, rule=rule)
    assert_same(got, run([make()], optimizer, batches, rule=rule))


class Odd(nn.Module):
    """Has a frozen weight, and one that takes part in nothing, which has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Parameter(torch.full((5, 5), 0.1, dtype=torch.float64), False)
        self.idle = nn.Parameter(torch.ones(5, 5, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x + x @ self.frozen


def with_odd_weights(odd: bool) -> nn.Sequential:
    model = nn.Sequential(*tanh_net())
    layer = Odd()
    if not odd:
        layer.idle.requires_grad_(False)
    model.insert(0, layer)
    return model


@pytest.mark.parametrize("name", list(KINDS))
def test_weights_without_a_gradient_stay_and_do_not_matter(name: str) -> None:
    make, optimizer, policy = KINDS[name]
    states = []
    for odd in (True, False):
        with Pipeline(
            with_odd_weights(odd), MSE, optimizer, stages=3, balance=[6, 6, 5],
            rule=Delayed(policy), corrections=[make()],
        ) as pipe:  # fmt: skip
            pipe.train(batches_of(40, 5))
            states.append(clone(pipe.state_dict()))
    assert_same(*states)
    assert torch.equal(states[0]["0.idle"], torch.ones(5, 5, dtype=torch.float64))
    assert torch.equal(states[0]["0.frozen"], torch.full((5, 5), 0.1, dtype=torch.float64))


@pytest.mark.parametrize("name", list(KINDS))
def test_a_stage_with_nothing_to_train(name: str) -> None:
    make, optimizer, policy = KINDS[name]
    model = tanh_net()
    model[: SIZES[3][0]].requires_grad_(False)
    with Pipeline(
        model, MSE, optimizer, stages=3, balance=SIZES[3], rule=Delayed(policy),
        corrections=[make()],
    ) as pipe:  # fmt: skip
        pipe.train(batches_of(40, 5))
        got = clone(pipe.state_dict())
    before = tanh_net().state_dict()
    kept = [n for n in before if torch.equal(before[n], got[n])]
    assert kept == [n for n in before if int(n.split(".")[0]) < SIZES[3][0]]


# torch has neither eigh nor qr of bfloat16.
NEAR = {torch.float32: 1e-4, torch.bfloat16: 0.05}


@pytest.mark.parametrize("dtype", list(NEAR))
@pytest.mark.parametrize("name", list(KINDS))
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    """Every weight keeps its own, and comes out near what float64 gives of the same start."""
    make, optimizer, policy = KINDS[name]
    states = []
    start = {n: value.to(dtype) for n, value in tanh_net().state_dict().items()}
    pairs = [(x.to(dtype), y.to(dtype)) for x, y in batches_of(40, 5)]
    for each in (dtype, torch.float64):
        with Pipeline(
            tanh_net(dtype=each), MSE, optimizer, stages=3, balance=SIZES[3],
            rule=Delayed(policy), corrections=[make()],
        ) as pipe:  # fmt: skip
            pipe.load_state_dict({n: value.to(each) for n, value in start.items()})
            pipe.train([(x.to(each), y.to(each)) for x, y in pairs])
            states.append(clone(pipe.state_dict()))
    assert {value.dtype for value in states[0].values()} == {dtype}
    assert all(torch.isfinite(value).all() for value in states[0].values())
    if name != "basis":  # of 5 samples' gradient, most of which is any that rounding makes it
        assert_close(states[0], states[1], NEAR[dtype])


@pytest.mark.parametrize("name", list(KINDS))
def test_weights_are_loaded_in_the_middle(name: str) -> None:
    """What the corrections know of before does no harm: training goes on near what was loaded."""
    make, optimizer, policy = KINDS[name]
    loaded = tanh_net(9).state_dict()
    with Pipeline(
        tanh_net(), MSE, optimizer, stages=3, balance=SIZES[3], rule=Delayed(policy),
        corrections=[make()],
    ) as pipe:  # fmt: skip
        pipe.train(batches_of(40, 5))
        pipe.load_state_dict(loaded)
        assert_same(pipe.state_dict(), loaded)
        pipe.train(batches_of(15, 5))
        got = pipe.state_dict()
    assert max((got[n] - loaded[n]).abs().max().item() for n in got) < 0.2


# What is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("correction", "optimizer", "told"),
    [
        (SpikeCompensation(), adamw, r"is AdamW: write .*, or weight_prediction, which"),
        (SpikeCompensation(), NAdam, r"is NAdam: write .*, or weight_prediction, which"),
        (SpikeCompensation(), sgd, r"SGD .*: write .*a momentum above 0, or"),
        (SpikeCompensation(), nesterov_at(0.1), r"leave nesterov and dampening out of SGD's arg"),
        (
            SpikeCompensation(),
            partial(SGD, lr=0.1, momentum=0.9, dampening=0.1),
            r"leave nesterov and dampening out of SGD's arguments",
        ),
        (AsynchronousNesterov(), adamw, r"is AdamW.*: write optimizer NAdam with betas \[0.99, 0"),
        (AsynchronousNesterov(), Adam, r"is Adam.*: write optimizer NAdam.* or SGD with momentum"),
        (
            AsynchronousNesterov(),
            sgd,
            r"is SGD.*: write optimizer NAdam .* or SGD with momentum 0.9",
        ),
        (
            AsynchronousNesterov(),
            partial(SGD, lr=0.1, momentum=0.9, dampening=0.1),
            r"no dampening: leave it out of SGD's arguments",
        ),
        (BasisRotation(), momentum, r"defined for Adam, AdamW and NAdam, and this is SGD: write"),
        (BasisRotation(), torch.optim.RMSprop, r"this is RMSprop: write one of them"),
        (BasisRotation(), partial(Adam, weight_decay=0.1), r"write AdamW, or decoupled_weight_d"),
        (BasisRotation(), partial(NAdam, weight_decay=0.1), r"write AdamW, or decoupled_weight_d"),
        (BasisRotation(), partial(AdamW, amsgrad=True), r"leave amsgrad out"),
    ],
)
def test_optimizers_that_a_correction_is_not_defined_for(
    correction: Correction, optimizer: OptimizerFactory, told: str
) -> None:
    """Each says what to write instead; of two optimizers to a stage as well as of one."""
    with pytest.raises(InputError, match=told):
        run([correction], optimizer, batches_of(10, 5))
    with pytest.raises(InputError, match=told):
        run([correction], split(optimizer), batches_of(10, 5))


@pytest.mark.parametrize(
    "optimizer",
    [
        partial(NAdam, weight_decay=0.1, decoupled_weight_decay=True),
        partial(AdamW, weight_decay=0.1),
        NAdam,
        Adam,
    ],
)
def test_optimizers_that_a_basis_is_rotated_for(optimizer: OptimizerFactory) -> None:
    got = run([BasisRotation()], optimizer, batches_of(30, 5))
    assert all(torch.isfinite(value).all() for value in got.values())


def test_groups_of_different_momenta_have_no_one_look_ahead() -> None:
    def two(params: Sequence[tuple[str, nn.Parameter]]) -> Optimizer:
        return SGD(
            [{"params": params[:1], "momentum": 0.9}, {"params": params[1:], "momentum": 0.5}],
            lr=0.1,
        )

    with pytest.raises(InputError, match=r"is SGD with one momentum above 0"):
        run([AsynchronousNesterov()], two, batches_of(10, 5))


@pytest.mark.parametrize("order", [1, -1])
def test_nesterovs_momentum_and_its_spike_are_refused_in_either_order(order: int) -> None:
    """Asynchronous Nesterov makes the momentum Nesterov's, which a spike takes the place of."""
    corrections = [AsynchronousNesterov(), SpikeCompensation()][::order]
    with pytest.raises((InputError, ValueError), match=r"[Nn]esterov"):
        run(corrections, momentum, batches_of(10, 5))


def test_nadam_of_little_momentum_does_not_look_ahead() -> None:
    """What is asked of it is a momentum of 0.9 at least."""
    with pytest.raises(InputError, match=r"NAdam"):
        run([AsynchronousNesterov()], partial(NAdam, betas=(0.5, 0.999)), batches_of(10, 5))


@pytest.mark.parametrize("policy", ["stash", "replay", "predict"])
def test_t2_where_weights_are_kept_is_refused(policy: str) -> None:
    with pytest.raises(ValueError, match=r"a PipeMareT2, .*write rule=Delayed\(weights='current'"):
        run([PipeMareT2()], momentum, [], rule=Delayed(policy))
    with pytest.raises(ValueError, match=r"a PipeMareT2"):
        run([PipeMareT2()], momentum, [], rule=[Delayed("current"), Delayed(policy), Delayed()])


@pytest.mark.parametrize("policy", ["current", "replay"])
def test_gap_aware_without_the_weights_of_then_is_refused(policy: str) -> None:
    with pytest.raises(ValueError, match=r"a GapAware, .*write rule=Delayed\(weights='stash'"):
        run([GapAware()], momentum, [], rule=Delayed(policy))


def test_the_same_twice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"has pipemare_t2 and pipemare_t2, which are the same"):
        run([PipeMareT2(), PipeMareT2()], momentum, [], rule=Delayed("current"))


@pytest.mark.parametrize("more", [{"compile": True}, {"autocast": torch.bfloat16}])
def test_t2_where_a_backward_has_copies_is_refused(more: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"pipemare_t2: .*leave one of the two out"):
        run([PipeMareT2()], momentum, [], rule=Delayed("current"), **more)


@pytest.mark.parametrize(
    ("kind", "arguments", "told"),
    [
        *(
            (PipeMareT1, (v,), r"over=.*: give a number of updates")
            for v in (0, -1, 2.5, True, "a")
        ),
        *(
            (PipeMareT2, (v,), r"decay=.*: give a number between 0")
            for v in (0, 1, -0.1, "a", None)
        ),
        *((SynchronousWarmUp, (v,), r"updates=.*: give a number of") for v in (0, -1, 0.5, True)),
        *((GapAware, (v,), r"decay=.*: give a number from 0 to") for v in (1, -0.1, math.nan, "a")),
        *((GapAware, (0.9, v), r"eps=.*: give a number above 0") for v in (0, -1, math.nan, "a")),
        *((BasisRotation, (v,), r"decay=.*: give a number from 0") for v in (1, -1, math.nan, "a")),
        *((BasisRotation, (0.9, v), r"refresh=.*: give a whole num") for v in (0, 1.5, True, "a")),
        *((BasisRotation, (0.9, 1, v), r"largest=.*: give a whole") for v in (0, 1.5, True, None)),
    ],
)
def test_numbers_that_are_refused(kind: Any, arguments: tuple[Any, ...], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        kind(*arguments)


@pytest.mark.parametrize("kind", [PipeMareT1, SynchronousWarmUp])
def test_how_long_is_for_the_user_to_say(kind: Any) -> None:
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        kind()
