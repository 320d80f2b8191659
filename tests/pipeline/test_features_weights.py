"""Weights in and out of a pipeline: names, copies, layers on the meta device."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headrace.pipeline import Pipeline
from headrace.pipeline.rules import Delayed

from .alone import MSE, STAGES, leaf, pipeline
from .helpers import SIZES, assert_same, batches_of, clone, tanh_net


@pytest.mark.parametrize("stages", STAGES)
def test_state_dict_is_the_users_own(stages: int) -> None:
    model, data = tanh_net(), batches_of(40, 4)
    pipe = pipeline(stages, model)
    pipe.train(data)
    state = pipe.state_dict()
    assert list(state) == list(model.state_dict())
    assert_same(state, model.state_dict())  # in one process the model itself is trained
    other = tanh_net(seed=1)
    other.load_state_dict(state)
    x = data[0][0]
    assert torch.equal(other(x), leaf(pipe.predict([x])))
    before = clone(state)
    pipe.train(data)
    assert_same(state, before)  # copies


@pytest.mark.parametrize("rule", ["stash", "replay", "predict", "current"])
@pytest.mark.parametrize("stages", STAGES)
def test_load_state_dict_in_the_middle_of_a_stream(stages: int, rule: str) -> None:
    """Nothing of the old weights is left: as if they had been there from the beginning."""
    data, new = batches_of(40, 4), clone(tanh_net(seed=9).state_dict())

    def plain_sgd(params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.05)

    states = []
    for began_with in (0, 9):
        pipe = Pipeline(
            tanh_net(began_with), MSE, plain_sgd, stages=stages, balance=SIZES[stages],
            rule=Delayed(rule), device="cpu",
        )  # fmt: skip
        if began_with == 0:
            pipe.train(data)
            pipe.load_state_dict(new)
        assert_same(pipe.state_dict(), new)
        pipe.train(data)
        states.append(pipe.state_dict())
    assert_same(*states)


def test_weights_that_do_not_fit_are_refused() -> None:
    pipe = pipeline(2)
    state = pipe.state_dict()
    state["99.weight"] = state.pop("0.bias")
    with pytest.raises(RuntimeError, match=r"missing \['0.bias'\], unknown \['99.weight'\]"):
        pipe.load_state_dict(state)


def test_weights_before_the_cut() -> None:
    """balance='time' knows no stages yet: the weights are the model's."""
    pipe = pipeline(2, balance="time")
    new = clone(tanh_net(seed=4).state_dict())
    pipe.load_state_dict(new)
    assert_same(pipe.state_dict(), new)
    assert pipe.partition is None and pipe.version == 0
    for call in (pipe.named_parameters, pipe.statistics):
        with pytest.raises(RuntimeError, match=r"call prepare\(loader\) first"):
            call()
    pipe.drain()
    pipe.prepare(batches_of(8, 4))
    assert_same(pipe.state_dict(), new)


def test_meta_layers_have_no_weights_before_the_cut() -> None:
    """Loaded ones would have been lost without a word."""
    model = nn.Sequential(nn.Linear(5, 4, device="meta"), nn.Linear(4, 3, device="meta"))
    pipe = pipeline(2, model)
    state = {"0.weight": torch.ones(4, 5), "0.bias": torch.ones(4)}
    state |= {"1.weight": torch.ones(3, 4), "1.bias": torch.ones(3)}
    for call in (pipe.state_dict, lambda: pipe.load_state_dict(state)):
        with pytest.raises(RuntimeError, match=r"call prepare\(loader\) first"):
            call()
    pipe.prepare([(torch.ones(2, 5), torch.ones(2, 3))])
    pipe.load_state_dict(state)
    assert_same(pipe.state_dict(), state)


def test_meta_layers_are_the_same_for_every_number_of_stages() -> None:
    def made(stages: int, seed: int) -> dict[str, Tensor]:
        layers = [nn.Linear(4, 4, device="meta"), nn.BatchNorm1d(4, device="meta"), nn.Tanh()]
        model = nn.Sequential(nn.Linear(5, 4), *copy.deepcopy(layers), *copy.deepcopy(layers))
        for parameter in model[0].parameters():
            nn.init.ones_(parameter)
        torch.rand(stages)  # the global random state has no say
        return pipeline(stages, model, balance="parameters", seed=seed).state_dict()

    one = made(1, 3)
    assert not any(t.is_meta for t in one.values())
    for stages in (2, 3):
        assert_same(made(stages, 3), one)
    assert not torch.equal(made(1, 4)["1.weight"], one["1.weight"])
    assert not torch.equal(one["1.weight"], one["4.weight"])


def test_named_parameters_are_the_live_ones() -> None:
    pipe = pipeline(3)
    pipe.train(batches_of(40, 4))
    named = dict(pipe.named_parameters())
    assert list(named) == [name for name, _ in tanh_net().named_parameters()]
    with torch.no_grad():
        named["0.weight"].fill_(0.5)
    assert set(pipe.state_dict()["0.weight"].flatten().tolist()) == {0.5}
