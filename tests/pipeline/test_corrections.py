"""What is done about a gradient's staleness: each function by hand, and each at work in a pipeline.

The oracles know nothing of the engine: `simulate`, whose learning rates a scheduler divides by the
delay that index arithmetic gives, and loops of a few lines over numbers.
"""

import inspect
import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

import headrace.pipeline.corrections as package
from headrace.pipeline import Pipeline
from headrace.pipeline.corrections import Correction, DelayCompensation, LearningRate, correct
from headrace.pipeline.corrections.delay_compensation import compensate
from headrace.pipeline.corrections.learning_rate import inverse, inverse_sqrt, inverse_square
from headrace.pipeline.rules import Delayed

from .alone import MSE
from .helpers import SIZES, adamw, assert_close, assert_same, batches_of, clone, momentum, tanh_net
from .helpers import plain as plainly
from .simulator import Batch, OptimizerFactory, cut, depths_of, simulate

Factor = Callable[[int], float]


def g(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Each function by hand --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "name", "expected"),
    [
        (inverse, "inverse", [1, 1, 1 / 2, 1 / 3, 1 / 4, 1 / 100]),
        (inverse_sqrt, "inverse_sqrt", [1, 1, 1 / math.sqrt(2), 1 / math.sqrt(3), 1 / 2, 1 / 10]),
        (inverse_square, "inverse_square", [1, 1, 1 / 4, 1 / 9, 1 / 16, 1 / 10_000]),
    ],
)
def test_factors(function: Factor, name: str, expected: list[float]) -> None:
    ages = (0, 1, 2, 3, 4, 100)
    assert [function(age) for age in ages] == expected
    assert [LearningRate(name).factor(age) for age in ages] == expected


def test_a_number_or_a_function_for_the_factor() -> None:
    assert LearningRate().factor(4) == 0.25
    assert [LearningRate(0.5).factor(age) for age in (0, 7)] == [0.5, 0.5]
    assert LearningRate(3).factor(0) == 3
    assert [LearningRate(lambda age: 0.5**age).factor(age) for age in (0, 1, 3)] == [1, 0.5, 0.125]
    assert LearningRate(lambda age: 0).factor(1) == 0


@pytest.mark.parametrize("factor", ["fast", "", 0, -1, 0.0, math.inf, math.nan, True])
def test_factors_that_are_refused(factor: Any) -> None:
    with pytest.raises(ValueError, match=f"factor={factor!r}: (write one of inverse|give a num)"):
        LearningRate(factor)


@pytest.mark.parametrize("factor", [None, [1, 2], (0.5,)])
def test_what_is_no_factor_is_named(factor: Any) -> None:
    with pytest.raises(TypeError, match=r"factor=.*: give a name, a number, or a function of τ"):
        LearningRate(factor)


@pytest.mark.parametrize("value", [-0.5, math.nan, math.inf])
def test_a_function_that_gives_no_factor_is_told_so(value: float) -> None:
    correction = LearningRate(lambda age: value if age == 3 else 1)
    assert correction.factor(2) == 1
    with pytest.raises(ValueError, match=f"gave {value} for staleness 3: it must give a number"):
        correction.factor(3)


def test_compensation_by_hand() -> None:
    """g + λ g² (w_now - w_then): at 1 + 0.5·1·2, -2 + 0.5·4·(-1), 3 + 0.5·9·0."""
    gradient, now, then = g(1, -2, 3), g(5, 1, 7), g(3, 2, 7)
    assert compensate(gradient, now, then, 0.5).tolist() == [2, -4, 3]
    assert DelayCompensation(0.5).change(gradient, now, then).tolist() == [2, -4, 3]
    assert DelayCompensation(0).change(gradient, now, then).tolist() == [1, -2, 3]
    assert gradient.tolist() == [1, -2, 3]


