"""Measuring must leave the model alone, name a layer that cannot run, and get the order right."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headrace.pipeline import InputError, LayerCost
from headrace.pipeline.measure import measure
from headrace.pipeline.settings import OptimizerFactory, Settings

CPU = torch.device("cpu")


def momentum(params: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def costs_of(
    model: nn.Sequential,
    x: Any,
    target: Any = None,
    loss_fn: Callable[..., Tensor] | None = None,
    optimizer: OptimizerFactory = momentum,
    autocast: torch.dtype | None = None,
    rounds: int = 2,
) -> list[LayerCost]:
    settings = Settings(loss_fn or nn.MSELoss(), optimizer, autocast=autocast)
    return measure(model, x, target, settings, CPU, rounds=rounds)


class Sleep(nn.Module):
    """Takes so many seconds forward and twice that backward."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = Sleeping.apply(x, self.seconds)  # type: ignore[no-untyped-call]
        return result


class Sleeping(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        time.sleep(2 * ctx.seconds)
        return gradients[0], None


def test_layers_that_sleep_cost_what_they_sleep() -> None:
    sleeps = (0.008, 0.001, 0.016, 0.004)
    model = nn.Sequential(nn.Linear(2, 2), *map(Sleep, sleeps))
    _, *costs = costs_of(model, torch.zeros(1, 2), torch.zeros(1, 2))
    for seconds, cost in zip(sleeps, costs, strict=True):
        assert cost.forward >= seconds and cost.backward >= 2 * seconds
        assert cost.total == cost.forward + cost.backward + cost.update
    order = [1, 3, 0, 2]
    assert sorted(range(4), key=lambda k: costs[k].forward) == order
    assert sorted(range(4), key=lambda k: costs[k].backward) == order


def test_the_first_layer_needs_no_gradient_of_its_input() -> None:
    first, second = costs_of(nn.Sequential(Sleep(0.004), Sleep(0.004)), torch.zeros(1, 2))
    # Neither has weights, nor what comes before them: nothing goes backward at all.
    assert first.backward < 0.004 and second.backward < 0.004


def test_the_loss_belongs_to_the_last_layer() -> None:
    def slow(output: Tensor, target: Tensor) -> Tensor:
        time.sleep(0.005)
        return (output - target).square().mean()

    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    first, last = costs_of(model, torch.zeros(1, 2), torch.zeros(1, 2), slow)
    assert first.forward < 0.005 <= last.forward


def test_the_update_is_measured_with_the_users_optimizer() -> None:
    class Slow(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            time.sleep(0.004)

    costs = costs_of(
        nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)),
        torch.zeros(1, 2),
        torch.zeros(1, 2),
        optimizer=lambda params: Slow(params, lr=0.1),
    )
    assert [cost.update >= 0.004 for cost in costs] == [True, False, True]


def test_what_it_says_of_a_layer() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Sequential(nn.ReLU(), nn.Linear(5, 2)))
    costs = costs_of(model, torch.zeros(4, 3), torch.zeros(4, 2))
    assert [(c.name, c.kind, c.parameters, c.activation_bytes) for c in costs] == [
        ("0", "Linear", 20, 4 * 5 * 4),
        ("1", "Sequential", 12, 4 * 2 * 4),
    ]
    half = costs_of(model, torch.zeros(4, 3), torch.zeros(4, 2), autocast=torch.bfloat16)
    assert [c.activation_bytes for c in half] == [4 * 5 * 2, 4 * 2 * 2]


