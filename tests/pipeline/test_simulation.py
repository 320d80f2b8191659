"""A Simulation against a Pipeline whose stages take turns: bit for bit, in all that is told."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from headrace.pipeline import Pipeline
from headrace.pipeline.corrections import DelayCompensation, LearningRate
from headrace.pipeline.rules import Delayed, Rule
from headrace.pipeline.simulation import Simulation
from headrace.pipeline.together import Together, runs_together

from ..distributed import training
from ..distributed.training import CASES
from .alone import MSE
from .helpers import adamw, assert_same, batches_of, momentum, tanh_net
from .odd_models import ODD, Do
from .test_features_models import made, stages_of

KINDS = (Pipeline, Simulation)
WEIGHTS = ("stash", "current", "predict")


def both(make: Any, *arguments: Any) -> list[dict[str, Tensor]]:
    """The weights after two trainings without a drain between them, of each kind."""
    found = []
    for kind in KINDS:
        torch.manual_seed(0)
        pipe, batches = make(kind, *arguments)
        with pipe:
            pipe.train(batches)
            pipe.train(batches)
            weights = pipe.state_dict()
            together = isinstance(pipe._driver, Together)
        assert together == (kind is Simulation)
        found.append(weights)
    return found


@pytest.mark.parametrize("name", CASES)
def test_the_same_account(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every rule and schedule: those that cannot run together take turns."""
    stages, sizes = 4, training.SIZES[4]
    wanted = training.run_case(CASES[name], stages, sizes)
    monkeypatch.setattr(training, "Pipeline", Simulation)
    got = training.run_case(CASES[name], stages, sizes)
    for each in dataclasses.fields(wanted):
        ours, theirs = getattr(got, each.name), getattr(wanted, each.name)
        if each.name in ("halfway", "weights", "own"):
            assert_same(ours, theirs)
        elif isinstance(theirs, Tensor):
            assert torch.equal(ours, theirs)
        else:
            assert ours == theirs, each.name


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", ODD)
def test_odd_models(name: str, weights: str) -> None:
    stages = stages_of(name)[-1]

    def make(kind: type[Pipeline]) -> Any:
        odd = made(name)
        pipe = kind(
            odd.model,
            odd.loss_fn,
            momentum,
            rule=Delayed(weights),
            stages=stages,
            balance=odd.balance(stages),
            device="cpu",
        )
        return pipe, odd.batches

    assert_same(*both(make))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_tensor_that_passes_by_several_stages(weights: str) -> None:
    """Its gradients are added up stage by stage: in another order they would round otherwise."""

    def make(kind: type[Pipeline]) -> Any:
        def use(x: Any) -> Any:
            h, kept = x
            return (h + h * kept).tanh() + kept.sin() + kept * 0.3, kept

        layers = [
            nn.Linear(5, 7),
            Do(lambda h: (h, h)),
            *(Do(use) for _ in range(3)),
            Do(lambda x: x[0] + x[1].cos() + x[1].sin() * x[1].tanh()),
            nn.Linear(7, 3),
        ]
        model = nn.Sequential(*layers)
        pipe = kind(model, MSE, momentum, rule=Delayed(weights), stages=5, balance=[2, 1, 1, 1, 2])
        return pipe, batches_of(60, 4, dtype=torch.float32)

    assert_same(*both(make))


def rerun(part: nn.Module) -> nn.Module:
    return Do(lambda x: checkpoint(part, x, use_reentrant=False), part)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_checkpoints(weights: str) -> None:
    """Layers run again in the backward, with the weights it uses."""

    def make(kind: type[Pipeline]) -> Any:
        parts = [nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Dropout(0.2)) for _ in range(4)]
        model = nn.Sequential(*map(rerun, parts), nn.Linear(5, 3))
        pipe = kind(model, MSE, adamw, rule=Delayed(weights), stages=3, balance=[2, 2, 1])
        return pipe, batches_of(40, 4, dtype=torch.float32)

    assert_same(*both(make))


