"""The factory of optimizers, and learning rates that are multiplied for one block only."""

from typing import Any

import pytest
import torch
from torch import nn

from headrace.pipeline.errors import InputError
from headrace.pipeline.learning_rates import multiplied
from headrace.pipeline.settings import make_optimizers


def weights() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(1, dtype=torch.float64)) for _ in range(3)]


def optimizers() -> list[torch.optim.Optimizer]:
    a, b, c = weights()
    groups: list[dict[str, Any]] = [{"params": [a]}, {"params": [b], "lr": 0.5}]
    return [torch.optim.SGD(groups, lr=0.25), torch.optim.Adam([c], lr=0.125)]


def rates(each: list[torch.optim.Optimizer]) -> list[float]:
    return [group["lr"] for optimizer in each for group in optimizer.param_groups]


@pytest.mark.parametrize("factor", [0, 0.5, 3])
def test_every_group_of_every_optimizer_in_the_block_alone(factor: float) -> None:
    all_of_them = optimizers()
    with multiplied(all_of_them, factor):
        assert rates(all_of_them) == [0.25 * factor, 0.5 * factor, 0.125 * factor]
    assert rates(all_of_them) == [0.25, 0.5, 0.125]


def test_rates_come_back_after_an_error() -> None:
    all_of_them = optimizers()
    with pytest.raises(KeyError), multiplied(all_of_them, 0.5):
        raise KeyError("x")
    assert rates(all_of_them) == [0.25, 0.5, 0.125]


def test_a_rate_that_is_a_tensor_is_neither_changed_nor_lost() -> None:
    rate = torch.tensor(0.25, dtype=torch.float64)
    (weight, *_) = weights()
    adam = torch.optim.Adam([weight], lr=rate)
    with multiplied([adam], 0.5):
        assert float(adam.param_groups[0]["lr"]) == 0.125
    assert adam.param_groups[0]["lr"] is rate and float(rate) == 0.25


def test_one_changes_nothing_and_no_optimizer_is_no_error() -> None:
    all_of_them = optimizers()
    with multiplied(all_of_them, 1):
        assert rates(all_of_them) == [0.25, 0.5, 0.125]
    with multiplied([], 0.5):
        pass


def test_a_step_in_the_block_goes_that_much_less_far() -> None:
    (weight, *_) = weights()
    sgd = torch.optim.SGD([weight], lr=0.5)
    weight.grad = torch.tensor([1.0], dtype=torch.float64)
    with multiplied([sgd], 0.25):
        sgd.step()
    assert weight.item() == 1 - 0.5 * 0.25
    sgd.step()
    assert weight.item() == 1 - 0.5 * 0.25 - 0.5


@pytest.mark.parametrize(
    ("count", "said"),
    [(1, "parameter '0'"), (2, "parameters '0' and 1 other"), (3, "parameters '0' and 2 others")],
)
def test_a_factory_that_raises_is_told_of_with_how_many_it_had(count: int, said: str) -> None:
    parameters = [(f"{k}", nn.Parameter(torch.zeros(1))) for k in range(count)]
    with pytest.raises(InputError, match=rf"IndexError: .*, for the {said}$"):
        make_optimizers(lambda each: [][len(each)], parameters)
