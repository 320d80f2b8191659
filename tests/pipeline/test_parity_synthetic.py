"""`synthetic` against plain autograd, and where it must equal something else exactly."""

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from headrace.pipeline import Pipeline
from headrace.pipeline.rules import Delayed, Exact, Local, Rule, Synthetic
from headrace.pipeline.rules.synthetic import update_draws
from headrace.pipeline.synthesizers import MLP, Condition, Linear

from .dni_simulator import simulate_dni
from .helpers import SIZES, adamw, assert_close, assert_same, batches_of, momentum, plain, tanh_net
from .simulator import Batch, cut, depths_of, simulate

CLASSES = 3


def labelled(count: int = 50, size: int = 4) -> list[Batch]:
    """Micro-batches of labels; the last one is smaller."""
    generator = torch.Generator().manual_seed(2)
    batches = batches_of(count * size - 1, size)
    return [(x, torch.randint(0, CLASSES, (len(x),), generator=generator)) for x, _ in batches]


def sgd(params: Any) -> Optimizer:
    return torch.optim.SGD(params, lr=0.02, momentum=0.5)


class OneHot(nn.Module):
    """Linear, of h and the target's one-hot code joined: as the paper writes it; zero at first."""

    def __init__(self, inputs: int, outputs: int, told: int) -> None:
        super().__init__()
        self.told = told
        self.w = nn.Parameter(torch.zeros(inputs + told, outputs, dtype=torch.float64))
        self.b = nn.Parameter(torch.zeros(outputs, dtype=torch.float64))

    def forward(self, h: Tensor, target: Tensor) -> Tensor:
        if self.told:
            code = target if target.is_floating_point() else functional.one_hot(target, self.told)
            h = torch.cat([h, code.to(h.dtype)], dim=1)
        return h @ self.w + self.b


class Curved(nn.Module):
    """A user's own synthesizer, seeded by itself."""

    def __init__(
        self, given: torch.Size, wanted: torch.Size, condition: Condition | None = None
    ) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(given.numel() + 100 * wanted.numel())
            self.a = nn.Linear(given.numel(), 6).double()
            self.b = nn.Linear(6, wanted.numel()).double()

    def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        y: Tensor = self.b(self.a(x).tanh())
        return y


def widths(sizes: list[int]) -> list[int]:
    """Of each stage's output."""
    stages = cut(tanh_net(), sizes)
    return [[m for m in s if isinstance(m, nn.Linear)][-1].out_features for s in stages]