@pytest.mark.parametrize("weights", ["stash", "predict"])
def test_corrections(weights: str) -> None:
    def make(kind: type[Pipeline]) -> Any:
        corrections = [LearningRate("inverse"), DelayCompensation(0.1)]
        pipe = kind(
            tanh_net(),
            MSE,
            momentum,
            rule=Delayed(weights),
            corrections=corrections,
            stages=4,
            balance=[4] * 4,
            update_every=2,
        )
        return pipe, batches_of(60, 4)

    assert_same(*both(make))


def test_a_skipped_update() -> None:
    """Where one stage's gradient is not finite and another's is, only that one's is left out."""

    def explode(gradient: Tensor) -> Tensor:
        return gradient * math.inf

    def make(kind: type[Pipeline]) -> Any:
        count = iter(range(10_000))

        def sometimes(x: Tensor) -> Tensor:
            if torch.is_grad_enabled() and next(count) % 5 == 3:
                x.register_hook(explode)  # type: ignore[no-untyped-call]
            return x

        model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5), Do(sometimes), nn.Linear(5, 3))
        pipe = kind(model, MSE, momentum, stages=3, balance=[1, 2, 1], on_nonfinite="skip")
        return pipe, batches_of(60, 4, dtype=torch.float32)

    found = []
    for kind in KINDS:
        torch.manual_seed(0)
        pipe, batches = make(kind)
        pipe.train(batches)
        found.append(([stage.skipped for stage in pipe.statistics()], pipe.state_dict()))
    assert found[0][0] == found[1][0] == [3, 3, 0]
    assert_same(found[1][1], found[0][1])


def test_a_loss_that_is_not_finite_stops() -> None:
    batches = batches_of(40, 4)
    batches[4][0][0, 0] = math.nan
    pipe = Simulation(tanh_net(), MSE, momentum, stages=4, balance=[4] * 4)
    with pytest.raises(FloatingPointError, match="stage 0 of 4, micro-batch 4: its input is not"):
        pipe.train(batches)
    with pytest.raises(RuntimeError, match="has ended, by NonFiniteError"):
        pipe.train(batches)


def test_an_error_of_a_layer_names_it() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(3, 3), nn.Tanh())
    pipe = Simulation(model, MSE, momentum, stages=2, balance=[2, 2])
    with pytest.raises(RuntimeError) as caught:
        pipe.train(batches_of(8, 4, dtype=torch.float32))
    assert caught.value.__notes__ == [
        "headrace: in stage 1 of 2, layer '2' (Linear), forward of micro-batch 0"
    ]


def test_a_loader_and_a_first_stage_that_draw_from_one_state() -> None:
    """The first stage runs later than the loader is read, and draws what it would have."""
    data = TensorDataset(torch.randn(40, 5), torch.randn(40, 3))

    def make(kind: type[Pipeline]) -> Any:
        model = nn.Sequential(
            nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3), nn.Tanh()
        )
        pipe = kind(model, MSE, momentum, stages=3, balance=[3, 1, 1])
        return pipe, DataLoader(data, batch_size=4, shuffle=True)

    assert_same(*both(make))


def test_a_first_stage_that_draws_sometimes() -> None:
    calls = iter(range(100))
    draws = Do(lambda x: nn.functional.dropout(x, 0.5 if next(calls) > 4 else 0.0))
    model = nn.Sequential(draws, nn.Linear(5, 4), nn.Linear(4, 3))
    pipe = Simulation(model, MSE, momentum, stages=2, balance=[1, 2])
    with pytest.raises(RuntimeError, match="for some micro-batches only"):
        pipe.train(batches_of(40, 4, dtype=torch.float32))


def test_which_rules_run_together() -> None:
    assert [runs_together(Delayed(w)) for w in (*WEIGHTS, "replay")] == [True, True, True, False]
    assert not runs_together(Rule())
