"""What users of synthetic gradients and local losses count on: oracles, figures, refusals."""

import math
import re
from collections.abc import Iterable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from headrace.pipeline import InputError, Pipeline, Progress
from headrace.pipeline.rules import Delayed, Exact, Local, Rule, Synthetic
from headrace.pipeline.synthesizers import MLP, Convolution, Linear, Sequence, start_at_zero

from .helpers import SIZES, assert_same, batches_of, momentum, tanh_net

MSE = nn.MSELoss()


def adam(lr: float) -> Any:
    return partial(torch.optim.Adam, lr=lr)


def still(params: Iterable[tuple[str, nn.Parameter]]) -> Optimizer:
    return torch.optim.SGD(params, lr=0.0)


def pipeline(rule: Any, n: int = 3, **options: Any) -> Pipeline:
    return Pipeline(
        tanh_net(), MSE, momentum, **{"rule": rule, "balance": SIZES[n], "stages": n, **options}
    )


# The linear oracle ----------------------------------------------------------------------------


def linear_chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3)).double()


@pytest.mark.parametrize("conditional", [True, False])
def test_a_linear_synthesizer_that_knows_the_target_is_exact(conditional: bool) -> None:
    """With a linear network and MSE, δ = 2/3 Wᵀ(W h - y) is linear in (h, y), and in h it is not.

    Czarnecki et al. 2017. The network stands still, so that there is one δ to be found. Stage 0
    learns what stage 1 makes of its own guess, which is linear in any case.
    """
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(400, 32, 6, generator=generator, dtype=torch.float64)
    y = torch.randn(400, 32, 3, generator=generator, dtype=torch.float64)
    rule = Synthetic(Linear, conditional=conditional, optimizer=adam(0.02))
    pipe = Pipeline(linear_chain(), MSE, still, rule=rule, stages=3, balance=[1, 1, 1])
    pipe.train([*zip(x, y, strict=True)])
    first, second, last = pipe.statistics()
    assert last.synthesizer_loss is None and last.cosine is None
    for stage in (first, second):
        assert stage.synthesizer_loss is not None and stage.cosine is not None
        if conditional:
            assert stage.synthesizer_loss < 1e-5
            assert stage.cosine > 0.9999
        elif stage is second:
            assert stage.synthesizer_loss > 0.01
            assert stage.cosine < 0.9


# What is told ---------------------------------------------------------------------------------


def test_figures_of_every_stage_in_logs_and_statistics() -> None:
    logs: list[Progress] = []
    pipe = pipeline([Local(3), Synthetic(), Delayed()])
    pipe.train(batches_of(120, 4), log=logs.append, log_every=5)
    last = logs[-1]
    assert [v is None for v in last.synthesizer_loss] == [True, False, True]
    assert [v is None for v in last.cosine] == [True, False, True]
    assert [v is None for v in last.local_loss] == [False, True, True]
    # It moved with its own micro-batch, and with the two after it, before it learned.
    assert last.lag == (None, 3, None)
    rows = pipe.statistics()
    assert [row.local_loss is None for row in rows] == [False, True, True]
    assert [row.lag_mean is None for row in rows] == [True, False, True]
    # The drain has nothing to wait for: it comes sooner there.
    assert rows[1].lag == {3: 28, 2: 1, 1: 1}
    assert rows[1].lag_mean == (3 * 28 + 2 + 1) / 30


@pytest.mark.parametrize(("lag", "late"), [(0, 1), (1, 2), (5, 6)])
def test_the_lag_is_the_same_on_every_stage_and_does_not_depend_on_the_loss(
    lag: int, late: int
) -> None:
    pipe = pipeline(Synthetic(lag=lag), 4)
    pipe.train(batches_of(200, 4))
    for stage in pipe.statistics()[:-1]:
        assert max(stage.lag, key=lambda value: stage.lag[value]) == late
        assert stage.in_flight == 1, "nothing waits with a graph"


