"""What is done about staleness beyond prediction: functions by hand, and at work in a pipeline.

The oracles are `by_hand`, whose numbers subclasses of `Weight` move by the papers' formulas, loops
over numbers, and `simulate`.
"""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer

from headrace.pipeline import Pipeline
from headrace.pipeline.batch_size import Steps
from headrace.pipeline.corrections import (
    AsynchronousNesterov,
    BasisRotation,
    GapAware,
    LearningRate,
    PipeMareT1,
    PipeMareT2,
    SpikeCompensation,
    SynchronousWarmUp,
    TwoVersions,
    WeightPrediction,
)
from headrace.pipeline.corrections.basis_rotation import (
    follow_product,
    refine,
    rotate,
    rotate_back,
)
from headrace.pipeline.corrections.gap_aware import dampen, follow_squares
from headrace.pipeline.corrections.pipemare_t1 import annealed
from headrace.pipeline.corrections.pipemare_t2 import follow, look_back
from headrace.pipeline.corrections.spike_compensation import direction
from headrace.pipeline.errors import InputError
from headrace.pipeline.rules import Delayed

from .alone import MSE
from .helpers import SIZES, adamw, assert_close, batches_of, clone, momentum, tanh_net
from .simulator import Batch, OptimizerFactory, cut, depths_of, simulate
from .test_corrections import Scale, g, half_square, numbers, run, three_stages
from .two_weights import Weight, by_hand, in_a_pipeline

# Each function by hand --------------------------------------------------------------------------


def test_the_direction_of_a_spike_by_hand() -> None:
    """m = 1/2, τ = 3: a = 1/8, b = (7/8) / (1/2) = 1 + 1/2 + 1/4; 1/8 · 16 + 7/4 · 4 = 9."""
    v, gradient = g(16), g(4)
    assert direction(v, gradient, 0.5, 3).tolist() == [9]
    assert direction(v, gradient, 0.5, 0).tolist() == [16], "plain momentum"
    assert direction(v, gradient, 0.5, 1).tolist() == [12], "Nesterov's m v + g"
    assert direction(v, gradient, 0.5, 1.5).item() == pytest.approx(
        16 * 0.5**1.5 + 4 * (1 - 0.5**1.5) / 0.5, rel=1e-15
    )
    assert (v.tolist(), gradient.tolist()) == ([16], [4])
    odd = torch.randn(2, 100, generator=torch.Generator().manual_seed(0))
    assert torch.equal(direction(*odd, 0.9, 1), odd[1].add(odd[0], alpha=0.9)), "as torch has it"


def test_the_spike_is_what_momentum_would_have_made_of_the_gradient() -> None:
    """From then on it moves a weight as far as it would have, had it come τ updates earlier."""
    m, updates = 0.9, 400
    for age in (0, 1, 4):
        v, moved = torch.zeros(1, dtype=torch.float64), 0.0
        for update in range(updates):
            gradient = g(1.0 if update == age else 0.0)
            v = m * v + gradient
            moved += direction(v, gradient, m, age).item()
        assert moved == pytest.approx(1 / (1 - m), rel=1e-12)


def test_annealed_by_hand() -> None:
    """p is 1, 3/4, 1/2, 1/4, 0: of τ = 16 that is 1/16, 1/8, 1/4, 1/2, 1, and 1 from then on."""
    assert [annealed(16, t, 4) for t in range(7)] == [1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 1, 1]
    assert [annealed(age, 0, 4) for age in (0, 1, 2, 5)] == [1, 1, 0.5, 0.2]
    assert annealed(7, 0, 1) == 1 / 7 and annealed(7, 1, 1) == 1


def test_the_drift_by_hand() -> None:
    """γ = 3/4: 3/4 · 8 + 1/4 (5 - 1) = 7. And 5 - 2 · 7 = -9."""
    drift, now, before = g(8), g(5), g(1)
    assert follow(drift, now, before, 0.75).tolist() == [7]
    assert follow(drift, now, before, 0.0).tolist() == [4]
    assert look_back(now, g(7), 2).tolist() == [-9]
    assert look_back(now, g(7), 0).tolist() == [5]
    assert (drift.tolist(), now.tolist(), before.tolist()) == ([8], [5], [1])


def test_a_steady_drift_looks_back_to_where_the_weight_was() -> None:
    drift, weight = g(0), g(10)
    for _ in range(200):
        weight, before = weight - 0.25, weight
        drift = follow(drift, weight, before, 0.5)
    assert look_back(weight, drift, 6).item() == pytest.approx(weight.item() + 6 * 0.25, rel=1e-14)


