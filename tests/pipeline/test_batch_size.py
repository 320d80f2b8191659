"""Growing batches: the papers' formulas by hand, where updates end, and the numbers of training."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from headrace.pipeline import Pipeline, Progress
from headrace.pipeline.arguments import check_growth
from headrace.pipeline.batch_size import Geometric, Growth, Steps, VarianceTest
from headrace.pipeline.batch_size.geometric import grow
from headrace.pipeline.batch_size.sampled import UNKNOWN, Sampled, variance
from headrace.pipeline.batch_size.variance_test import enlarge
from headrace.pipeline.errors import InputError
from headrace.pipeline.gathering import Gathering
from headrace.pipeline.gradient import Gradient
from headrace.pipeline.replicas import Allreduce
from headrace.pipeline.rules import Delayed, Local

from .helpers import (
    OPTIMIZERS,
    SIZES,
    assert_close,
    assert_same,
    batches_of,
    clone,
    halve_slowly,
    momentum,
    tanh_net,
)
from .simulator import Batch, cut, depths_of, simulate

Policy = Literal["current", "stash", "replay", "predict"]

# Sizes by hand ----------------------------------------------------------------------------------


def sizes(growth: Growth, epochs: Sequence[int]) -> list[int]:
    """Of updates of which each begins in that epoch."""
    result = [growth.start]
    for epoch in epochs[1:]:
        result.append(growth.next(result[-1], epoch, UNKNOWN))
    return result


def test_steps() -> None:
    assert Steps(16, factor=5, at=[2, 4]).sizes == (16, 80, 400)
    assert Steps(10, factor=1.26, at=[1, 2]).sizes == (10, 13, 16)
    grown = sizes(Steps([16, 80, 400], at=[2, 4]), [0, 0, 1, 2, 3, 4, 9])
    assert grown == [16, 16, 16, 80, 80, 400, 400]
    assert sizes(Steps([16, 1437], at=[5]), [4, 5]) == [16, 1437], "a warm start"
    assert sizes(Steps([64, 8], at=[1]), [0, 1]) == [64, 8]


def test_geometric() -> None:
    """⌈1.1 |B| + 1⌉: 10 → 12 → ⌈14.2⌉ → ⌈17.5⌉ → ⌈20.8⌉ → ⌈24.1⌉, and never more than N."""
    assert sizes(Geometric(10, most=23), range(6)) == [10, 12, 15, 18, 21, 23]
    assert grow(100, 1.1, 1000) == 111, "1.1 * 100 is 110.00000000000001 in doubles"
    assert grow(8, 2, 1000) == 17
    assert grow(8, 1e308, 1000) == 1000, "8 times that is no finite double"


def test_the_variance_test() -> None:
    """|S| = 4, ‖Var‖₁ = 12, ‖g‖² = 2: 12/4 > θ² 2 for θ = 1, and 12/2 = 6 samples pass."""
    assert enlarge(4, Sampled(12, 2), theta=1, most=100) == 6
    assert enlarge(6, Sampled(12, 2), theta=1, most=100) == 6, "12/6 is not more than 2"
    assert enlarge(4, Sampled(12, 2), theta=0.5, most=100) == 24
    assert enlarge(4, Sampled(12, 2), theta=0.5, most=20) == 20
    assert enlarge(4, Sampled(12, 2), theta=2, most=100) == 4
    assert enlarge(4, Sampled(12, 0), theta=1, most=100) == 100, "all noise"
    assert enlarge(4, UNKNOWN, theta=1, most=100) == 4
    assert enlarge(4, Sampled(7, 2), theta=1, most=100) == 4, "7/4 is less than 2"
    assert enlarge(3, Sampled(7, 2), theta=1, most=100) == 4, "and 3.5 samples are 4"


def test_the_variance_of_two_parameters_by_hand() -> None:
    """Gradients (1, 0), (3, 2), (2, 4): variances 1 and 4, mean (2, 2)."""
    gradient = Gradient(measures=True)
    for a, b in ((1.0, 0.0), (3.0, 2.0), (2.0, 4.0)):
        gradient.add({"a": torch.tensor([a]), "b": torch.tensor(b)}, 1, [0])
    gradient.mean()
    assert gradient.sampled() == pytest.approx(Sampled(5.0, 8.0))
    assert math.isnan(variance(3.0, 1, 3.0, 1)), "one micro-batch tells nothing"
    assert variance(8.0 - 1e-12, 1, 8.0, 2) == 0.0, "rounding makes no negative one"


def test_the_variance_is_that_of_samples_whatever_the_micro_batches() -> None:
    """Micro-batches of 1 to 5 samples: the mean over many draws is the samples' own variance."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([1.0, 3.0], dtype=torch.float64)
    found = []
    for _ in range(800):
        gradient = Gradient(measures=True)
        for count in (1, 5, 2, 4):
            each = torch.randn(count, 2, generator=generator, dtype=torch.float64) * scale + 1
            gradient.add({"w": each.mean(0)}, count, [0], factor=0.5)
        gradient.mean()
        found.append(gradient.sampled().variance)
    assert sum(found) / len(found) == pytest.approx(10.0, rel=0.06)