def test_at_most_ahead_are_on_their_way() -> None:
    """In one process a stage goes on until it waits: the first reaches its bound at once."""
    seen: list[int] = []

    class Count(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(len(first.awaiting_gradient))
            return x

    model = nn.Sequential(nn.Linear(5, 4), Count(), nn.Linear(4, 4), nn.Linear(4, 3)).double()
    for rule in (Synthetic(lag="free", ahead=5), Local(3, ahead=5)):
        pipe = Pipeline(model, MSE, momentum, rule=rule, stages=3, balance=[2, 1, 1])
        first = pipe._engines[0].stage
        pipe.train(batches_of(160, 4))
        assert max(seen) == 5
        pipe.drain()
        assert not first.awaiting_gradient
        seen.clear()


def test_the_same_again() -> None:
    """Deterministic lags, and draws from the seed."""

    def run(seed: int, **options: Any) -> dict[str, Tensor]:
        with pipeline(Synthetic(MLP, **options), seed=seed) as pipe:
            pipe.train(batches_of(200, 4))
            return pipe.state_dict()

    assert_same(run(1), run(1))
    assert_same(run(1, p_update=0.5), run(1, p_update=0.5))
    assert any(not torch.equal(v, run(2)[n]) for n, v in run(1).items())


# Together with the rest -----------------------------------------------------------------------


@pytest.mark.parametrize("rule", [Synthetic(), Synthetic(inputs="synthetic"), Local(3)])
def test_autocast_clipping_schedulers_and_skipping_together(rule: Rule) -> None:
    model = tanh_net().float()
    batches = [(x.float(), y.float()) for x, y in batches_of(200, 4)]
    with Pipeline(
        model,
        MSE,
        momentum,
        rule=rule,
        stages=3,
        balance=SIZES[3],
        autocast=torch.bfloat16,
        clip_grad_norm=0.05,
        update_every=2,
        micro_batches=2,
        on_nonfinite="skip",
        scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99),
    ) as pipe:
        reports = [pipe.train(batches) for _ in range(3)]
        assert pipe.statistics()[0].updates == 150
        assert pipe.statistics()[0].learning_rate == pytest.approx(0.05 * 0.99**150)
        before = pipe.evaluate(batches)["loss"]
    assert reports[-1].skipped == 0
    assert before < reports[0].loss


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_local_under_a_flush_clips_by_the_norm_of_all_stages(schedule: str) -> None:
    options: dict[str, Any] = {"schedule": schedule, "micro_batches": 2, "clip_grad_norm": 1e-3}
    rule = Local(3, optimizer=still)
    sgd = partial(torch.optim.SGD, lr=1.0)
    pipe = Pipeline(tanh_net(), MSE, sgd, rule=rule, stages=3, balance=SIZES[3], **options)
    before = tanh_net().state_dict()
    pipe.train(batches_of(8, 8))
    moved = [v - before[n] for n, v in pipe.state_dict().items()]
    assert torch.cat([m.flatten() for m in moved]).norm().item() == pytest.approx(1e-3, rel=1e-4)


class Split(nn.Module):
    """One tensor into two, and a number that has no gradient."""

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"a": x, "b": [x.square(), torch.arange(len(x))]}


class Join(nn.Module):
    def forward(self, both: dict[str, Any]) -> Tensor:
        a, (b, _) = both["a"], both["b"]
        result: Tensor = a + b
        return result


def test_an_output_of_several_tensors_has_a_synthesizer_for_each() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), Split(), Join(), nn.Linear(6, 3)).double()
    with Pipeline(model, MSE, momentum, rule=Synthetic(), stages=2, balance=[3, 2]) as pipe:
        first = pipe.train(batches_of(400, 4))
        second = pipe.train(batches_of(400, 4))
        assert second.loss < first.loss
        assert pipe.statistics()[0].cosine is not None


def test_maps_and_frozen_stages() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(4 * 36, 3),
    )  # fmt: skip
    model[0].requires_grad_(False)
    rule = Synthetic(partial(Convolution, width=8, kernel=3), conditional=True, classes=3)
    batches = [(torch.randn(8, 1, 6, 6), torch.randint(0, 3, (8,))) for _ in range(12)]
    with Pipeline(
        model, nn.CrossEntropyLoss(), momentum, rule=rule, stages=3, balance=[2, 2, 2]
    ) as pipe:
        pipe.train(batches)
        rows = pipe.statistics()
    assert rows[0].cosine is None and rows[0].lag == {}, "nothing there to train"
    assert rows[1].cosine is not None