def test_the_model_its_input_and_the_random_state_stay_as_they_are() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.ReLU(inplace=True),
        nn.Linear(3, 4),
        nn.ReLU(inplace=True),
        nn.BatchNorm1d(4),
        nn.Dropout(0.5),
        nn.Linear(4, 2),
    )
    x, target = torch.randn(6, 3), torch.randn(6, 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data, random = (x.clone(), target.clone()), torch.get_rng_state()
    costs_of(model, x, target, rounds=3)
    assert torch.equal(random, torch.get_rng_state())
    assert torch.equal(x, data[0]) and torch.equal(target, data[1])
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert int(model[3].num_batches_tracked) == 0  # type: ignore[arg-type]
    assert all(p.grad is None for p in model.parameters()) and x.grad is None


def test_a_layer_that_occurs_twice_is_measured_twice() -> None:
    act = nn.ReLU()
    costs = costs_of(nn.Sequential(nn.Linear(2, 3), act, nn.Linear(3, 2), act), torch.ones(1, 2))
    assert [c.kind for c in costs] == ["Linear", "ReLU", "Linear", "ReLU"]


def test_a_frozen_layer_has_no_update_and_no_backward_of_its_own() -> None:
    frozen = nn.Linear(2, 2).requires_grad_(False)
    seen: list[str] = []

    def spy(params: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        seen.extend(name for name, _ in params)
        return momentum(params)

    model = nn.Sequential(frozen, nn.Linear(2, 2))
    costs = costs_of(model, torch.ones(1, 2), torch.ones(1, 2), optimizer=spy)
    assert seen == ["1.weight", "1.bias"]
    assert [c.parameters for c in costs] == [6, 6]


class Split(nn.Module):
    """Floats, integers and a scalar between layers."""

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"x": x, "index": x.argmax(1), "more": [x.sum(), None]}


class Merge(nn.Module):
    def forward(self, nest: dict[str, Any]) -> Tensor:
        result: Tensor = nest["x"] * nest["index"].unsqueeze(1) + nest["more"][0]
        return result


def test_nests_between_layers() -> None:
    model = nn.Sequential(nn.Linear(3, 4), Split(), Merge())
    costs = costs_of(model, torch.ones(2, 3), torch.ones(2, 4))
    assert costs[1].activation_bytes == 2 * 4 * 4 + 2 * 8 + 4


def test_recurrent_layers() -> None:
    class Last(nn.Module):
        def forward(self, both: Any) -> Tensor:
            return torch.as_tensor(both[0][:, -1])

    model = nn.Sequential(nn.LSTM(3, 4, num_layers=2, batch_first=True), Last())
    costs = costs_of(model, torch.ones(2, 5, 3), torch.ones(2, 4))
    assert costs[0].activation_bytes == 4 * (2 * 5 * 4 + 2 * (2 * 2 * 4))


def test_a_layer_on_the_meta_device_stays_there() -> None:
    model = nn.Sequential(nn.Linear(3, 4, device="meta"), nn.Linear(4, 2))
    costs = costs_of(model, torch.ones(2, 3), torch.ones(2, 2))
    assert model[0].weight.is_meta
    assert costs[0].parameters == 16 and costs[0].forward > 0


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (
            nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(5, 2)),
            r"layer '2' \(Linear\) cannot take float32\[2, 4\]: RuntimeError: mat1 and mat2",
        ),
        (
            nn.Sequential(nn.Linear(3, 4), Split(), nn.Linear(4, 2)),
            r"layer '2' \(Linear\) cannot take \{x: float32\[2, 4\], index: int64\[2\], more: "
            r"\(float32\[\], None\)\}: TypeError",
        ),
        (
            nn.Sequential(nn.Linear(3, 4)),
            r"loss_fn CrossEntropyLoss cannot take the output float32\[2, 4\] with the target "
            r"float32\[2, 7\]: ",
        ),
    ],
    ids=["shape", "nest", "loss"],
)
def test_what_cannot_run_is_named(model: nn.Sequential, match: str) -> None:
    with pytest.raises(InputError, match=match):
        costs_of(model, torch.ones(2, 3), torch.ones(2, 7), nn.CrossEntropyLoss())


def test_a_layer_that_cannot_be_copied_is_named() -> None:
    layer = nn.Linear(3, 4)
    layer.cache = layer.weight * 2
    match = r"layer '0' \(Linear\) cannot be copied, .*; write balance='parameters'"
    with pytest.raises(InputError, match=match):
        costs_of(nn.Sequential(layer), torch.ones(2, 3))


def test_a_layer_that_gives_no_tensor_is_named() -> None:
    class Number(nn.Module):
        def forward(self, x: Tensor) -> float:
            return 1.5

    with pytest.raises(InputError, match=r"layer '1' \(Number\).*found a float"):
        costs_of(nn.Sequential(nn.Linear(3, 4), Number()), torch.ones(2, 3))


def test_a_loss_that_is_no_mean_is_refused() -> None:
    loss = nn.MSELoss(reduction="none")
    with pytest.raises(InputError, match=r"MSELoss gave float32\[2, 4\]: .*reduction='mean'"):
        costs_of(nn.Sequential(nn.Linear(3, 4)), torch.ones(2, 3), torch.ones(2, 4), loss)
