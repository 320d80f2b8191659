"""What a synthesizer is taught, and that it is the equation's: plain autograd beside it."""

import copy
import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from headrace.pipeline.synthesizers import Linear
from headrace.pipeline.teachable import Mean, SyntheticGradient, Teachable, adam, make_seeded


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Linear(torch.Size([5]), torch.Size([5])).double()


def sgd(lr: float) -> partial[torch.optim.SGD]:
    return partial(torch.optim.SGD, lr=lr)


def test_a_gradient_is_guessed_and_learned_per_sample() -> None:
    """M gives N ∂L/∂h: the same for a sample whatever the size of its micro-batch."""
    m, plain = network(), network()
    taught = SyntheticGradient(m, sgd(0.1))
    h, delta = torch.randn(4, 5).double(), torch.randn(4, 5).double()
    torch.testing.assert_close(taught.guess(h), plain(h).detach() / 4)
    assert taught.learn(h, delta)
    loss = (plain(h) - 4 * delta).square().sum() / 4
    loss.backward()
    with torch.no_grad():
        for parameter in plain.parameters():
            assert parameter.grad is not None
            parameter -= 0.1 * parameter.grad
    for mine, other in zip(m.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, other)
        assert mine.grad is None
    assert taught.loss.value == pytest.approx(loss.item())


def test_the_cosine_is_with_what_arrived() -> None:
    m = network()
    taught = SyntheticGradient(m, sgd(0.0))
    h = torch.randn(4, 5).double()
    taught.learn(h, m(h).detach())
    assert taught.cosine.value == pytest.approx(1)
    taught = SyntheticGradient(m, sgd(0.0))
    taught.learn(h, -3 * m(h).detach())
    assert taught.cosine.value == pytest.approx(-1)
    nothing = Teachable(network(), sgd(0.0))
    nothing.learn(h, torch.zeros(4, 5).double())
    assert nothing.cosine.value == 0, "of a zero"


def test_what_is_not_finite_is_left_out() -> None:
    m = network()
    before = copy.deepcopy(m.state_dict())
    taught = SyntheticGradient(m, sgd(0.1))
    bad = torch.zeros(4, 5).double()
    bad[1, 2] = math.inf
    assert not taught.learn(torch.randn(4, 5).double(), bad)
    assert all(torch.equal(v, before[n]) for n, v in m.state_dict().items())
    assert math.isnan(taught.loss.value)


def test_nothing_flows_back_through_a_guess_or_a_lesson() -> None:
    taught = SyntheticGradient(network(), sgd(0.1))
    h = torch.randn(4, 5, requires_grad=True, dtype=torch.float64)
    assert not taught.guess(h).requires_grad
    taught.learn(h, torch.randn(4, 5).double())
    assert h.grad is None


def test_low_precision_is_learned_in_float32() -> None:
    h = torch.randn(4, 5).bfloat16()
    made = make_seeded(lambda: Linear(torch.Size([5]), torch.Size([5])), 3, h)
    taught = SyntheticGradient(made, adam)
    assert {p.dtype for p in made.parameters()} == {torch.float32}
    assert taught.guess(h).dtype is torch.bfloat16
    assert taught.learn(h, torch.randn(4, 5).bfloat16())


def test_a_seed_makes_a_network_and_disturbs_nothing() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()

    def make(seed: int) -> Tensor:
        made = make_seeded(lambda: nn.Linear(3, 3), seed, torch.zeros(1))
        return next(made.parameters())

    a, b, c = make(1), make(1), make(2)
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(torch.get_rng_state(), state)


def test_means_are_of_late() -> None:
    mean = Mean()
    assert math.isnan(mean.value)
    for value in [100.0, math.nan, *range(32)]:
        mean.add(float(value))
    assert mean.value == sum(range(32)) / 32