def test_dampening_by_hand() -> None:
    """6 / (1 + |5 - 3| / 2) = 3, -8 / (1 + |1 - 4| / 1) = -2, and of what has not moved all."""
    gradient, now, then, usual = g(6, -8, 0.1), g(5, 1, 7), g(3, 4, 7), g(2, 1, 1e-9)
    assert dampen(gradient, now, then, usual).tolist() == [3, -2, 0.1]
    assert gradient.tolist() == [6, -8, 0.1]
    assert not dampen(gradient, now.requires_grad_(), then.requires_grad_(), usual).requires_grad


def test_dampening_of_a_sparse_gradient_by_hand() -> None:
    """Rows 2, 0 and 2 again, over 1 + |6 - 3| / 3 = 2 and 1 + |5 - 2| / 1 = 4; as they lie."""
    values = torch.tensor([[8.0], [6.0], [4.0]])
    gradient = torch.sparse_coo_tensor([[2, 0, 2]], values, (3, 1), check_invariants=True)
    now, then, usual = g(6, 7, 5)[:, None], g(3, 9, 2)[:, None], g(3, 1, 1)[:, None]
    got = dampen(gradient, now, then, usual)
    assert got._values().tolist() == [[2], [3], [1]] and got.dtype == torch.float32
    assert got.to_dense().tolist() == [[3], [0], [3]]


def test_the_squares_by_hand() -> None:
    """3/4 · 8 + 1/4 · 6² = 15, element by element."""
    ra, v = g(8, 4), g(6, 0)
    assert follow_squares(ra, v, 0.75).tolist() == [15, 3]
    assert (ra.tolist(), v.tolist()) == ([8, 4], [6, 0])


def test_the_basis_is_the_eigenvectors_the_largest_first() -> None:
    turn = torch.linalg.qr(
        torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ).Q
    eye, values = torch.eye(4, dtype=torch.float64), g(4, 3, 2, 1)
    average = turn @ torch.diag(values) @ turn.T
    basis = refine(average, None)
    torch.testing.assert_close(basis.T @ basis, eye, rtol=0, atol=1e-14)
    torch.testing.assert_close((basis.T @ turn).abs(), eye, rtol=0, atol=1e-13)
    # From a basis a little off, each step comes nearer, and every vector keeps its place.
    off = torch.linalg.qr(basis + 0.05 * torch.ones(4, 4, dtype=torch.float64)).Q
    errors = []
    for _ in range(60):
        off = refine(average, off)
        torch.testing.assert_close(off.T @ off, eye, rtol=0, atol=1e-14)
        errors.append(((off.T @ turn).abs() - eye).abs().max().item())
    assert errors[0] > errors[5] > errors[20] and errors[-1] < 1e-6