def test_a_language_model_told_the_next_tokens() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 11))

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten())

    text = torch.randint(0, 11, (300, 16, 9))
    batches = [(row[:, :-1], row[:, 1:]) for row in text]
    rule = Synthetic(Linear, conditional=True, classes=11, optimizer=adam(0.01))
    with Pipeline(model, loss, adam(0.01), rule=rule, stages=2, balance=[1, 3]) as pipe:
        pipe.train(batches)
        row = pipe.statistics()[0]
    assert row.cosine is not None and row.cosine > 0.3


def test_loading_weights_starts_synthesizers_anew() -> None:
    pipe = pipeline(Synthetic())
    batches = batches_of(100, 4)
    pipe.train(batches)
    pipe.load_state_dict(tanh_net().state_dict())
    assert pipe.statistics()[0].cosine is None
    pipe.train(batches)


# What is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Synthetic(lag=-1), "lag=-1: give a whole number >= 0, or 'free'"),
        (lambda: Synthetic(lag="soon"), "lag='soon'"),  # type: ignore[arg-type]
        (lambda: Synthetic(ahead=0), "ahead=0: give a whole number >= 1"),
        (lambda: Synthetic(p_update=0), "p_update=0: give a share in (0, 1]"),
        (lambda: Synthetic(inputs="guess"), "inputs='guess': write 'real' or 'synthetic'"),  # type: ignore[arg-type]
        (lambda: Synthetic(input_synthesizer=MLP), "has no meaning with inputs='real'"),
        (lambda: Synthetic(classes=10), "classes=10 needs conditional=True"),
        (lambda: Synthetic(conditional=True, classes=0), "classes=0"),
        (lambda: Local(0), "outputs=0: give a whole number >= 1"),
        (lambda: Local(3, ahead=0), "ahead=0: give a whole number >= 1"),
    ],
)
def test_arguments_that_cannot_be(make: Any, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        make()


def test_what_cannot_be_called() -> None:
    with pytest.raises(TypeError, match="synthesizer='mlp' cannot be called: give a class"):
        Synthetic("mlp")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="head=3 cannot be called"):
        Local(3, head=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rule": Synthetic(), "schedule": "1f1b"}, "rule synthetic under schedule '1f1b'"),
        ({"rule": [Synthetic()]}, "rule= is a list of 1, for 3 stages: give one for each stage"),
        ({"rule": [Synthetic(), Exact(), Local(3)]}, "rule exact under schedule 'stream'"),
        ({"rule": Synthetic(), "slack": 1}, "slack=1 hides links from stages that wait"),
        ({"rule": Local(3), "slack": [0, 1]}, "under this rule none does: leave it out"),
        (
            {"rule": [Delayed(), Synthetic(inputs="synthetic"), Delayed()]},
            "inputs='synthetic' on some stages only",
        ),
    ],
)
def test_pairs_that_cannot_be(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        pipeline(**options)
    with pytest.raises(TypeError, match="rule='synthetic': give an object, or a list"):
        pipeline(["synthetic"] * 3)


class Short(nn.Module):
    def __init__(self, *_: Any) -> None:
        super().__init__()

    def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        return x[:, :2]


def scalar_only(given: torch.Size, wanted: torch.Size) -> nn.Module:
    raise AssertionError


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        (Synthetic(Short), "the synthesizer Short gave"),
        (Synthetic(Convolution), "rule synthetic on stage 0: a convolutional synthesizer from"),
        (Synthetic(scalar_only), "rule synthetic on stage 0: TypeError: scalar_only() takes 2"),  # type: ignore[arg-type]
        (Synthetic(conditional=True, classes=3), "classes=3, but the target is torch.float64"),
        (
            Local(3, head=lambda shape: None),
            "rule local on stage 0, with a head of 3 outputs for float64[4, 11] and the",
        ),  # type: ignore
        (
            Synthetic(inputs="synthetic", input_synthesizer=Convolution),
            "rule synthetic on stage 1, input_synthesizer: a convolutional synthesizer",
        ),
    ],
)
def test_synthesizers_that_do_not_fit_are_named_at_the_first_micro_batch(
    rule: Rule, says: str
) -> None:
    with pytest.raises(InputError, match=re.escape(says)):
        pipeline(rule).train(batches_of(40, 4))