def test_compensation_keeps_no_graph() -> None:
    now, then = g(5).requires_grad_(), g(3).requires_grad_()
    assert not compensate(g(1), now, then, 1.0).requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_compensation_of_a_fresh_gradient_changes_no_bit(dtype: torch.dtype) -> None:
    gradient = torch.randn(50, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight = torch.randn(50, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert torch.equal(compensate(gradient, weight, weight.clone(), 0.04), gradient)


@pytest.mark.parametrize(("dtype", "value"), [(torch.float16, 300.0), (torch.float32, 1e20)])
def test_compensation_of_a_gradient_whose_square_is_too_large(
    dtype: torch.dtype, value: float
) -> None:
    """g² overflows, and infinity times a weight that has not moved is NaN."""
    gradient, weight = torch.tensor([value], dtype=dtype), torch.tensor([1.0], dtype=dtype)
    assert torch.equal(compensate(gradient, weight, weight.clone(), 0.04), gradient)


@pytest.mark.parametrize("strength", [-0.1, math.nan, math.inf])
def test_strengths_that_are_refused(strength: float) -> None:
    with pytest.raises(ValueError, match=f"strength={strength}: give a number, 0 or more"):
        DelayCompensation(strength)


def test_compensation_of_a_sparse_gradient_is_refused() -> None:
    weight = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"needs dense gradients.*write sparse=False there"):
        DelayCompensation().change(torch.eye(2).to_sparse(), weight, weight)


def test_corrections_one_after_the_other() -> None:
    """The gradient goes through each in turn; the factors are multiplied."""

    class Doubled(Correction):
        needs_weights = True

        def change(self, gradient: Tensor, now: Tensor, then: Tensor) -> Tensor:
            return 2 * gradient

    now, then = {"a": g(5), "b": g(1)}, {"a": g(3), "b": g(2)}
    rates = [LearningRate("inverse"), LearningRate(0.5)]
    for corrections, expected in (
        ([DelayCompensation(0.5), Doubled(), *rates], [2 * (1 + 0.5 * 1 * 2), 2 * (2 - 0.5 * 4)]),
        ([*rates, Doubled(), DelayCompensation(0.5)], [2 + 0.5 * 4 * 2, 4 - 0.5 * 16]),
    ):
        gradients = {"a": g(1), "b": g(2)}
        assert correct(corrections, gradients, [4], now, then) == 0.25 * 0.5
        assert [gradients["a"].item(), gradients["b"].item()] == expected


def test_no_corrections_and_those_that_change_nothing() -> None:
    value = g(1)
    for corrections in ([], [Correction()], [Correction(), LearningRate("inverse")]):
        gradients = {"a": value}
        assert correct(corrections, gradients, [1], {"a": g(2)}, {"a": g(1)}) == 1
        assert gradients["a"] is value


def test_the_factor_of_several_micro_batches_is_the_mean_of_theirs() -> None:
    assert correct([LearningRate("inverse")], {}, [1, 2, 4, 4], {}, None) == (1 + 0.5 + 0.5) / 4
    both = [LearningRate("inverse"), LearningRate(lambda age: age)]
    assert correct(both, {}, [1, 4], {}, None) == (1 + 0.25) / 2 * (1 + 4) / 2


def test_without_the_weights_of_then_nothing_is_compensated() -> None:
    gradients = {"a": g(1)}
    assert correct([DelayCompensation(1)], gradients, [2], {"a": g(9)}, None) == 1
    assert gradients["a"].tolist() == [1]


# The learning rate, in a pipeline ---------------------------------------------------------------


def divided(depths: Sequence[int], factor: Factor) -> Callable[[Optimizer], LRScheduler]:
    """A scheduler for each stage in turn: its rate at update k, times f(min(k, d_j))."""
    remaining = iter(depths)

    def make(optimizer: Optimizer) -> LRScheduler:
        depth = next(remaining)
        return LambdaLR(optimizer, lambda k: factor(min(k, depth)))

    return make


def run(
    corrections: Sequence[Correction],
    optimizer: OptimizerFactory,
    batches: Sequence[Batch],
    slack: int = 0,
    **more: Any,
) -> dict[str, Tensor]:
    with Pipeline(
        tanh_net(), MSE, optimizer, stages=3, balance=SIZES[3], slack=slack,
        corrections=corrections, **more,
    ) as pipe:  # fmt: skip
        pipe.train(batches)
        return clone(pipe.state_dict())


def sgd(params: list[tuple[str, nn.Parameter]]) -> Optimizer:
    return torch.optim.SGD(params, lr=0.05)


def adam(params: list[tuple[str, nn.Parameter]]) -> Optimizer:
    return torch.optim.Adam(params, lr=3e-3)


@pytest.mark.parametrize("slack", [0, 1])
@pytest.mark.parametrize("optimizer", [sgd, momentum, adam, adamw])
@pytest.mark.parametrize(
    ("name", "factor"), [("inverse", lambda t: 1 / max(1, t)), ("inverse_sqrt", inverse_sqrt)]
)
def test_the_learning_rate_is_divided_by_the_delay(
    name: str, factor: Factor, optimizer: OptimizerFactory, slack: int
) -> None:
    """Adam and AdamW included, to whom a gradient of half the size is the same."""
    batches, depths = batches_of(100, 5), depths_of(3, slack)
    got = run([LearningRate(name)], optimizer, batches, slack)
    expected = simulate(
        cut(tanh_net(), SIZES[3]), MSE, optimizer, batches, depths=depths,
        scheduler=divided(depths, factor),
    ).weights  # fmt: skip
    assert_close(got, expected)
    uncorrected = run([], optimizer, batches, slack)
    moved = {n: (uncorrected[n] - got[n]).abs().max().item() for n in got}
    assert min(moved[n] for n in list(got)[:4]) > 1e-4, "the factor must act on the first stage"


def test_a_number_is_a_factor_of_every_stage() -> None:
    batches = batches_of(60, 5)
    half = run([LearningRate(0.5)], momentum, batches)
    assert_same(half, run([], lambda p: torch.optim.SGD(p, lr=0.025, momentum=0.9), batches))


def test_a_factor_and_a_scheduler() -> None:
    """The scheduler's rate is multiplied, and goes on undisturbed."""
    batches, depths = batches_of(60, 5), depths_of(3)
    decay = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.9)
    got = run([LearningRate("inverse")], sgd, batches, scheduler=decay)
    remaining = iter(depths)

    def both(optimizer: Optimizer) -> LRScheduler:
        depth = next(remaining)
        return LambdaLR(optimizer, lambda k: 0.9**k / max(1, min(k, depth)))

    expected = simulate(
        cut(tanh_net(), SIZES[3]), MSE, sgd, batches, depths=depths, scheduler=both
    ).weights
    assert_close(got, expected)


