"""evaluate and predict: what they give, drain, and leave as it was."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from headrace.pipeline import InputError, Pipeline
from headrace.pipeline.rules import Delayed

from .alone import MSE, STAGES, leaf, pipeline
from .helpers import assert_same, batches_of, momentum
from .odd_models import ODD, Do, linears, vectors


def hits(output: Tensor, target: Tensor) -> Tensor:
    return (output.argmax(1) == target.argmax(1)).double().mean()


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("stages", STAGES)
def test_evaluate_is_the_mean_over_samples(stages: int, micro_batches: int) -> None:
    model = nn.Sequential(*linears(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    model.double()
    data = vectors([8, 8, 5, 1])
    pipe = pipeline(stages, model, micro_batches=micro_batches)
    pipe.train(data[:2])
    metrics: dict[str, Callable[[Any, Any], Any]] = {"accuracy": hits, "one": lambda o, t: 1}
    got = pipe.evaluate(data, metrics)
    model.eval()
    with torch.no_grad():
        output = torch.cat([model(x) for x, _ in data])
    target = torch.cat([y for _, y in data])
    assert list(got) == ["loss", "accuracy", "one"]
    assert got["loss"] == pytest.approx(MSE(output, target).item(), rel=1e-12)
    assert got["accuracy"] == pytest.approx(hits(output, target).item(), rel=1e-12)
    assert got["one"] == 1.0


def test_a_metric_that_is_no_single_number_is_named() -> None:
    def by_sample(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).abs().sum(1)

    with pytest.raises(InputError, match=r"the metric 'error' gave float64\[4\]: it must give one"):
        pipeline(2).evaluate(batches_of(4, 4), {"error": by_sample})


def test_a_loss_with_weights_of_its_own_is_refused() -> None:
    """No stage's optimizer would ever be told of them."""

    class Centres(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.centres = nn.Parameter(torch.zeros(3))

        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            return (output - self.centres).square().mean()

    model = nn.Sequential(nn.Linear(5, 3))
    with pytest.raises(ValueError, match=r"loss_fn=.*Centres has weights of its own"):
        Pipeline(model, Centres(), momentum)
    Pipeline(model, Centres().requires_grad_(False), momentum, device="cpu")


@pytest.mark.parametrize("stages", STAGES)
def test_evaluate_and_predict_leave_training_alone(stages: int) -> None:
    """They drain; but for that the weights are those of a run that only drains."""
    data = batches_of(60, 4)
    states = []
    for looks in (False, True):
        torch.manual_seed(0)
        pipe = pipeline(stages)
        for part in (data[:7], data[7:]):
            pipe.train(part)
            if looks:
                pipe.evaluate(data[:2])
                pipe.predict(data[:2])
            else:
                pipe.drain()
        pipe.close()
        states.append(pipe.state_dict())
        assert pipe.version == 15
    assert_same(*states)


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("stages", STAGES)
def test_predict_gives_all_outputs_in_order(stages: int, micro_batches: int) -> None:
    model = nn.Sequential(
        Do(lambda x: x * 2), Do(lambda x: {"y": (x, x[:, 0].long())}), nn.Identity()
    )
    pipe = pipeline(stages, model, balance="parameters", micro_batches=micro_batches)
    inputs = torch.arange(22.0).view(11, 2)
    pieces = [inputs[:4], inputs[4:8], inputs[8:]]
    nest: Any = pipe.predict(pieces)
    assert torch.equal(nest["y"][0], inputs * 2)
    assert torch.equal(nest["y"][1], inputs[:, 0].long() * 2)
    pairs = [(piece, torch.zeros(len(piece))) for piece in pieces]
    again: Any = pipe.predict(pairs)
    assert torch.equal(again["y"][0], nest["y"][0]) and not again["y"][0].requires_grad
    loader: DataLoader[Any] = DataLoader(TensorDataset(inputs), batch_size=4)
    nest = pipe.predict(loader)
    assert torch.equal(nest["y"][0], inputs * 2)


def test_predict_of_unlike_lengths_says_why_it_cannot_be_joined() -> None:
    pipe = pipeline(2, nn.Sequential(nn.Identity(), nn.Identity()), balance=[1, 1])
    with pytest.raises(InputError, match=r"float32\[2, 3\] and float32\[2, 5\]"):
        pipe.predict([torch.zeros(2, 3), torch.zeros(2, 5)])


def test_predict_may_come_first() -> None:
    """Inputs alone are enough to measure; the loss was once asked about a target of None."""
    model = nn.Sequential(*linears(5, 4), nn.Linear(4, 3)).double()
    pipe = pipeline(2, model)
    inputs = [x for x, _ in vectors()]
    expected = torch.cat([model(x) for x in inputs])
    assert torch.equal(leaf(pipe.predict(inputs)), expected)
    pipe.train(vectors())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "mode"])
@pytest.mark.parametrize("rule", ["stash", "replay"])
def test_a_callers_no_grad_stops_no_training(rule: str, context: Any) -> None:
    """`evaluate` inside no_grad is what everyone writes, and its drain must still train."""
    data = batches_of(40, 4)
    inside = pipeline(3, rule=Delayed(rule), balance="time")
    with context():
        inside.train(data[:1])  # measures and builds, too
        inside.evaluate(data[:3])
        inside.train(data[1:])
        inside.predict(data[:3])
    inside.train(data)
    assert inside.partition is not None
    outside = pipeline(3, rule=Delayed(rule), balance=inside.partition.sizes)
    outside.train(data[:1])
    outside.drain()
    outside.train(data[1:])
    outside.drain()
    outside.train(data)
    assert_same(inside.state_dict(), outside.state_dict())


def test_a_layer_that_works_in_place_in_training_only() -> None:
    """What evaluation tells of the first layer does not hold in training."""
    model = nn.Sequential(
        nn.Dropout(0.5, inplace=True),
        nn.Linear(5, 4),
        nn.Dropout(0.5, inplace=True),
        nn.Linear(4, 3),
    ).double()
    data = vectors()
    before = copy.deepcopy(data)
    pipe = pipeline(2, model, balance=[2, 2])
    pipe.evaluate(data)
    pipe.train(data)
    pipe.close()
    assert all(torch.equal(a[0], b[0]) for a, b in zip(data, before, strict=True))


def test_every_odd_model_is_evaluated_and_predicted_alike() -> None:
    for name in ("lstm", "nested_data", "integers_beside_floats", "language_model"):
        found = []
        for stages in (1, 3):
            torch.manual_seed(0)
            odd = ODD[name]()
            pipe = Pipeline(
                odd.model, odd.loss_fn, momentum, stages=stages, balance=odd.balance(stages),
                device="cpu",
            )  # fmt: skip
            output: Any = pipe.predict([odd.batches[0]])
            found.append((pipe.evaluate(odd.batches)["loss"], output))
        assert found[0][0] == found[1][0]
        for a, b in zip(*(torch.utils._pytree.tree_leaves(o) for _, o in found), strict=True):
            assert torch.equal(a, b)