def test_local_and_full_unlock_need_one_tensor() -> None:
    model = nn.Sequential(nn.Linear(5, 6), Split(), Join(), nn.Linear(6, 3)).double()
    for rule, says in (
        (Local(3), "rule local needs one tensor of numbers between stages"),
        (Synthetic(inputs="synthetic"), "inputs='synthetic' guesses one tensor of numbers from"),
    ):
        pipe = Pipeline(model, MSE, momentum, rule=rule, stages=2, balance=[2, 2])
        with pytest.raises(InputError, match=says):
            pipe.train(batches_of(8, 4))


# Not finite -----------------------------------------------------------------------------------


class Spike(nn.Module):
    """Infinite at one forward, or in one backward."""

    def __init__(self, at: int, backward: bool = False) -> None:
        super().__init__()
        self.at, self.backward, self.count = at, backward, 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        if self.count - 1 != self.at:
            return x
        if not self.backward:
            return x * math.inf
        y = x.clone()
        if y.requires_grad:  # it is run again without, to find the layer at fault
            y.register_hook(lambda gradient: gradient * math.inf)
        return y


def spiky(stage: int, backward: bool = False) -> nn.Sequential:
    layers = list(tanh_net())
    place = sum(SIZES[3][:stage]) + (2 if stage else 1)  # behind the stage's first Linear
    return nn.Sequential(*layers[:place], Spike(11, backward), *layers[place:])


@pytest.mark.parametrize("rule", [Synthetic(Linear), Local(3)])
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("backward", [False, True])
def test_a_micro_batch_that_is_not_finite_stops_or_is_skipped(
    rule: Rule, stage: int, backward: bool
) -> None:
    sizes = [size + (j == stage) for j, size in enumerate(SIZES[3])]
    options: dict[str, Any] = {"rule": rule, "balance": sizes, "stages": 3}
    with pytest.raises(FloatingPointError, match=rf"^stage {stage} of 3, micro-batch 11: "):
        Pipeline(spiky(stage, backward), MSE, momentum, **options).train(batches_of(80, 4))
    pipe = Pipeline(spiky(stage, backward), MSE, momentum, **options, on_nonfinite="skip")
    pipe.train(batches_of(160, 4))
    assert all(value.isfinite().all() for value in pipe.state_dict().values())
    skipped = [row.skipped for row in pipe.statistics()]
    assert skipped[stage] == 1
    assert sum(skipped[:stage]) == 0, "those before it moved on their own guess"


def test_a_synthesizer_that_diverges_is_named() -> None:
    rule = Synthetic(Linear, optimizer=partial(torch.optim.SGD, lr=1e6))
    with pytest.raises(FloatingPointError, match=r"the learning rate of its synthesizer|lower"):
        pipeline(rule).train(batches_of(4000, 4))


@pytest.mark.parametrize("rule", [Synthetic(), Synthetic(inputs="synthetic"), Local(3)])
def test_compiled_stages_give_the_same_numbers(rule: Rule) -> None:
    def run(**options: Any) -> dict[str, Tensor]:
        with pipeline(rule, **options) as pipe:
            pipe.train(batches_of(80, 4))
            return pipe.state_dict()

    assert_same(run(compile={"backend": "eager"}), run())


# What a fresh reader found ---------------------------------------------------------------------


class Noisy(nn.Module):
    """A synthesizer, or a head, that draws."""

    def __init__(self, given: torch.Size, *_: Any) -> None:
        super().__init__()
        self.drop, self.layer = nn.Dropout(0.5), nn.Linear(given[-1], given[-1]).double()

    def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        y: Tensor = self.layer(self.drop(x))
        return y


def test_what_a_synthesizer_draws_disturbs_no_layer() -> None:
    """The first stage lives on the global random state, as a plain loop would."""
    states = []
    for rule in (Synthetic(Linear), Synthetic(Noisy), Synthetic(Noisy, inputs="synthetic")):
        torch.manual_seed(0)
        pipeline(rule).train(batches_of(20, 4))
        states.append(torch.get_rng_state())
    assert all(torch.equal(state, states[0]) for state in states)


def test_an_output_that_the_next_stage_does_not_use_hides_nothing() -> None:
    class Half(nn.Module):
        def forward(self, both: dict[str, Any]) -> Tensor:
            result: Tensor = both["a"]
            return result

    model = nn.Sequential(nn.Linear(5, 6), Split(), Half(), nn.Linear(6, 3)).double()
    with Pipeline(model, MSE, momentum, rule=Synthetic(), stages=2, balance=[2, 2]) as pipe:
        pipe.train(batches_of(80, 4))
        row = pipe.statistics()[0]
    assert row.cosine is not None and row.synthesizer_loss is not None