def test_a_sparse_gradient_has_a_variance_too() -> None:
    gradients = [Gradient(measures=True), Gradient(measures=True)]
    for rows in ([0, 0, 2], [1, 2, 2]):
        values = torch.arange(6.0).reshape(3, 2)
        sparse = torch.sparse_coo_tensor(torch.tensor([rows]), values, (4, 2))
        gradients[0].add({"w": sparse}, 3, [0])
        gradients[1].add({"w": sparse.to_dense()}, 3, [0])
    for gradient in gradients:
        gradient.mean()
    assert gradients[0].sampled() == pytest.approx(gradients[1].sampled())


def test_rates() -> None:
    factors = {"constant": [1, 1, 1], "linear": [1, 4, 0.5], "sqrt": [1, 2, 0.5**0.5]}
    for rate, wanted in factors.items():
        growth = Steps([16, 64], at=[1], rate=rate)
        assert [growth.factor(samples) for samples in (16, 64, 8)] == wanted


# Where updates end ------------------------------------------------------------------------------


def ends(gathering: Gathering, epochs: Sequence[Sequence[int]]) -> str:
    """A letter for each micro-batch of a mini-batch each, u where it closes an update."""
    letters = ""
    for epoch in epochs:
        gathering.begin()
        letters += "".join(".u"[gathering.closes(samples, True)] for samples in epoch)
    return letters


def test_where_updates_end() -> None:
    assert ends(Gathering(3, None, False), [[5, 5, 5, 2], [5, 5, 5]]) == "..u..u."
    # 10 samples, then 20: an update that was begun keeps its size, and over an epoch's end.
    grown = ends(Gathering(1, Steps([10, 20], at=[1]), False), [[5, 5, 4], [5, 4, 5, 7, 8, 5]])
    assert grown == ".u..u..u."
    assert ends(Gathering(1, Geometric(5, most=12), False), [[5] * 9]) == "u.u.u..u."
    assert ends(Gathering(1, Steps([10, 5], at=[1]), False), [[5, 5], [5, 5]]) == ".uuu"


def test_a_flush_ends_updates_with_mini_batches() -> None:
    """Three micro-batches of a sample to a mini-batch; 3 samples to an update, then 8."""
    for growth, wanted in ((None, ".....u.....u..."), (Steps([3, 8], at=[1]), "..u..u........u")):
        gathering, letters = Gathering(2, growth, True), ""
        for mini_batches in (2, 3):
            gathering.begin()
            for k in range(3 * mini_batches):
                letters += ".u"[gathering.closes(1, k % 3 == 2)]
        assert letters == wanted