def test_rotation_there_and_back() -> None:
    """In the basis of its own products a matrix is diagonal: its singular values."""
    matrix = torch.randn(3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    left, right = refine(matrix @ matrix.T, None), refine(matrix.T @ matrix, None)
    turned = rotate(matrix, left, right)
    expected = torch.zeros(3, 5, dtype=torch.float64)
    expected[:, :3] = torch.diag(torch.linalg.svdvals(matrix))
    torch.testing.assert_close(turned.abs(), expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(rotate_back(turned, left, right), matrix, rtol=0, atol=1e-14)
    assert follow_product(g(8), g(4), 0.75).tolist() == [7]


# Spike compensation -----------------------------------------------------------------------------


class Spiked(Weight):
    """w ← w - η (a v + b g), v ← m v + g, with g + λ w for g: no optimizer at all."""

    v = 0.0

    def step(self, g: float, age: float) -> None:
        m = self.group["momentum"]
        g += self.group["weight_decay"] * self.value
        self.v = m * self.v + g
        a = m**age
        with torch.no_grad():
            self.parameter -= self.group["lr"] * (a * self.v + (1 - a) / (1 - m) * g)


@pytest.mark.parametrize("slack", [0, 2])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_spike_compensation_by_hand(decay: float, slack: int) -> None:
    batches, make = numbers([4] * 25), partial(SGD, lr=0.005, momentum=0.9, weight_decay=decay)
    expected = by_hand(batches, 2 + 2 * slack, Spiked(0.5, make), Weight(1.5, make))
    got = in_a_pipeline([SpikeCompensation()], make, batches, slack=slack)
    assert got == pytest.approx(expected, rel=1e-12)
    assert abs(got[0] - in_a_pipeline([], make, batches, slack=slack)[0]) > 1e-5
    up = partial(SGD, lr=0.005, momentum=0.9, weight_decay=-decay, maximize=True)
    if not decay:  # torch refuses a negative one
        with Pipeline(
            three_stages(0.5, Scale(1.5)), lambda o, t: -half_square(o, t), up, stages=3,
            balance=[1, 1, 1], slack=slack, corrections=[SpikeCompensation()],
        ) as pipe:  # fmt: skip
            pipe.train(batches)
            assert pipe.state_dict()["0.w"].item() == got[0]


@pytest.mark.parametrize("every", [2, 3])
def test_the_spike_of_several_micro_batches_has_their_mean_age(every: int) -> None:
    batches, make = numbers([3, 1, 2] * 8), partial(SGD, lr=0.01, momentum=0.9)
    expected = by_hand(batches, 4, Spiked(0.5, make), Weight(1.5, make), every)
    got = in_a_pipeline([SpikeCompensation()], make, batches, slack=1, update_every=every)
    assert got == pytest.approx(expected, rel=1e-12)


class NesterovFromThen(SGD):
    """torch's own, but for the first update, which is never late."""

    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            group["nesterov"] = True


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_spike_of_one_update_is_nesterovs_bitwise(decay: float, dtype: torch.dtype) -> None:
    """On the last stage but one, with nothing else to train."""

    def middle() -> nn.Sequential:
        model, (first, second, _) = tanh_net(dtype=dtype), SIZES[3]
        model[:first].requires_grad_(False)
        model[first + second :].requires_grad_(False)
        return model

    states = []
    for kind, corrections in ((SGD, [SpikeCompensation()]), (NesterovFromThen, []), (SGD, [])):
        make = partial(kind, lr=0.05, momentum=0.9, weight_decay=decay)
        with Pipeline(
            middle(), MSE, make, stages=3, balance=SIZES[3], corrections=corrections
        ) as pipe:
            pipe.train(batches_of(60, 5, dtype=dtype))
            states.append(clone(pipe.state_dict()))
            assert pipe.statistics()[1].staleness == {0: 1, 1: 11}
    spike, nesterov, plain = states
    assert all(torch.equal(spike[name], nesterov[name]) for name in spike)
    assert not all(torch.equal(spike[name], plain[name]) for name in spike)


# PipeMare ---------------------------------------------------------------------------------------


class Annealed(Weight):
    """η / τ^p."""

    over = 8

    def factor(self, age: int) -> float:
        return float(max(1, age) ** -(1 - min(self.updates / self.over, 1)))


T1_OPTIMIZERS: dict[str, OptimizerFactory] = {
    "SGD": partial(SGD, lr=0.02, momentum=0.9),
    "Adam": partial(Adam, lr=0.02),
    "AdamW": partial(AdamW, lr=0.02, weight_decay=0.5),
    "NAdam": partial(NAdam, lr=0.02),
    "RMSprop": partial(torch.optim.RMSprop, lr=0.02),
    "Adagrad": partial(torch.optim.Adagrad, lr=0.02),
}


@pytest.mark.parametrize("slack", [0, 2])
@pytest.mark.parametrize("name", list(T1_OPTIMIZERS))
def test_t1_by_hand(name: str, slack: int) -> None:
    """With every optimizer: the rate of an update, whatever it makes of it."""
    batches, make = numbers([4] * 16), T1_OPTIMIZERS[name]
    expected = by_hand(batches, 2 + 2 * slack, Annealed(0.5, make), Weight(1.5, make))
    got = in_a_pipeline([PipeMareT1(8)], make, batches, slack=slack)
    assert got == pytest.approx(expected, rel=1e-12)
    assert abs(got[0] - in_a_pipeline([], make, batches, slack=slack)[0]) > 1e-6


def test_t1_weighs_each_micro_batch_of_an_update_by_its_age() -> None:
    batches, make = numbers([3, 1] * 12), partial(SGD, lr=0.05, momentum=0.9)
    expected = by_hand(batches, 4, Annealed(0.5, make), Weight(1.5, make), 2)
    got = in_a_pipeline([PipeMareT1(8)], make, batches, slack=1, update_every=2)
    assert got == pytest.approx(expected, rel=1e-12)


def bent(batches: Sequence[Batch], depth: int, eta: float, decay: float) -> list[float]:
    """output = v (b tanh(a x)): a and b at the first stage, whose backward has a's old activation.

    db = δ tanh(a_then x) has no weight in it; da = δ b' (1 - tanh²(a_then x)) x has b' = b - τ d,
    d the average of what an update does to b. decay = None is the newest b, 'current' by itself.
    """
    a, b, v, drift = 0.7, 0.5, 1.5, 0.0
    gamma = decay ** (1 / depth)
    past = [(a, b)]
    for k, (x, y) in enumerate(batches):
        version = max(0, k - depth)
        a_then, b_then = past[version]
        t = torch.tanh(a_then * x)
        error = v * b_then * t - y
        back = b - (k - version) * drift
        da = float((error * v * back * (1 - t * t) * x).mean())
        db, dv = float((error * v * t).mean()), float((error * b_then * t).mean())
        a, b, v, b_before = a - eta * da, b - eta * db, v - eta * dv, b
        drift = gamma * drift + (1 - gamma) * (b - b_before)
        past.append((a, b))
    return [a, b, v]


@pytest.mark.parametrize("slack", [0, 2])
@pytest.mark.parametrize("decay", [0.135, 0.5])
def test_t2_by_hand(decay: float, slack: int) -> None:
    batches, eta, depth = numbers([4] * 25), 0.2, 2 + 2 * slack
    results = []
    for corrections in ([PipeMareT2(decay)], []):
        model = nn.Sequential(Scale(0.7), nn.Tanh(), Scale(0.5), nn.Identity(), Scale(1.5))
        with Pipeline(
            model, half_square, partial(SGD, lr=eta), stages=3, balance=[3, 1, 1], slack=slack,
            rule=Delayed("current"), corrections=corrections,
        ) as pipe:  # fmt: skip
            pipe.train(batches)
            state = pipe.state_dict()
            results.append([state[f"{j}.w"].item() for j in (0, 2, 4)])
            assert all(row.copies == 0 for row in pipe.statistics())
    assert results[0] == pytest.approx(bent(batches, depth, eta, decay), rel=1e-12)
    assert abs(results[0][0] - results[1][0]) > 1e-6, "the estimate must act"


def test_t2_under_a_steady_drift_has_the_weights_of_the_forward() -> None:
    """A gradient that never changes: then what stands in is what 'stash' has kept."""

    def linear(output: Tensor, target: Tensor) -> Tensor:
        return output.mean()

    class Steady(SGD):
        """Moves every weight by the same, whatever its gradient."""

        def step(self, closure: Any = None) -> None:
            for p in self.param_groups[0]["params"]:
                p.data.sub_(0.01)

    seen: list[list[float]] = []

    class Watched(nn.Module):
        """w x; notes the w that its backward multiplies by."""

        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            y = self.w * x
            if x.requires_grad:
                x.register_hook(lambda gradient: seen[-1].append(float(gradient.sum())))
            return y

    for policy, corrections in (("stash", []), ("current", [PipeMareT2(0.01)]), ("current", [])):
        seen.append([])
        model = nn.Sequential(Scale(0.7), Watched(), nn.Identity(), nn.Identity())
        with Pipeline(
            model, linear, Steady, stages=3, balance=[2, 1, 1], slack=1, rule=Delayed(policy),
            corrections=corrections,
        ) as pipe:  # fmt: skip
            pipe.train(numbers([1] * 40))
    stash, stood_in, current = seen
    assert len(stash) == 40
    assert stood_in[-5:] == pytest.approx(stash[-5:], rel=1e-6)
    assert abs(current[-1] - stash[-1]) == pytest.approx(4 * 0.01, rel=1e-9)


# It took as many updates for the delay as there were micro-batches in flight.
def test_t2_beside_a_batch_size_in_samples_is_refused() -> None:
    growth = Steps([8, 16], at=[1])
    with pytest.raises(InputError, match=r"batch_size= is in samples: write update_every= in"):
        run([PipeMareT2()], momentum, [], rule=Delayed("current"), batch_size=growth)


def test_t2_of_a_stage_that_slack_auto_deepens() -> None:
    """D = 1/8 and 3 in flight: γ = 1/2, and an update of 1 makes δ = 1/2; of 1 in flight 7/8."""
    settings = SimpleNamespace(batch_size=None, update_every=1)
    weights = {"w": torch.ones(1)}
    stage: Any = SimpleNamespace(
        depth=1, recopies_weights=False, settings=settings, trainable=weights
    )
    t2 = PipeMareT2(1 / 8)
    t2.attach(stage)
    stage.depth = 3
    t2.after_update({"w": torch.zeros(1)}, {})
    looked_back = t2.backward_weights(1)
    assert looked_back is not None and looked_back["w"].item() == pytest.approx(1 / 2)


def test_the_stand_in_leaves_the_weights_in_place() -> None:
    """An update moves the weights themselves, not the estimates: with a rate of 0 nothing does."""
    batches = batches_of(40, 5)

    def stops(optimizer: Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: float(k < 6))

    more: dict[str, Any] = {"rule": Delayed("current"), "scheduler": stops}
    long = run([PipeMareT2()], momentum, batches, **more)
    short = run([PipeMareT2()], momentum, batches[:6], **more)
    assert all(torch.equal(long[name], short[name]) for name in long)


@pytest.mark.parametrize("slack", [0, 2])
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("updates", [1, 4])
def test_nothing_is_late_in_a_synchronous_warm_up(updates: int, every: int, slack: int) -> None:
    """Then as after a drain: the oracle has one at each of the first updates."""
    batches, depths = batches_of(120, 5), depths_of(3, slack)
    with Pipeline(
        tanh_net(), MSE, adamw, stages=3, balance=SIZES[3], slack=slack, update_every=every,
        corrections=[SynchronousWarmUp(updates)],
    ) as pipe:  # fmt: skip
        pipe.train(batches[: updates * every])
        early = [dict(row.staleness) for row in pipe.statistics()]
        assert early == [{0: updates * every}] * 3
        pipe.train(batches[updates * every :])
        got, rows = clone(pipe.state_dict()), pipe.statistics()
    expected = simulate(
        cut(tanh_net(), SIZES[3]), MSE, adamw, batches, depths=depths, update_every=every,
        drains=[every * k for k in range(1, updates + 1)],
    )  # fmt: skip
    assert_close(got, expected.weights)
    assert [row.staleness for row in rows] == [dict(Counter(ages)) for ages in expected.staleness]
    assert max(rows[0].staleness) == -(-depths[0] // every)


def test_a_synchronous_warm_up_for_all_of_the_training_is_plain() -> None:
    batches = batches_of(40, 5)
    for every in (1, 2):
        got = run([SynchronousWarmUp(100)], momentum, batches, update_every=every)
        expected = simulate(
            cut(tanh_net(), SIZES[3]), MSE, momentum, batches, depths=[0, 0, 0], update_every=every
        ).weights
        assert_close(got, expected, 1e-13)


# Gap-aware --------------------------------------------------------------------------------------


class Gapped(Weight):
    """g / (1 + |now - then| / C), C = η_max (√(RA / (1 - Γ^t)) + ε)."""

    decay, eps, squares, moves, highest = 0.999, 1e-8, 0.0, 0, 0.0

    def corrected(self, g: float, then: float, age: int) -> float:
        if not self.moves:
            return g
        usual = math.sqrt(self.squares / (1 - self.decay**self.moves)) + self.eps
        return g / (1 + abs(self.value - then) / (self.highest * usual))

    def step(self, g: float, age: float) -> None:
        super().step(g, age)
        v = (self.before - self.value) / self.group["lr"]
        if isinstance(self.optimizer, SGD) and not self.group["nesterov"]:
            assert v == pytest.approx(float(self.state["momentum_buffer"]), rel=1e-9)
            v = float(self.state["momentum_buffer"])
        self.squares = self.decay * self.squares + (1 - self.decay) * v * v
        self.highest = max(self.highest, self.group["lr"])
        self.moves += 1


GAP_OPTIMIZERS: dict[str, OptimizerFactory] = {
    "SGD": partial(SGD, lr=0.02, momentum=0.9),
    "Nesterov": partial(SGD, lr=0.02, momentum=0.9, nesterov=True),
    "Adam": partial(Adam, lr=0.02),
    "AdamW": partial(AdamW, lr=0.02, weight_decay=0.5),
    "NAdam": partial(NAdam, lr=0.02),
}


def rising(k: int) -> float:
    """Up to update 6, then down: η_max is not the rate of by now."""
    return (k + 1) / 7 if k < 7 else 7 / (k + 1)


@pytest.mark.parametrize("slack", [0, 2])
@pytest.mark.parametrize("name", list(GAP_OPTIMIZERS))
@pytest.mark.parametrize("schedule", [lambda k: 1.0, rising], ids=["constant", "rising"])
def test_gap_aware_by_hand(schedule: Any, name: str, slack: int) -> None:
    batches, make = numbers([4] * 20), GAP_OPTIMIZERS[name]
    u, v = Gapped(0.5, make, schedule), Weight(1.5, make, schedule)
    expected = by_hand(batches, 2 + 2 * slack, u, v)
    more: dict[str, Any] = {
        "slack": slack,
        "scheduler": partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=schedule),
    }
    got = in_a_pipeline([GapAware()], make, batches, **more)
    assert got == pytest.approx(expected, rel=1e-9)  # v is a difference of weights there
    assert abs(got[0] - in_a_pipeline([], make, batches, **more)[0]) > 1e-6


def test_gap_aware_with_other_numbers_and_several_micro_batches() -> None:
    batches, make = numbers([3, 1, 2] * 10), GAP_OPTIMIZERS["SGD"]
    kind = type("Short", (Gapped,), {"decay": 0.5, "eps": 0.1})
    expected = by_hand(batches, 4, kind(0.5, make), Weight(1.5, make), 3)
    got = in_a_pipeline([GapAware(0.5, 0.1)], make, batches, slack=1, update_every=3)
    assert got == pytest.approx(expected, rel=1e-9)


def test_gap_aware_after_skipped_updates() -> None:
    """They count for nothing: not in RA, and not in t."""
    batches, make = numbers([4] * 20), GAP_OPTIMIZERS["SGD"]
    for k in (0, 7, 8):
        batches[k] = (batches[k][0], batches[k][1] * math.nan)
    expected = by_hand(batches, 2, Gapped(0.5, make), Weight(1.5, make))
    got = in_a_pipeline([GapAware()], make, batches, on_nonfinite="skip")
    assert got == pytest.approx(expected, rel=1e-9)


# With η_max that of all groups the others would hardly be dampened.
def test_the_usual_update_of_a_group_is_by_its_own_rate() -> None:
    """A weight is dampened alike, whatever the rate of the weights beside it."""

    def beside(rate: float) -> Any:
        def make(params: Sequence[tuple[str, nn.Parameter]]) -> Optimizer:
            groups = [{"params": [p], "lr": rate if n == "1.w" else 0.02} for n, p in params]
            return SGD(groups, momentum=0.9)

        return make

    class Still(nn.Module):
        """A weight whose gradient is 0."""

        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return x + 0 * self.w

    results = []
    for rate in (0.02, 20.0):
        model = nn.Sequential(Scale(0.5), Still(), nn.Identity(), Scale(1.5))
        with Pipeline(
            model, half_square, beside(rate), stages=3, balance=[2, 1, 1],
            corrections=[GapAware()],
        ) as pipe:  # fmt: skip
            pipe.train(numbers([4] * 20))
            results.append(pipe.state_dict()["0.w"].item())
    assert results[1] == pytest.approx(results[0], rel=1e-12)


def test_gap_aware_where_a_weight_has_not_been_moved_yet() -> None:
    """Its C is 0 then: a group at a rate of 0 at first, and weights that no optimizer has."""

    def make(params: Sequence[tuple[str, nn.Parameter]]) -> Optimizer:
        weights = [p for n, p in params if n.endswith("weight")]
        biases = [p for n, p in params if n.endswith("bias") and not n.startswith("2.")]
        return SGD([{"params": weights}, {"params": biases}], lr=0.05, momentum=0.9)

    later = [lambda k: 1.0, lambda k: float(k >= 4)]
    got = run(
        [GapAware()], make, batches_of(50, 5), clip_grad_norm=1.0,
        scheduler=partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=later),
    )  # fmt: skip
    start = tanh_net().state_dict()
    assert all(torch.isfinite(value).all() for value in got.values())
    assert [name for name in got if torch.equal(got[name], start[name])] == ["2.bias"]


# Two versions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("slack", [0, 1])
@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("more", [0, 2])
def test_two_versions_are_two_versions(more: int, stages: int, slack: int) -> None:
    """Staleness 1 at most, two copies at most; averaged, clipped and applied once."""
    depths = depths_of(stages, slack)
    every = depths[0] + more
    batches = batches_of(2 * every * 4, 2)
    with Pipeline(
        tanh_net(), MSE, momentum, stages=stages, balance=SIZES[stages], slack=slack,
        update_every=every, clip_grad_norm=0.1, corrections=[TwoVersions()],
    ) as pipe:  # fmt: skip
        pipe.train(batches)
        rows, got = pipe.statistics(), clone(pipe.state_dict())
    assert all(max(row.staleness) <= 1 and row.copies <= 2 for row in rows)
    assert rows[0].staleness == {0: every + 3 * more, 1: 3 * depths[0]}
    assert [row.updates for row in rows] == [4] * stages
    expected = simulate(
        cut(tanh_net(), SIZES[stages]), MSE, momentum, batches, depths=depths,
        update_every=every, clip=0.1,
    ).weights  # fmt: skip
    assert_close(got, expected)


@pytest.mark.parametrize("slack", [0, 1])
def test_two_versions_with_too_few_micro_batches_to_an_update(slack: int) -> None:
    depth = depths_of(3, slack)[0]
    with pytest.raises(ValueError, match=rf"write update_every={depth} or more, not {depth - 1}"):
        run([TwoVersions()], momentum, [], slack=slack, update_every=depth - 1)


def test_two_versions_beside_a_batch_size_in_samples() -> None:
    """How many micro-batches it has is not known; where one is enough, it does not matter."""
    with pytest.raises(ValueError, match=r"batch_size= is in samples: .*write update_every=2 in"):
        run([TwoVersions()], momentum, [], batch_size=Steps([8, 16], at=[1]))
    with Pipeline(
        tanh_net(), MSE, momentum, stages=2, balance=SIZES[2], corrections=[TwoVersions()],
        batch_size=Steps([2, 4], at=[1]),
    ) as pipe:  # fmt: skip
        pipe.train(batches_of(8, 2))
        assert pipe.statistics()[0].staleness == {0: 1, 1: 3}


# Asynchronous Nesterov --------------------------------------------------------------------------


class LookAhead(Weight):
    """w_{t+1} = w_t + d_t - η (1 - γ) g(w_t + d_t), d_t = γ (w_t - w_{t-1}): what runs is w + d."""

    def __init__(self, start: float, optimizer: OptimizerFactory) -> None:
        super().__init__(start, optimizer)
        self.w, self.d = start, 0.0

    @property
    def value(self) -> float:
        return self.w + self.d

    def step(self, g: float, age: float) -> None:
        gamma = self.group["momentum"]
        w = self.w + self.d - self.group["lr"] * (1 - gamma) * g
        self.w, self.d = w, gamma * (w - self.w)


@pytest.mark.parametrize("slack", [0, 2])
@pytest.mark.parametrize("nesterov", [False, True])
def test_asynchronous_nesterov_is_the_papers_two_sequences(nesterov: bool, slack: int) -> None:
    batches = numbers([4] * 25)
    make = partial(SGD, lr=0.2, momentum=0.9, nesterov=nesterov)
    expected = by_hand(batches, 2 + 2 * slack, LookAhead(0.5, make), LookAhead(1.5, make))
    got = in_a_pipeline([AsynchronousNesterov()], make, batches, slack=slack)
    assert got == pytest.approx(expected, rel=1e-12)


def test_asynchronous_nesterov_leaves_nadam_as_it_is() -> None:
    batches = batches_of(40, 5)
    make = partial(
        NAdam, lr=3e-3, betas=(0.99, 0.999), momentum_decay=0.004, weight_decay=0.01,
        decoupled_weight_decay=True,
    )  # fmt: skip
    got, plain = run([AsynchronousNesterov()], make, batches), run([], make, batches)
    assert all(torch.equal(got[name], plain[name]) for name in got)


def halves(one: Any, other: Any) -> Any:
    """Two optimizers: of the weights, and of the biases."""

    def make(params: Sequence[tuple[str, nn.Parameter]]) -> list[Optimizer]:
        weights = [(n, p) for n, p in params if n.endswith("weight")]
        return [one(weights), other([(n, p) for n, p in params if n.endswith("bias")])]

    return make


def test_asynchronous_nesterov_of_two_momenta() -> None:
    """Each optimizer's gradients weigh 1 - its own γ; or it is refused, as two groups are."""
    batches = batches_of(40, 5)
    asked = halves(partial(SGD, lr=0.05, momentum=0.9), partial(SGD, lr=0.05, momentum=0.5))
    try:
        got = run([AsynchronousNesterov()], asked, batches)
    except ValueError:
        return
    by_parts = halves(
        partial(SGD, lr=0.05 * (1 - 0.9), momentum=0.9, nesterov=True),
        partial(SGD, lr=0.05 * (1 - 0.5), momentum=0.5, nesterov=True),
    )
    assert_close(got, run([], by_parts, batches), 1e-12)


def test_asynchronous_nesterov_of_sgd_beside_nadam() -> None:
    """Of NAdam nothing is changed, its learning rate included; or the two are refused."""
    batches = batches_of(40, 5)
    nadam = partial(NAdam, lr=3e-3)
    try:
        got = run(
            [AsynchronousNesterov()], halves(partial(SGD, lr=0.05, momentum=0.9), nadam), batches
        )
    except ValueError:
        return
    by_parts = halves(partial(SGD, lr=0.05 * (1 - 0.9), momentum=0.9, nesterov=True), nadam)
    assert_close(got, run([], by_parts, batches), 1e-12)


# Basis rotation ---------------------------------------------------------------------------------


class Rotated:
    """Adam of a matrix in the eigenbasis of the averages of G Gᵀ and Gᵀ G."""

    def __init__(self, weight: Tensor, refresh: int) -> None:
        self.w, self.refresh = weight.clone(), refresh
        self.mean, self.square = torch.zeros_like(weight), torch.zeros_like(weight)
        self.averages: list[Tensor] = []
        self.bases: list[Tensor] = []
        self.t = self.late = 0

    def step(
        self, g: Tensor, age: int, lr: float, betas: tuple[float, float], decay: float
    ) -> None:
        products = [g @ g.T, g.T @ g]
        if age and not self.bases:
            self.averages = products
            self.bases = [torch.linalg.eigh(p).eigenvectors.flip(1) for p in products]
            left, right = self.bases
            self.mean = left.T @ self.mean @ right
            self.square = (left**2).T @ self.square @ right**2
        elif self.bases:
            self.averages = [
                0.95 * a + 0.05 * p for a, p in zip(self.averages, products, strict=True)
            ]
        self.late += bool(self.bases)
        if self.bases and self.late % self.refresh == 0:
            left, right = self.bases
            self.bases = [
                torch.linalg.qr(a @ q).Q for a, q in zip(self.averages, self.bases, strict=True)
            ]
            self.mean = self.bases[0].T @ (left @ self.mean @ right.T) @ self.bases[1]
        eye = [torch.eye(n, dtype=g.dtype) for n in g.shape]
        left, right = self.bases or eye
        g = left.T @ g @ right
        self.t += 1
        self.mean = betas[0] * self.mean + (1 - betas[0]) * g
        self.square = betas[1] * self.square + (1 - betas[1]) * g * g
        mean = self.mean / (1 - betas[0] ** self.t)
        root = (self.square / (1 - betas[1] ** self.t)).sqrt() + 1e-8
        self.w = self.w * (1 - lr * decay) - lr * left @ (mean / root) @ right.T


@pytest.mark.parametrize("slack", [0, 2])
@pytest.mark.parametrize("refresh", [1, 4])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_basis_rotation_by_hand(decay: float, refresh: int, slack: int) -> None:
    """A 2×3 matrix and a bias at the first stage, a 1×2 matrix, which is let be, at the last.

    The bias is moved as by Adam. At the last stage nothing is late.
    """
    depth, lr, betas = 2 + 2 * slack, 0.02, (0.8, 0.9)
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    batches = [(draw(6, 3), draw(6, 1)) for _ in range(20)]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Identity(), nn.Linear(2, 1, bias=False)).double()
    first, last = model[0], model[2]
    assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
    matrix = Rotated(first.weight.detach(), refresh)
    bias, top = (nn.Parameter(p.detach().clone()) for p in (first.bias, last.weight))
    make = partial(AdamW, lr=lr, betas=betas, weight_decay=decay)
    others = [make([bias]), make([top])]
    past = [(matrix.w, bias.detach().clone())]
    for k, (x, y) in enumerate(batches):
        version = max(0, k - depth)
        w, b = (t.clone().requires_grad_() for t in past[version])
        loss = half_square((x @ w.T + b) @ top.T, y)
        gradient, bias.grad, top.grad = torch.autograd.grad(loss, (w, b, top))
        matrix.step(gradient, k - version, lr, betas, decay)
        for optimizer in others:
            optimizer.step()
        past.append((matrix.w, bias.detach().clone()))
    results = []
    for corrections in ([BasisRotation(refresh=refresh)], []):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 2), nn.Identity(), nn.Linear(2, 1, bias=False)).double()
        with Pipeline(
            model, half_square, make, stages=3, balance=[1, 1, 1], slack=slack,
            corrections=corrections,
        ) as pipe:  # fmt: skip
            pipe.train(batches)
            results.append(clone(pipe.state_dict()))
    expected = {"0.weight": matrix.w, "0.bias": bias.detach(), "2.weight": top.detach()}
    assert_close(results[0], expected, 1e-9)
    assert (results[0]["0.weight"] - results[1]["0.weight"]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", [Adam, AdamW, NAdam])
def test_what_is_no_matrix_or_too_large_is_moved_as_it_is(kind: Any) -> None:
    batches, make = batches_of(40, 5), partial(kind, lr=3e-3)
    got, plain = run([BasisRotation(largest=4)], make, batches), run([], make, batches)
    assert all(torch.equal(got[name], plain[name]) for name in got)
    turned = run([BasisRotation()], make, batches)
    assert all(torch.isfinite(value).all() for value in turned.values())
    assert not torch.equal(turned["0.weight"], plain["0.weight"])


# The second moment of the updates before must turn as well: where it is small and the turned first
# moment is not, one step would go 25 times as far as Adam's.
def test_a_rotated_step_is_no_larger_than_one_of_adams() -> None:
    """A rotation keeps a step's length, and Adam moves no element further than
    η (1 - β1) / √(1 - β2): not at the first late update either.
    """
    batches, lr = batches_of(20, 5), 3e-3
    states = [tanh_net().state_dict()]
    states += [run([BasisRotation()], partial(Adam, lr=lr), batches[:n]) for n in (1, 2, 3, 4)]
    for before, after in itertools.pairwise(states):
        for name, value in after.items():
            limit = lr * (1 - 0.9) / math.sqrt(1 - 0.999) * math.sqrt(value.numel())
            assert (value - before[name]).norm() < limit, name


def test_basis_rotation_does_not_care_for_the_basis_of_the_input() -> None:
    """Inputs turned by Q and a first weight turned by it are the same problem, and stay so.

    Of the first update, which is not late and so not rotated, the inputs are 0.
    """
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    batches = [(draw(6, 3) * (k > 0), draw(6, 1)) for k in range(20)]
    eye, turn = torch.eye(3, dtype=torch.float64), torch.linalg.qr(draw(3, 3)).Q
    weights: list[Tensor] = []
    for corrections in ([BasisRotation(refresh=2)], []):
        for q in (eye, turn):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(3, 2), nn.Identity(), nn.Linear(2, 1)).double()
            first = model[0]
            assert isinstance(first, nn.Linear)
            first.weight.data @= q
            with Pipeline(
                model, half_square, partial(Adam, lr=0.02, betas=(0.8, 0.9)), stages=3,
                balance=[1, 1, 1], corrections=corrections,
            ) as pipe:  # fmt: skip
                pipe.train([(x @ q, y) for x, y in batches])
                weights.append(pipe.state_dict()["0.weight"] @ q.T)
    assert (weights[0] - weights[1]).abs().max() < 1e-5
    assert (weights[2] - weights[3]).abs().max() > 1e-2


def test_all_that_is_late_may_be_predicted_and_rotated_and_counted_for_less() -> None:
    got = run(
        [BasisRotation(), WeightPrediction(), LearningRate("inverse_sqrt"), PipeMareT1(5)],
        adamw, batches_of(40, 5),
    )  # fmt: skip
    assert all(torch.isfinite(value).all() for value in got.values())