def test_a_factor_of_0_keeps_a_stage_where_it_is_once_it_is_that_stale() -> None:
    batches = batches_of(60, 5)
    few = run([], momentum, batches[:2])
    got = run([LearningRate(lambda age: float(age < 2))], momentum, batches)
    first = [name for name in got if int(name.split(".")[0]) < SIZES[3][0]]
    assert_same({n: got[n] for n in first}, {n: few[n] for n in first})
    assert not any(torch.equal(got[n], few[n]) for n in got if n not in first)


class Scale(nn.Module):
    """w x: the one trainable number."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(start, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.w * x


def half_square(output: Tensor, target: Tensor) -> Tensor:
    """(1/2) mean (output - target)²; output of shape (N, 1)."""
    return (output - target).square().mean() / 2


def numbers(sizes: Sequence[int], seed: int = 3) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    return [(draw(size, 1), draw(size, 1)) for size in sizes]


def three_stages(start: float, last: nn.Module) -> nn.Sequential:
    return nn.Sequential(Scale(start), nn.Identity(), last)


def test_each_micro_batch_of_an_update_is_weighed_by_its_own_factor() -> None:
    """θ ← θ - (η/Σn) Σ n_l f(τ_l) g_l, with two micro-batches to an update, of 3 samples and 1.

    Micro-batch k is in the update that makes version k // 2 + 1, and ran forward with version
    max(0, k - 2) // 2, so τ is 0, 0, 1, 1, …; one micro-batch more in flight per hop makes it
    2, 1, 2, 1, …: then the two differ.
    """
    batches, eta, every = numbers([3, 1] * 10), 0.25, 2
    factors = [1.0, 0.75, 0.5]
    for slack in (0, 1):
        depth = 2 + 2 * slack
        w, history = 0.5, [0.5]
        for update in range(10):
            total = 0.0
            for k in (2 * update, 2 * update + 1):
                version = max(0, k - depth) // every
                x, y = batches[k]
                gradient = float(((history[version] * x - y) * x).mean())
                total += len(x) * factors[update - version] * gradient
            w -= eta * total / 4
            history.append(w)
        model = three_stages(0.5, nn.Identity())
        with Pipeline(
            model, half_square, lambda p: torch.optim.SGD(p, lr=eta), stages=3, balance=[1, 1, 1],
            slack=slack, update_every=every,
            corrections=[LearningRate(lambda age: factors[age])],
        ) as pipe:  # fmt: skip
            pipe.train(batches)
            assert pipe.state_dict()["0.w"].item() == pytest.approx(w, rel=1e-12)
    assert depth == 4


# Delay compensation, in a pipeline --------------------------------------------------------------


def compensated(
    batches: Sequence[Batch], depth: int, eta: float, strength: float, factor: Factor
) -> tuple[float, float]:
    """output = v (u x): u at the first of three stages, seen `depth` updates late; v at the last.

    du = mean (v u x - y) v x at the v of now and the u of then, then + λ du² (u_now - u_then).
    """
    u, v, history = 0.5, 1.5, [0.5]
    for k, (x, y) in enumerate(batches):
        then = history[max(0, k - depth)]
        error = v * then * x - y
        du, dv = float((error * v * x).mean()), float((error * then * x).mean())
        du += strength * du * du * (u - then)
        u, v = u - eta * factor(min(k, depth)) * du, v - eta * factor(0) * dv
        history.append(u)
    return u, v


@pytest.mark.parametrize("slack", [0, 2])
@pytest.mark.parametrize("strength", [0.0, 0.04, 2.0])
def test_delay_compensation_by_hand(strength: float, slack: int) -> None:
    batches, eta, depth = numbers([4] * 25), 0.05, 2 + 2 * slack
    for corrections, factor in (
        ([DelayCompensation(strength)], lambda age: 1.0),
        ([DelayCompensation(strength), LearningRate("inverse")], lambda age: 1 / max(1, age)),
    ):
        with Pipeline(
            three_stages(0.5, Scale(1.5)), half_square, lambda p: torch.optim.SGD(p, lr=eta),
            rule=Delayed("stash"), stages=3, balance=[1, 1, 1], slack=slack,
            corrections=corrections,
        ) as pipe:  # fmt: skip
            pipe.train(batches)
            state = pipe.state_dict()
        u, v = compensated(batches, depth, eta, strength, factor)
        assert state["0.w"].item() == pytest.approx(u, rel=1e-12)
        assert state["2.w"].item() == pytest.approx(v, rel=1e-12)
    without, _ = compensated(batches, depth, eta, 0.0, factor)
    assert strength == 0 or abs(without - u) > 1e-6


# Where nothing is stale -------------------------------------------------------------------------

BOTH = [DelayCompensation(2.0), LearningRate("inverse")]


@pytest.mark.parametrize("optimizer", [momentum, adamw])
def test_one_stage_is_plain_torch_bitwise(optimizer: OptimizerFactory) -> None:
    batches, model = batches_of(63, 5), tanh_net()
    plainly(model, MSE, optimizer, batches)
    with Pipeline(tanh_net(), MSE, optimizer, stages=1, corrections=BOTH) as pipe:
        pipe.train(batches)
        assert_same(pipe.state_dict(), model.state_dict())


@pytest.mark.parametrize("optimizer", [momentum, adamw])
def test_the_last_stage_is_left_alone_bitwise(optimizer: OptimizerFactory) -> None:
    """With nothing to train before it, it is also what a plain loop gives."""

    def frozen() -> nn.Sequential:
        model = tanh_net()
        model[: SIZES[3][0] + SIZES[3][1]].requires_grad_(False)
        return model

    batches, model = batches_of(63, 5), frozen()
    trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    plainly(model, MSE, lambda params: optimizer(trainable), batches)
    states = []
    for corrections in ([], BOTH):
        with Pipeline(
            frozen(), MSE, optimizer, stages=3, balance=SIZES[3], corrections=corrections
        ) as pipe:
            pipe.train(batches)
            states.append(clone(pipe.state_dict()))
    assert_same(*states)
    assert_close(states[1], model.state_dict(), 1e-13)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_under_a_flush_nothing_is_corrected(schedule: str) -> None:
    batches = batches_of(40, 8)
    more: dict[str, Any] = {"schedule": schedule, "micro_batches": 4}
    assert_same(
        run([LearningRate("inverse")], momentum, batches, **more),
        run([], momentum, batches, **more),
    )


# What is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "corrections", ["inverse", LearningRate("inverse"), 0.5, {LearningRate("inverse")}],
    ids=["text", "no list", "number", "set"],
)  # fmt: skip
def test_what_is_no_list_of_corrections_is_named(corrections: Any) -> None:
    with pytest.raises(TypeError, match=r"corrections=.*: give a list of corrections"):
        Pipeline(tanh_net(), MSE, momentum, stages=3, corrections=corrections)


@pytest.mark.parametrize(
    "kind", ["inverse", LearningRate, 0.5, inverse], ids=lambda k: type(k).__name__
)
def test_what_is_no_correction_is_named(kind: Any) -> None:
    with pytest.raises(TypeError, match=r"give objects, as in corrections=\[LearningRate\("):
        Pipeline(tanh_net(), MSE, momentum, stages=3, corrections=[LearningRate(), kind])


@pytest.mark.parametrize("policy", ["current", "replay"])
def test_compensation_without_the_weights_of_then_is_refused(policy: str) -> None:
    """It would compare the weights with themselves."""
    with pytest.raises(ValueError, match=r"weights='stash'"):
        Pipeline(
            tanh_net(), MSE, momentum, stages=3, rule=Delayed(policy),
            corrections=[DelayCompensation()],
        )  # fmt: skip


def test_an_error_of_a_users_function_names_the_staleness() -> None:
    pipe = Pipeline(
        tanh_net(), MSE, momentum, stages=3, balance=SIZES[3],
        corrections=[LearningRate(lambda age: -1.0 if age == 2 else 1.0)],
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"gave -1.0 for staleness 2") as caught:
        pipe.train(batches_of(60, 5))
    assert any("stage 0 of 3" in note for note in caught.value.__notes__)


# The page ---------------------------------------------------------------------------------------

ROW = re.compile(r"\| `(\w+)` \|[^|]*\|([^|]*)\|[^|]*\|[^|]*\|")


def test_the_page_has_every_correction_and_its_arguments() -> None:
    page = Path(__file__).parents[2] / "docs" / "staleness.md"
    rows = dict(ROW.findall(page.read_text(encoding="utf-8").partition("## The corrections")[2]))
    kinds = [getattr(package, name) for name in package.__all__]
    kinds = [k for k in kinds if inspect.isclass(k) and k is not Correction]
    assert set(rows) == {kind.__module__.rpartition(".")[2] for kind in kinds}
    for kind in kinds:
        row = rows[kind.__module__.rpartition(".")[2]]
        arguments = inspect.signature(kind).parameters
        assert bool(row.strip()) == bool(arguments)
        for name, argument in arguments.items():
            found = re.search(rf"`{name}(?:: (.+?))?`", row)
            assert found is not None, name
            value = argument.default
            if isinstance(value, float):
                assert float(found[1]) == value
            else:
                named = {None: "null", inspect.Parameter.empty: None}
                assert found[1] == named.get(value, str(value))