def test_a_start_that_cannot_be() -> None:
    def refusal(growth: Growth, flushes: bool = False, samples: int = 32) -> str:
        gathering = Gathering(1, growth, flushes)
        gathering.begin()
        with pytest.raises(InputError) as caught:
            gathering.closes(samples, True)
        return str(caught.value)

    text = refusal(Steps([16, 64], at=[1]))
    assert re.search("starts at 16 samples, and a micro-batch has 32: start at 32 or more", text)
    assert "micro_batches= larger" in text
    assert "a mini-batch has 32" in refusal(Geometric(16, most=64), flushes=True)
    text = refusal(VarianceTest(32, most=64))
    assert re.search("one micro-batch, .* start at 33 or more, or write micro_batches=2", text)


# Training ---------------------------------------------------------------------------------------


def loop(
    model: nn.Module,
    factory: Callable[..., torch.optim.Optimizer],
    epochs: Sequence[Sequence[Batch]],
    growth: Growth,
) -> list[int]:
    """What a torch user would write for one device; gives the samples of each update.

    The size of the variance test's next update is known an update late: what the stage tells the
    first one rides up with a micro-batch's gradient, before that micro-batch's own update.
    """
    opt, loss_fn = factory(list(model.named_parameters())), nn.MSELoss()
    size, gathered, made = growth.start, 0, []
    means: list[list[Tensor]] = []
    figures = [UNKNOWN, UNKNOWN]
    parameters = list(model.parameters())
    for epoch, batches in enumerate(epochs):
        for x, y in batches:
            if made and not gathered:
                size = growth.next(size, epoch, figures[-2])
            loss = loss_fn(model(x), y)
            means.append(list(torch.autograd.grad(loss, parameters)))
            gathered += len(x)
            if gathered < size:
                continue
            for parameter, gradients in zip(parameters, zip(*means, strict=True), strict=True):
                parameter.grad = gradients[0].clone()
                for gradient in gradients[1:]:
                    parameter.grad += gradient
                parameter.grad *= 1 / len(means)
            figures.append(by_hand(means, [p.grad for p in parameters], len(x)))
            rates = [group["lr"] for group in opt.param_groups]
            for group in opt.param_groups:
                group["lr"] *= growth.factor(gathered)
            opt.step()
            for group, rate in zip(opt.param_groups, rates, strict=True):
                group["lr"] = rate
            made.append(gathered)
            gathered, means = 0, []
    return made


def by_hand(means: list[list[Tensor]], mean: Sequence[Tensor | None], samples: int) -> Sampled:
    """b Σ_k (m_k - g)² / (K - 1), summed over all weights; and ‖g‖²."""
    spread = sum(
        float((m - g).double().square().sum())
        for row in means
        for m, g in zip(row, mean, strict=True)
        if g is not None
    )
    square = sum(float(g.double().square().sum()) for g in mean if g is not None)
    return Sampled(samples * spread / (len(means) - 1) if len(means) > 1 else math.nan, square)