def train(
    rule: Rule | list[Rule],
    sizes: list[int],
    batches: list[Batch],
    loss_fn: nn.Module,
    optimizer: Any = momentum,
    **options: Any,
) -> tuple[dict[str, Tensor], Pipeline]:
    """The engine's weights after one pass, drained but not closed."""
    pipe = Pipeline(
        tanh_net(), loss_fn, optimizer, rule=rule, balance=sizes, stages=len(sizes), **options
    )
    pipe.train(batches)
    return pipe.state_dict(), pipe


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("told", ["nothing", "labels", "numbers"])
@pytest.mark.parametrize(("lag", "update_every"), [(2, 1), (0, 1), (3, 3)])
def test_linear_synthesizers(n: int, told: str, lag: int, update_every: int) -> None:
    """DNI and cDNI, with Headrace's own linear synthesizers against the paper's joined vector."""
    sizes = SIZES[n]
    batches = labelled() if told == "labels" else batches_of(199, 4)
    loss_fn = nn.CrossEntropyLoss() if told == "labels" else nn.MSELoss()
    extra: dict[str, Any] = {
        "nothing": {"synthesizer": Linear},
        "labels": {"conditional": True, "classes": CLASSES},
        "numbers": {"conditional": True},
    }[told]
    rule = Synthetic(optimizer=sgd, lag=lag, **extra)
    got, pipe = train(rule, sizes, batches, loss_fn, update_every=update_every)
    inside = [OneHot(w, w, 0 if told == "nothing" else 3) for w in widths(sizes)[:-1]]
    want = simulate_dni(
        cut(tanh_net(), sizes),
        loss_fn,
        momentum,
        batches,
        inside,
        sgd,
        lag=lag,
        update_every=update_every,
    )
    assert_close(got, want.weights)
    assert all(max(losses) > 0 for losses in want.synthesizer_losses)
    statistics = pipe.statistics()
    for j, losses in enumerate(want.synthesizer_losses):
        assert all(s == 0 for s in statistics[j].staleness)
        # The drain has let it learn from the last ones as well.
        assert sum(statistics[j].lag.values()) == len(batches)
        mean = sum(losses[-32:]) / 32
        assert statistics[j].synthesizer_loss == pytest.approx(mean, rel=1e-9)


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("optimizer", [momentum, adamw])
def test_a_synthesizer_of_ones_own(n: int, optimizer: Any) -> None:
    """Not zero at first, Adam, another lag."""
    sizes, batches = SIZES[n], batches_of(199, 4)
    adam = partial(torch.optim.Adam, lr=0.01)
    rule = Synthetic(Curved, optimizer=adam, lag=1)
    got, _ = train(rule, sizes, batches, nn.MSELoss(), optimizer)
    inside = [Curved(torch.Size([w]), torch.Size([w])) for w in widths(sizes)[:-1]]
    want = simulate_dni(
        cut(tanh_net(), sizes), nn.MSELoss(), optimizer, batches, inside, adam, lag=1
    )
    assert_close(got, want.weights)


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("conditional", [False, True])
def test_full_unlock(n: int, conditional: bool) -> None:
    sizes, batches = SIZES[n], labelled()
    told: dict[str, Any] = {"conditional": True, "classes": CLASSES} if conditional else {}
    rule = Synthetic(
        None if conditional else Linear,
        optimizer=sgd,
        inputs="synthetic",
        input_synthesizer=Curved,
        **told,
    )
    got, pipe = train(rule, sizes, batches, nn.CrossEntropyLoss())
    outputs = widths(sizes)[:-1]
    inside = [OneHot(w, w, CLASSES if conditional else 0) for w in outputs]
    inputs = [Curved(torch.Size([5]), torch.Size([w])) for w in outputs]
    want = simulate_dni(
        cut(tanh_net(), sizes),
        nn.CrossEntropyLoss(),
        momentum,
        batches,
        inside,
        sgd,
        inputs=inputs,
    )
    assert_close(got, want.weights)
    model = tanh_net()
    model.load_state_dict(got)
    loss = nn.CrossEntropyLoss()(model(batches[0][0]), batches[0][1])
    assert pipe.evaluate(batches[:1])["loss"] == pytest.approx(loss.item(), abs=1e-10), (
        "real inputs"
    )


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("update_every", [1, 3])
@pytest.mark.parametrize("inputs", ["real", "synthetic"])
def test_p_update(n: int, update_every: int, inputs: Any) -> None:
    sizes, batches = SIZES[n], batches_of(199, 4)
    rule = Synthetic(
        Curved,
        optimizer=sgd,
        p_update=0.3,
        inputs=inputs,
        input_synthesizer=Curved if inputs == "synthetic" else None,
    )
    got, _ = train(rule, sizes, batches, nn.MSELoss(), seed=7, update_every=update_every)
    outputs = widths(sizes)[:-1]
    own = [Curved(torch.Size([5]), torch.Size([w])) for w in outputs]
    want = simulate_dni(
        cut(tanh_net(), sizes),
        nn.MSELoss(),
        momentum,
        batches,
        [Curved(torch.Size([w]), torch.Size([w])) for w in outputs],
        sgd,
        update_every=update_every,
        draws=[update_draws(7, j) for j in range(n)],
        p_update=0.3,
        inputs=own if inputs == "synthetic" else None,
    )
    assert_close(got, want.weights)