def test_targets_of_one_number_a_sample() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1), nn.Flatten(0)).double()
    batches = [(x, y[:, 0]) for x, y in batches_of(40, 4)]
    for n, balance in ((2, [2, 2]), (3, [1, 2, 1])):
        rule = Synthetic(conditional=True)
        with Pipeline(model, MSE, momentum, rule=rule, stages=n, balance=balance) as pipe:
            pipe.train(batches)
    with pytest.raises(InputError, match=r"the head gives float64\[4, 1\].*or give a head="):
        Pipeline(model, MSE, momentum, rule=Local(1), stages=2, balance=[2, 2]).train(batches)


@pytest.mark.parametrize("rule", [Synthetic(), Synthetic(inputs="synthetic"), Local(3)])
def test_a_model_in_bfloat16(rule: Rule) -> None:
    model = tanh_net().bfloat16()
    batches = [(x.bfloat16(), y.bfloat16()) for x, y in batches_of(40, 4)]
    with Pipeline(model, MSE, momentum, rule=rule, stages=3, balance=SIZES[3]) as pipe:
        pipe.train(batches)


def test_a_head_follows_the_stages_schedule_and_clipping() -> None:
    heads: list[nn.Module] = []

    def head(shape: torch.Size, outputs: int) -> nn.Module:
        heads.append(nn.Linear(shape[-1], outputs).double())
        return heads[-1]

    def train(**options: Any) -> float:
        heads.clear()
        sgd = partial(torch.optim.SGD, lr=1.0)
        with Pipeline(
            tanh_net(), MSE, sgd, rule=Local(3, head=head), stages=2, balance=SIZES[2], **options
        ) as pipe:
            pipe.train(batches_of(4, 4))
            start = [p.detach().clone() for p in heads[0].parameters()]
            pipe.train(batches_of(40, 4))
            now = heads[0].parameters()
            return sum(float((a - b).detach().norm()) for a, b in zip(now, start, strict=True))

    assert train() > 0.1
    assert train(clip_grad_norm=1e-6) < 1e-4
    assert train(scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 1e-9)) < 1e-6


def test_an_output_that_grows_or_needs_a_gradient_later() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.count = 0

        def forward(self, x: Tensor) -> Any:
            self.count += 1
            if self.count < 4:
                return [x.detach()]
            return [x] if self.count < 8 else [x, x.square()]

    class Sum(nn.Module):
        def forward(self, xs: list[Tensor]) -> Tensor:
            result: Tensor = torch.stack(xs).sum(0)
            return result

    model = nn.Sequential(nn.Linear(5, 6), Late(), Sum(), nn.Linear(6, 3)).double()
    with Pipeline(model, MSE, momentum, rule=Synthetic(), stages=2, balance=[2, 2]) as pipe:
        pipe.train(batches_of(80, 4))
        assert len(pipe._engines[0].stage.rule._synthesizers) == 2  # type: ignore[attr-defined]
        assert sum(pipe.statistics()[0].lag.values()) == 17


class InPlace(nn.Module):
    """A synthesizer that works on its input in place, or does not, and gives a part of it back."""

    def __init__(self, in_place: bool, *_: Any) -> None:
        super().__init__()
        self.in_place, self.scale = in_place, nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        x = x.relu_() if self.in_place else x.relu()
        return x * self.scale if torch.is_grad_enabled() else x


def test_a_synthesizer_may_work_in_place_and_give_its_input() -> None:
    found = []
    for in_place in (True, False):
        with pipeline(Synthetic(partial(InPlace, in_place))) as pipe:
            pipe.train(batches_of(40, 4))
            row = pipe.statistics()[0]
            found.append((row.synthesizer_loss, row.cosine, pipe.state_dict()))
    assert found[0][:2] == found[1][:2]
    assert_same(found[0][2], found[1][2])


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (lambda *a: 3, "what makes it gave a int: give an nn.Module"),
        (lambda *a: nn.Linear(11, 11).double(), "the synthesizer Linear cannot be called with"),
        (lambda *a: {}["x"], "KeyError: 'x'"),
    ],
)
def test_factories_at_fault(made: Any, says: str) -> None:
    with pytest.raises(InputError, match=re.escape(f"rule synthetic on stage 0: {says}")):
        pipeline(Synthetic(made)).train(batches_of(40, 4))


