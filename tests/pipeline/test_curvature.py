"""Curvatures that are known, and what an estimate must leave alone."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from headrace.models import gpt
from headrace.pipeline.curvature import estimate_curvature


def square(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean(0).sum()


def quadratic() -> tuple[nn.Sequential, tuple[Tensor, Tensor], float]:
    """A linear layer: its Hessian is that of each output, 2 XᵀX / N."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(12, 5, generator=generator, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(5, 2, bias=False).double())
    largest = torch.linalg.eigvalsh(2 * x.T @ x / 12)[-1].item()
    return model, (x, torch.ones(12, 2, dtype=torch.float64)), largest


def test_a_quadratics_is_its_largest_eigenvalue() -> None:
    model, batch, largest = quadratic()
    assert estimate_curvature(model, square, batch, 100) == pytest.approx(largest, rel=1e-6)
    assert 0.3 * largest < estimate_curvature(model, square, batch, 3) <= largest


def test_it_is_the_largest_though_another_is_larger_below_zero() -> None:
    """A saddle: -10 along the first weight, 1 along the second."""
    model = nn.Sequential(nn.Linear(2, 1, bias=False).double())
    scale = torch.tensor([-10.0, 1.0], dtype=torch.float64)

    def saddle(output: Tensor, _: Tensor) -> Tensor:
        return 0.5 * (scale * output.flatten().square()).sum()

    eye = torch.eye(2, dtype=torch.float64)
    assert estimate_curvature(model, saddle, (eye, eye), 100) == pytest.approx(1.0)


def test_a_loss_without_curvature_has_none() -> None:
    model = nn.Sequential(nn.Linear(3, 1))
    batch = torch.ones(4, 3), torch.ones(4, 1)
    assert estimate_curvature(model, lambda output, _: output.mean(), batch) == 0.0
    assert estimate_curvature(model.requires_grad_(False), square, batch) == 0.0


def test_along_a_stages_layers_alone() -> None:
    """Of (w2 w1 x - y)² the curvature along w1 is 2 w2² x², and along w2 it is 2 w1² x²."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)).double()
    with torch.no_grad():
        model[0].weight.fill_(3.0)
        model[1].weight.fill_(2.0)
    one = torch.ones(1, 1, dtype=torch.float64)

    def along(*layers: str) -> float:
        return estimate_curvature(model, square, (one, one), 5, layers=layers)

    assert (along("0"), along("1")) == pytest.approx((8.0, 18.0))
    both = torch.tensor([[8.0, 2 * (2 * 6 - 1)], [2 * (2 * 6 - 1), 18.0]])
    whole = estimate_curvature(model, square, (one, one), 50)
    assert whole == pytest.approx(torch.linalg.eigvalsh(both)[-1].item(), rel=1e-5)


class Once(torch.autograd.Function):
    """Tanh, without a second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return gradient * (1 - y * y)


class OnceTanh(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = Once.apply(x)
        return result


def test_a_function_without_a_second_derivative_has_its_curvature() -> None:
    """Differentiating twice would find 4.5, and not complain."""
    torch.manual_seed(0)
    linears = nn.Linear(4, 6), nn.Linear(6, 2)
    batch = torch.randn(8, 4), torch.randn(8, 2)
    usual = nn.Sequential(linears[0], nn.Tanh(), nn.Dropout(0.3), linears[1])
    other = nn.Sequential(linears[0], OnceTanh(), nn.Dropout(0.3), linears[1])
    expected = estimate_curvature(usual, square, batch, 30)
    assert expected == pytest.approx(7.129, rel=1e-3)
    assert estimate_curvature(other, square, batch, 30) == pytest.approx(expected, rel=1e-3)


def test_attention_has_a_curvature() -> None:
    torch.manual_seed(0)
    model = gpt(vocabulary=5, context=4, blocks=1, width=8, heads=2)
    tokens = torch.randint(5, (3, 4))

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten())

    assert estimate_curvature(model, loss, (tokens, tokens), 5) > 0.01


def test_the_model_and_the_random_state_stay_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    first = estimate_curvature(model, square, (x, x[:, :1]), 4)
    assert estimate_curvature(model, square, (x, x[:, :1]), 4) == first > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_layers_on_the_meta_device_are_made_as_in_a_pipeline() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    x = torch.ones(5, 3)
    assert estimate_curvature(model, square, (x, x[:, :1]), 4, seed=1) > 0
    assert all(p.is_meta for p in model.parameters())


def test_no_iterations_are_refused() -> None:
    model, batch, _ = quadratic()
    with pytest.raises(ValueError, match="iterations=0: give a whole number >= 1"):
        estimate_curvature(model, square, batch, 0)