def test_one_stage_is_the_plain_loop() -> None:
    batches = batches_of(199, 4)
    rule = Synthetic()
    got, _ = train(rule, [16], batches, nn.MSELoss())
    model = tanh_net()
    plain(model, nn.MSELoss(), momentum, batches)
    assert_same(got, model.state_dict())


def test_the_first_synthetic_gradient_is_exactly_zero() -> None:
    """Plain SGD on it moves nothing but the last stage; so it is for every kind that is ours."""
    sizes, batches = SIZES[3], batches_of(4, 4)
    sgd_ = partial(torch.optim.SGD, lr=0.5)
    for rule in (
        Synthetic(),
        Synthetic(MLP),
        Synthetic(conditional=True),
        Synthetic(MLP, conditional=True),
    ):
        got, _ = train(rule, sizes, batches, nn.MSELoss(), sgd_)
        before, last = tanh_net().state_dict(), {f"{k}." for k in range(11, 16)}
        for name, value in got.items():
            moved = not torch.equal(value, before[name])
            assert moved == any(name.startswith(layer) for layer in last), name


def test_two_passes_without_a_drain_are_one_stream() -> None:
    sizes, batches = SIZES[3], batches_of(200, 4)
    with Pipeline(
        tanh_net(), nn.MSELoss(), momentum, rule=Synthetic(), balance=sizes, stages=3
    ) as pipe:
        reports = [pipe.train(batches[:20]), pipe.train(batches[20:])]
        two = pipe.state_dict()
    one, other = train(Synthetic(), sizes, batches, nn.MSELoss())
    assert_same(two, one)
    # A loss comes up one hop with every lag + 1 micro-batches.
    assert reports[0].micro_batches == 20 - 2 * 2 - 1
    assert sum(report.micro_batches for report in reports) < 50
    assert other.train(batches[:1]).micro_batches >= 1


@pytest.mark.parametrize("lag", [0, 2])
def test_losses_are_reported_once_each_and_in_order(lag: int) -> None:
    sizes, batches = SIZES[4], batches_of(199, 4)
    rule = Synthetic(Linear, optimizer=sgd, lag=lag)
    inside = [OneHot(w, w, 0) for w in widths(sizes)[:-1]]
    want = simulate_dni(
        cut(tanh_net(), sizes), nn.MSELoss(), momentum, batches, inside, sgd, lag=lag
    )
    pipe = Pipeline(tanh_net(), nn.MSELoss(), momentum, rule=rule, balance=sizes, stages=4)
    seen: list[float] = []
    pipe.train(batches, log=lambda progress: seen.append(progress.loss), log_every=1)
    pipe.drain()
    rest = pipe.train(batches[:1])
    assert seen == pytest.approx(want.losses[: len(seen)], abs=1e-10)
    left = want.losses[len(seen) :]
    samples = [len(batch[0]) for batch in batches[len(seen) :]]
    assert rest.micro_batches >= len(left)
    pipe.close()
    assert sum(samples) >= 1 and math.isfinite(rest.loss)


# A rule for each stage ------------------------------------------------------------------------


def test_a_list_of_the_same_is_the_rule() -> None:
    sizes, batches = SIZES[3], batches_of(100, 4)
    one, _ = train(Delayed("stash"), sizes, batches, nn.MSELoss())
    three, _ = train([Delayed("stash") for _ in range(3)], sizes, batches, nn.MSELoss())
    assert_same(three, one)


def test_delayed_behind_one_synthetic_stage_is_a_shorter_stream() -> None:
    """Stage 0 guesses and moves; behind it the stream is delayed as if it began there."""
    sizes, batches = SIZES[4], batches_of(200, 4)
    rules = [Synthetic(Linear, optimizer=frozen), *[Delayed("stash") for _ in range(3)]]
    got, pipe = train(rules, sizes, batches, nn.MSELoss())
    assert pipe.depths == (0, 2, 1, 0)
    # A synthesizer that never learns gives zeros, so stage 0 stays as it is.
    stages = cut(tanh_net(), sizes)
    inputs = [(stages[0](x).detach(), y) for x, y in batches]
    want = simulate(stages[1:], nn.MSELoss(), momentum, inputs, depths=depths_of(3))
    assert_close({n: v for n, v in got.items() if int(n.split(".")[0]) >= sizes[0]}, want.weights)
    # It learns `lag` updates later, and later still by the delay of the stage behind it.
    lag = pipe.statistics()[0].lag
    assert max(lag, key=lambda late: lag[late]) == 2 + 2 + 1