@pytest.mark.parametrize(
    ("target", "says"),
    [
        (torch.zeros(4, 1, dtype=torch.int64), "labels of shape (4, 1) beside an output of shape"),
        (torch.zeros(4, 5, dtype=torch.int64), "they must be of shape (4,), one for a sample"),
    ],
)
def test_labels_that_fit_no_output(target: Tensor, says: str) -> None:
    batches = [(x, target) for x, _ in batches_of(40, 4)]
    pipe = pipeline(Synthetic(conditional=True, classes=3))
    with pytest.raises(InputError, match=re.escape(says)):
        pipe.train(batches)


def test_a_label_that_is_too_large_later() -> None:
    labels = [torch.zeros(4, dtype=torch.uint8) for _ in range(10)]
    labels[7][2] = 9
    batches = [(x, y) for (x, _), y in zip(batches_of(40, 4), labels, strict=True)]
    model = tanh_net()

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return output.square().mean()

    rule = Synthetic(conditional=True, classes=3)
    pipe = Pipeline(model, loss, momentum, rule=rule, stages=3, balance=SIZES[3])
    with pytest.raises(InputError, match="on stage 0: classes=3, but there is a label 9: write"):
        pipe.train(batches)


def test_tokens_need_to_be_told_of_under_full_unlock() -> None:
    model = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11))

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten())

    text = torch.randint(0, 11, (30, 4, 9))
    batches = [(row[:, :-1], row[:, 1:]) for row in text]
    pipe = Pipeline(
        model, loss, adam(0.01), rule=Synthetic(inputs="synthetic"), stages=3, balance=[1, 1, 1]
    )
    with pytest.raises(InputError, match=r"give input_synthesizer=partial\(Sequence, vocabulary"):
        pipe.train(batches)
    rule = Synthetic(inputs="synthetic", input_synthesizer=partial(Sequence, vocabulary=11))
    with Pipeline(model, loss, adam(0.01), rule=rule, stages=3, balance=[1, 1, 1]) as pipe:
        pipe.train(batches)


def test_a_synthesizer_that_turns_nan_is_told_from_a_gradient_that_is() -> None:
    class Breaks(nn.Module):
        def __init__(self, *_: Any) -> None:
            super().__init__()
            self.count, self.b = 0, nn.Parameter(torch.zeros(1, dtype=torch.float64))

        def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
            self.count += not torch.is_grad_enabled()
            bad = torch.is_grad_enabled() and self.count > 9
            return (self.b + (math.nan if bad else 0.0)).expand_as(x)

    with pytest.raises(FloatingPointError, match="the gradient that a synthesizer makes of it is"):
        pipeline(Synthetic(Breaks)).train(batches_of(80, 4))


def test_a_last_part_of_several_layers_is_not_zeroed_whole() -> None:
    class Deep(nn.Module):
        def __init__(self, given: torch.Size, *_: Any) -> None:
            super().__init__()
            n = given.numel()
            self.last = nn.Sequential(nn.Linear(n, 9), nn.ReLU(), nn.Linear(9, n), nn.Identity())

        def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
            y: Tensor = self.last(x)
            return y

    deep = Deep(torch.Size([4]))
    start_at_zero(deep)
    assert deep.last[0].weight.abs().sum() > 0
    assert deep.last[2].weight.abs().sum() == 0 and deep.last[2].bias.abs().sum() == 0


def test_pairs_without_a_meaning() -> None:
    for make, says in (
        (lambda: Synthetic(lag=2, ahead=5), "ahead=5 has no meaning with lag=2"),
        (lambda: Synthetic(conditional="yes"), "conditional='yes': write True or False"),  # type: ignore[arg-type]
        (lambda: Synthetic(p_update=True), "p_update=True: give a share"),
        (lambda: pipeline([]), "rule= is a list of 0, for 3 stages"),
    ):
        with pytest.raises(ValueError, match=re.escape(says)):
            make()
    with pytest.raises(TypeError, match=r"as in optimizer=lambda params: torch.optim.Adam"):
        Synthetic(optimizer="Adam")  # type: ignore[arg-type]