GROWTHS: dict[str, Callable[[], Growth]] = {
    "steps": lambda: Steps([5, 20, 35], at=[1, 2]),
    "steps, linear": lambda: Steps(5, factor=3, at=[1, 3], rate="linear"),
    "warm start, sqrt": lambda: Steps([5, 40], at=[2], rate="sqrt"),
    "geometric": lambda: Geometric(8, most=33),
    "variance test": lambda: VarianceTest(10, most=120, theta=1.2),
    "variance test, sqrt": lambda: VarianceTest(15, most=120, theta=0.9, rate="sqrt"),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", GROWTHS)
def test_one_stage_is_the_plain_loop_bitwise(name: str, optimizer: str) -> None:
    epochs = [batches_of(60, 5, seed=e, dtype=torch.float32) for e in range(4)]
    reference, growth = tanh_net(dtype=torch.float32), GROWTHS[name]()
    factory = OPTIMIZERS[optimizer]
    made = loop(reference, factory, epochs, growth)
    assert len(set(made)) > 1
    with Pipeline(
        tanh_net(dtype=torch.float32), nn.MSELoss(), factory,
        stages=1, balance=[16], batch_size=growth,
    ) as pipe:  # fmt: skip
        updates = [pipe.train(batches).updates for batches in epochs]
        assert sum(updates) == len(made) == pipe.version
        assert_same(clone(pipe.state_dict()), clone(reference.state_dict()))


def marks_of(updates: Sequence[int], micro_batches: Sequence[int]) -> list[bool]:
    """Whether each micro-batch closes one of the updates of such sizes, then of the last one."""
    remaining, marks, gathered = iter(updates), [], 0
    size = next(remaining)
    for samples in micro_batches:
        gathered += samples
        marks.append(gathered >= size)
        if marks[-1]:
            gathered, size = 0, next(remaining, size)
    return marks


def test_marks_of() -> None:
    assert marks_of([5, 9], [5, 5, 3, 5, 4, 5]) == [True, False, False, True, False, True]


@pytest.mark.parametrize(("n", "slack"), [(2, 0), (4, 1)], ids=["n2", "n4, slack 1"])
@pytest.mark.parametrize("policy", ["current", "stash", "replay", "predict"])
def test_a_stream_that_grows_equals_the_simulator(policy: Policy, n: int, slack: int) -> None:
    """Two calls of `train`, a drain, two more; the last micro-batch of each has 3 samples of 5."""
    loader, growth = batches_of(63, 5), Steps([5, 10, 22], at=[1, 3], rate="sqrt")
    marks, gathered, size = [], 0, 0
    for target in (5, 10, 10, 22):
        for x, _ in loader:
            size = size if gathered else target
            gathered += len(x)
            marks.append(gathered >= size)
            gathered = 0 if marks[-1] else gathered
    depths = depths_of(n, slack)
    simulation = simulate(
        cut(tanh_net(), SIZES[n]),
        nn.MSELoss(),
        momentum,
        loader * 4,
        depths=depths,
        policy=policy,
        closes=marks,
        rate=lambda samples: math.sqrt(samples / 5),
        drains=[26],
        scheduler=halve_slowly,
        clip=0.5,
    )
    model = tanh_net()
    with Pipeline(
        model,
        nn.MSELoss(),
        momentum,
        rule=Delayed(policy),
        scheduler=halve_slowly,
        clip_grad_norm=0.5,
        slack=slack,
        stages=n,
        balance=SIZES[n],
        batch_size=growth,
    ) as pipe:
        for epoch in range(4):
            pipe.train(loader)
            if epoch == 1:
                pipe.drain()
        assert_close(clone(pipe.state_dict()), simulation.weights)
        for row, stale in zip(pipe.statistics(), simulation.staleness, strict=True):
            assert row.updates == sum(marks)
            applied = stale[: len(marks) - marks[::-1].index(True)]
            assert row.staleness == {s: applied.count(s) for s in set(applied)}
    assert_close(clone(model.state_dict()), simulation.closed)
    assert simulation.staleness[0][12] == depths[0] > simulation.staleness[0][-1]


class Told(VarianceTest):
    """Remembers what it was told, and what it said."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.told: list[Sampled] = []
        self.sizes = [self.start]

    def next(self, size: int, epoch: int, sampled: Sampled) -> int:
        self.told.append(sampled)
        self.sizes.append(super().next(size, epoch, sampled))
        return self.sizes[-1]


@pytest.mark.parametrize(("n", "slack"), [(1, 0), (2, 1), (4, 0)])
def test_what_the_first_stage_knows_is_the_schedule_s_alone(n: int, slack: int) -> None:
    """It feeds micro-batch i once that of i - 1 - d_0 is back, with what all stages had then: the
    figures of the last update before it.
    """
    loader, growth = batches_of(150, 5), Told(10, most=150, theta=0.8)
    depths = depths_of(n, slack)
    with Pipeline(
        tanh_net(), nn.MSELoss(), momentum,
        slack=slack, stages=n, balance=SIZES[n], batch_size=growth,
    ) as pipe:  # fmt: skip
        for _ in range(2):
            pipe.train(loader)
        weights = clone(pipe.state_dict())
    marks = marks_of(growth.sizes, [5] * 60)
    wanted = simulate(
        cut(tanh_net(), SIZES[n]), nn.MSELoss(), momentum, loader * 2, depths=depths, closes=marks
    )
    assert_close(weights, wanted.weights)
    begins = [i for i in range(1, 60) if marks[i - 1]]
    assert len(growth.told) == len(begins)
    for i, told in zip(begins, growth.told, strict=True):
        back = i - 1 - depths[0]
        updates = sum(marks[: max(0, back)])
        known = wanted.noise[updates - 1] if updates else UNKNOWN
        assert told == pytest.approx(known, nan_ok=True)
    assert len(set(growth.sizes)) > 2


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_a_flushing_schedule_grows_at_the_end_of_mini_batches(schedule: str, n: int) -> None:
    """Mini-batches of 10 in two micro-batches: one to an update, then three."""
    epochs = [batches_of(60, 10, seed=e) for e in range(3)]
    reference, growth = tanh_net(), Steps([10, 25], at=[1], rate="linear")
    made = loop(reference, momentum, epochs, growth)
    assert made == [10] * 6 + [30] * 4
    for settings in ({}, {"clip_grad_norm": 1e9}):
        with Pipeline(
            tanh_net(), nn.MSELoss(), momentum,
            schedule=schedule, stages=n, balance=SIZES[n], micro_batches=2, batch_size=growth,
            **settings,
        ) as pipe:  # fmt: skip
            assert [pipe.train(batches).updates for batches in epochs] == [6, 2, 2]
            assert_close(clone(pipe.state_dict()), clone(reference.state_dict()))


def test_measuring_under_a_flush_counts_micro_batches() -> None:
    with Pipeline(
        tanh_net(), nn.MSELoss(), momentum, schedule="1f1b", stages=2, balance=SIZES[2],
        micro_batches=2, batch_size=VarianceTest(10, most=60, theta=0.5),
    ) as pipe:  # fmt: skip
        assert pipe.train(batches_of(300, 10)).updates < 10


def test_progress_tells_the_size_of_the_latest_update() -> None:
    seen: list[Progress] = []
    with Pipeline(
        tanh_net(), nn.MSELoss(), momentum, stages=2, balance=SIZES[2],
        batch_size=Steps([5, 20], at=[1]),
    ) as pipe:  # fmt: skip
        for _ in range(2):
            pipe.train(batches_of(60, 5), log=seen.append, log_every=6)
    assert [progress.batch_size for progress in seen] == [5, 20, 20]


def test_a_head_of_a_local_loss_moves_at_the_stage_s_rate() -> None:
    """With a linear rate, plain SGD on 4 times the samples, 4 times as fast, of a constant loss."""
    heads = []
    for rate in ("constant", "linear"):
        rule = Local(3)
        with Pipeline(
            tanh_net(), nn.MSELoss(), lambda params: torch.optim.SGD(params, lr=1e-6),
            rule=[rule, rule], stages=2, balance=SIZES[2],
            batch_size=Steps([5, 20], at=[1], rate=rate),
        ) as pipe:  # fmt: skip
            pipe.train(batches_of(5, 5))
            (engine, _) = pipe._engines
            head = engine.stage.rule._head
            before = clone(head.state_dict())
            pipe.train(batches_of(20, 5))
            heads.append({n: w - before[n] for n, w in clone(head.state_dict()).items()})
    assert_close({n: 4 * w for n, w in heads[0].items()}, heads[1], 1e-9)
    assert max(w.abs().max().item() for w in heads[1].values()) > 1e-7


def test_it_is_refused_at_the_loader_and_the_pipeline_lives() -> None:
    with Pipeline(
        tanh_net(), nn.MSELoss(), momentum, stages=2, balance=SIZES[2],
        batch_size=Steps([8, 16], at=[1]),
    ) as pipe:  # fmt: skip
        with pytest.raises(InputError, match="starts at 8 samples, and a micro-batch has 9"):
            pipe.train(batches_of(20, 9))
        assert pipe.train(batches_of(20, 4)).updates == 2
        pipe.drain()
        assert pipe.version == 2


# Refusals ---------------------------------------------------------------------------------------

REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: Steps(0, factor=2, at=[1]), "sizes=0: give a whole number"),
    (lambda: Steps(16, at=[1]), "factor=None: give a finite number > 0"),
    (lambda: Steps(16, factor=0, at=[1]), "factor=0: give a finite number > 0"),
    (lambda: Steps(16, factor=math.inf, at=[1]), "factor=inf: give a finite number > 0"),
    (lambda: Steps(16, factor=1e200, at=[1, 2]), r"factor=1e\+200: 16 samples times that 2 times"),
    (lambda: Steps(4.5, factor=2, at=[1]), "sizes=4.5: give a whole number of samples"),
    (lambda: Steps("16", at=[1]), "sizes='16': give a whole number of samples"),
    (lambda: Steps([16], at=[1]), r"sizes=\[16\] with at=\[1\].*after each of at"),
    (lambda: Steps([16, 32], at=[1], factor=2), "factor=2: give a size .* and no factor"),
    (lambda: Steps([16, 1.5], at=[1]), "sizes=1.5: give a whole number"),
    (lambda: Steps([16], at=[]), r"at=\[\]: give the epochs"),
    (lambda: Steps([16, 32], at=[0]), r"at=\[0\]: .* >= 1"),
    (lambda: Steps([16, 32, 64], at=[3, 2]), r"at=\[3, 2\]: .* later than"),
    (lambda: Steps([16, 32], at="1"), "at='1'"),
    (lambda: Steps([16, 32], at=[1], rate="square"), "write one of constant, linear, sqrt"),
    (lambda: Geometric(16, most=8), "most=8 is less than start=16"),
    (lambda: Geometric(16, most=32, factor=0.9), "factor=0.9: give a finite number >= 1"),
    (lambda: Geometric(16, most=32, factor=math.inf), "factor=inf: give a finite number >= 1"),
    (lambda: VarianceTest(16, most=8), "most=8 is less than start=16"),
    (lambda: VarianceTest(16, most=True), "most=True: give a whole number"),
    (lambda: VarianceTest(16, most=32, theta=0), "theta=0: give a number > 0"),
    (lambda: VarianceTest(16, most=32, theta=1e200), r"theta=1e\+200: give .* at most 1e100"),
]


@pytest.mark.parametrize(("make", "text"), REFUSED, ids=[text for _, text in REFUSED])
def test_refusals(make: Callable[[], Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()


def test_replicas_are_refused() -> None:
    with pytest.raises(ValueError, match=r"beside replicas=Allreduce.*write update_every="):
        check_growth(Steps([8, 16], at=[1]), 1, Allreduce(2))


def test_refusals_of_the_pipeline() -> None:
    def build(**options: Any) -> None:
        Pipeline(tanh_net(), nn.MSELoss(), momentum, stages=1, balance=[16], **options)

    with pytest.raises(TypeError, match=r"batch_size=64: give an object, as in .*Steps"):
        build(batch_size=64)
    with pytest.raises(ValueError, match=r"update_every=2 beside batch_size=.*leave one of them"):
        build(batch_size=Steps([8, 16], at=[1]), update_every=2)


def test_a_later_size_below_a_micro_batch_is_refused() -> None:
    """Rounded up without a word it would do nothing."""
    batches = batches_of(40, 8)
    with Pipeline(
        tanh_net(),
        nn.MSELoss(),
        momentum,
        stages=2,
        balance=SIZES[2],
        batch_size=Steps([8, 4], at=[1]),
    ) as pipe:
        pipe.train(batches)
        with pytest.raises(InputError, match=r"has come to 4 samples.*has 8: give 8 or more"):
            pipe.train(batches)