def frozen(params: Iterable[Any]) -> Optimizer:
    return torch.optim.SGD([p for _, p in params], lr=0.0)


@pytest.mark.parametrize("slack", [0, 1])
def test_a_delayed_stage_before_a_synthetic_one_waits_for_that_one_only(slack: int) -> None:
    sizes = SIZES[4]
    rules: list[Rule] = [Delayed("stash"), Delayed("stash"), Synthetic(), Delayed("stash")]
    pipe = Pipeline(
        tanh_net(), nn.MSELoss(), momentum, rule=rules, balance=sizes, stages=4, slack=slack
    )
    assert pipe.depths == (2 * (1 + slack), 1 + slack, 0, 0)
    pipe.train(batches_of(200, 4))
    staleness = [max(s.staleness) for s in pipe.statistics()]
    assert staleness == [2 * (1 + slack), 1 + slack, 0, 0]


# Local losses ---------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["stream", "1f1b", "gpipe"])
def test_local_is_a_loop_over_stages_that_know_nothing_of_each_other(schedule: str) -> None:
    sizes, batches = SIZES[3], batches_of(160, 8)
    made: list[nn.Module] = []

    def head(shape: torch.Size, outputs: int) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(shape.numel())
            made.append(nn.Linear(shape.numel(), outputs).double())
        return made[-1]

    # More than may be on their way under `stream`: gpipe's last stage gives nothing back before.
    cuts = 1 if schedule == "stream" else 8
    got, pipe = train(
        Local(3, head=head), sizes, batches, nn.MSELoss(), schedule=schedule, micro_batches=cuts
    )
    stages, loss_fn = cut(tanh_net(), sizes), nn.MSELoss()
    heads = [head(torch.Size([w]), 3) for w in widths(sizes)[:-1]]
    modules = [nn.Sequential(s, h) for s, h in zip(stages, [*heads, nn.Identity()], strict=True)]
    movers = [momentum(list(m.named_parameters())) for m in modules]
    for x, y in batches:
        for stage, module, mover in zip(stages, modules, movers, strict=True):
            mover.zero_grad()
            loss_fn(module(x), y).backward()
            with torch.no_grad():
                x = stage(x)
            mover.step()
    want = {n: v for stage in stages for n, v in stage.state_dict().items()}
    assert_close(got, want)
    statistics = pipe.statistics()
    assert all(s.local_loss is not None for s in statistics[:-1]), "each tells its own loss"
    assert statistics[-1].local_loss is None
    assert all(set(s.staleness) == {0} for s in statistics)


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_local_before_exact_stages_under_a_flush(schedule: str) -> None:
    """The stages behind a local one are trained as one network on what it gives."""
    sizes, (x, y) = SIZES[3], batches_of(16, 16)[0]
    rules: list[Rule] = [Local(3, optimizer=frozen), Exact(), Exact()]
    options: dict[str, Any] = {"schedule": schedule, "micro_batches": 8}
    got, _ = train(rules, sizes, [(x, y)], nn.MSELoss(), sgd, **options)
    stages = cut(tanh_net(), sizes)
    behind = nn.Sequential(*stages[1:])
    nn.MSELoss()(behind(stages[0](x).detach()), y).backward()
    sgd(behind.parameters()).step()
    want = {n: v for stage in stages[1:] for n, v in stage.state_dict().items()}
    assert_close({n: got[n] for n in want}, want)
    before = stages[0].state_dict()
    assert any(not torch.equal(got[n], before[n]) for n in before), "on a loss of its own"
