"""Corrections that are chosen by the optimizer: what is chosen, and that it is then at work."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Muon, NAdam, Optimizer, RMSprop

from headrace.pipeline import Pipeline
from headrace.pipeline.corrections import (
    AsynchronousNesterov,
    Auto,
    BasisRotation,
    Correction,
    GapAware,
    SpikeCompensation,
    WeightPrediction,
)
from headrace.pipeline.errors import InputError
from headrace.pipeline.rules import Delayed

from .alone import MSE
from .helpers import SIZES, assert_close, assert_same, batches_of, clone, tanh_net


def muon(params: Sequence[tuple[str, nn.Parameter]]) -> list[Optimizer]:
    matrices = [(n, p) for n, p in params if p.dim() == 2]
    rest = [(n, p) for n, p in params if p.dim() != 2]
    return [Muon(matrices, lr=0.01), NAdam(rest, lr=3e-3)]


MOMENTUM = partial(SGD, lr=0.02, momentum=0.9)
NESTEROV = partial(SGD, lr=0.02, momentum=0.9, nesterov=True)

CHOICES: list[tuple[Any, Callable[[], list[Correction]]]] = [
    (muon, lambda: [WeightPrediction(of="Muon"), SpikeCompensation()]),
    (MOMENTUM, lambda: [GapAware(), SpikeCompensation()]),
    (NESTEROV, lambda: [GapAware()]),
    (partial(SGD, lr=0.02), list),
    (partial(Adam, lr=3e-3), lambda: [BasisRotation()]),
    (partial(AdamW, lr=3e-3), lambda: [BasisRotation()]),
    (partial(NAdam, lr=3e-3), lambda: [BasisRotation()]),
    (partial(Adam, lr=3e-3, weight_decay=0.1), lambda: [WeightPrediction("momentum")]),
    (partial(AdamW, lr=3e-3, amsgrad=True), lambda: [WeightPrediction("momentum")]),
    (partial(RMSprop, lr=3e-3), list),
]
IDS = [
    "muon",
    "momentum",
    "nesterov",
    "sgd",
    "adam",
    "adamw",
    "nadam",
    "decay",
    "amsgrad",
    "rmsprop",
]


def run(optimizer: Any, corrections: Sequence[Correction], **more: Any) -> dict[str, torch.Tensor]:
    with Pipeline(
        tanh_net(dtype=torch.float32), MSE, optimizer, stages=3, balance=SIZES[3],
        corrections=corrections, **more,
    ) as pipe:  # fmt: skip
        pipe.train(batches_of(50, 5, dtype=torch.float32))
        return clone(pipe.state_dict())


@pytest.mark.parametrize(("optimizer", "chosen"), CHOICES, ids=IDS)
def test_what_is_chosen(optimizer: Any, chosen: Callable[[], list[Correction]]) -> None:
    assert_same(run(optimizer, [Auto()]), run(optimizer, chosen()))


@pytest.mark.parametrize("policy", ["current", "replay", "predict"])
def test_under_other_rules_nothing_is(policy: str) -> None:
    rule = Delayed(policy)
    assert_same(run(MOMENTUM, [Auto()], rule=rule), run(MOMENTUM, [], rule=rule))


def test_nothing_is_late_under_a_flush() -> None:
    flush: dict[str, Any] = {"schedule": "1f1b", "micro_batches": 2}
    assert_same(run(MOMENTUM, [Auto()], **flush), run(MOMENTUM, [], **flush))


ADAMW = partial(AdamW, lr=3e-3)


@pytest.mark.parametrize("turned", [False, True], ids=["as written", "turned"])
@pytest.mark.parametrize(
    ("optimizer", "beside", "message"),
    [
        (ADAMW, partial(WeightPrediction, "momentum"), r"has weight_prediction, .*by the optim.* "
         r"and basis_rotation \(chosen by auto\), which keeps them in another basis"),
        (ADAMW, BasisRotation, r"which are the same: leave out all but one"),
        (MOMENTUM, AsynchronousNesterov, r"which both change how momentum steps"),
        (MOMENTUM, SpikeCompensation, r"which are the same"),
        (muon, WeightPrediction, r"which are the same"),
        (ADAMW, Auto, r"has auto and auto, which are the same"),
    ],
)  # fmt: skip
def test_what_it_chooses_is_refused_beside_what_undoes_it(
    optimizer: Any, beside: Callable[[], Correction], message: str, turned: bool
) -> None:
    both = [Auto(), beside()]
    with pytest.raises(InputError, match=message) as caught:
        run(optimizer, both[::-1] if turned else both)
    assert beside is Auto or "(chosen by auto)" in str(caught.value)


# What it chose of Muon was refused for the momentum that an SGD beside it did not have.
@pytest.mark.parametrize("beside", [partial(SGD, lr=0.02), NESTEROV], ids=["sgd", "nesterov"])
def test_what_is_beside_muon_and_has_no_spike_is_let_be(beside: Any) -> None:
    """It moves its weights as one does that Headrace does not know for an SGD."""

    class Unknown(Optimizer):
        def __init__(self, params: Any) -> None:
            self._sgd = beside(params)
            super().__init__(self._sgd.param_groups, self._sgd.defaults)

        def step(self, closure: Any = None) -> None:
            self._sgd.step()

    def beside_muon(kind: Any) -> Any:
        def make(params: Sequence[tuple[str, nn.Parameter]]) -> list[Optimizer]:
            matrices = [(n, p) for n, p in params if p.dim() == 2]
            return [Muon(matrices, lr=0.01), kind([(n, p) for n, p in params if p.dim() != 2])]

        return make

    chosen = [WeightPrediction(of="Muon"), SpikeCompensation()]
    assert_same(run(beside_muon(beside), [Auto()]), run(beside_muon(Unknown), chosen))


# gap_aware, which it chooses of SGD with momentum, refused sparse gradients once training ran.
@pytest.mark.parametrize("optimizer", [MOMENTUM, NESTEROV], ids=["momentum", "nesterov"])
def test_it_chooses_what_can_take_sparse_gradients(optimizer: Any) -> None:
    generator, found = torch.Generator().manual_seed(0), []
    batches = [
        (
            torch.randint(10, (4, 2), generator=generator),
            torch.randn(4, 3, generator=generator).double(),
        )
        for _ in range(20)
    ]
    for sparse in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Embedding(10, 6, sparse=sparse), nn.Flatten(), nn.Linear(12, 8), nn.Tanh(),
            nn.Linear(8, 3),
        ).double()  # fmt: skip
        with Pipeline(
            model, MSE, optimizer, stages=3, balance=[2, 2, 1], corrections=[Auto()]
        ) as pipe:
            pipe.train(batches)
            assert "gap_aware" in pipe.chosen[0]
            found.append(clone(pipe.state_dict()))
    assert_close(found[0], found[1])


class Chooses(Correction):
    def choose(self, late: bool, rule: Any, optimizers: Any) -> Sequence[Correction]:
        return [SpikeCompensation()] if late else []


def test_what_is_chosen_and_an_optimizer_does_not_allow_tells_who_chose_it() -> None:
    with pytest.raises(InputError, match=r"Chooses chose spike_compensation: .* SGD has none"):
        run(partial(SGD, lr=0.02), [Chooses()])


def test_it_may_be_beside_another_where_it_chooses_nothing() -> None:
    plain = partial(SGD, lr=0.02)
    assert_same(run(plain, [Auto(), WeightPrediction()]), run(plain, [WeightPrediction()]))
