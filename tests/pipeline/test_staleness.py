"""Delays are what they are said to be, and do what theory says they do."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from headrace.pipeline import Pipeline
from headrace.pipeline.rules import Delayed

from .helpers import SIZES, batches_of, momentum, tanh_net
from .simulator import Batch, depths_of, simulate


@pytest.mark.parametrize("slack", [0, 1, 3])
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_staleness_is_exact_over_three_epochs(n: int, slack: int) -> None:
    """(n - 1 - j)(1 + slack) for every micro-batch, across epochs, but for the warm-up.

    The warm-up: the first d_j micro-batches find fewer updates to have missed, k of them for
    micro-batch k. They are seen in the mean and left out of the reports.
    """
    batches = batches_of(67, 5)  # 14 micro-batches
    exact = tuple((n - 1 - j) * (1 + slack) for j in range(n))
    seen: list[tuple[int, tuple[float, ...]]] = []
    with Pipeline(
        tanh_net(), nn.MSELoss(), momentum, balance=SIZES[n], stages=n, slack=slack
    ) as pipe:
        reports = [
            pipe.train(
                batches, log=lambda p: seen.append((p.micro_batch, p.staleness)), log_every=1
            )
            for _ in range(3)
        ]
        statistics = pipe.statistics()
        assert tuple(pipe.depths) == exact
    # d_0 until stage 0 is stale in full, d_0 until it has that gradient, and one more because a
    # log tells of updates that are done.
    warm = 2 * exact[0] + 2
    assert all(staleness == exact for fed, staleness in seen if fed >= warm)
    assert {fed for fed, _ in seen} >= set(range(warm, 43))
    assert all(report.staleness == exact for report in reports[1:])
    for j, stage in enumerate(statistics):
        assert (stage.stage, stage.updates, stage.skipped) == (j, 42, 0)
        assert stage.staleness_max == exact[j]
        assert stage.staleness_mean == pytest.approx(np.mean([min(exact[j], k) for k in range(42)]))
    assert sum(r.micro_batches for r in reports) == 42 - exact[0]


def test_staleness_restarts_after_a_drain() -> None:
    """Draining after every epoch of 11 shows as a warm-up in each."""
    batches = batches_of(52, 5)
    with Pipeline(tanh_net(), nn.MSELoss(), momentum, balance=SIZES[4], stages=4, slack=1) as pipe:
        for _ in range(3):
            pipe.train(batches)
            pipe.drain()
        statistics = pipe.statistics()
    means = [np.mean([min(d, k) for k in range(11)]) for d in (6, 4, 2, 0)]
    assert [s.staleness_mean for s in statistics] == pytest.approx(means)


class Scale(nn.Module):
    """w x: the one trainable number."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.w * x


def bound(tau: int) -> float:
    """R1: on curvature h with delay tau, SGD is stable iff eta h < 2 sin(pi / (2 (2 tau + 1)))."""
    return float(2 * np.sin(np.pi / (2 * (2 * tau + 1))))


def growth(tau: int, step: float) -> float:
    """The factor an update gives: the largest root of z^(tau+1) - z^tau + step."""
    polynomial = np.zeros(tau + 2)  # the highest power first
    polynomial[0] = 1
    polynomial[1] -= 1
    polynomial[-1] += step
    return float(max(abs(np.roots(polynomial))))


CURVATURE = 1.7


def quadratic(output: Tensor, target: Tensor) -> Tensor:
    return CURVATURE / 2 * (output**2).mean() + 0 * target.mean()


def sgd(step: float) -> Callable[[list[tuple[str, nn.Parameter]]], torch.optim.Optimizer]:
    return lambda params: torch.optim.SGD(params, lr=step / CURVATURE)


def ones(count: int) -> list[Batch]:
    return [(torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))] * count


DELAYS = [(1, 2, 0), (2, 3, 0), (2, 2, 1), (4, 5, 0), (4, 3, 1)]


@pytest.mark.parametrize("factor", [0.95, 1.05], ids=["below", "above"])
@pytest.mark.parametrize(("tau", "n", "slack"), DELAYS)
def test_delay_law_through_the_pipeline(tau: int, n: int, slack: int, factor: float) -> None:
    """Just below the bound it converges, just above it diverges, at the rate theory gives.

    Stage 0 holds the number, later stages only add delay. A round of micro-batches is about two
    swings of w, so that the mean losses of two rounds can be compared.
    """
    step = factor * bound(tau)
    round_ = ones(4 * (2 * tau + 1))
    rounds = 8 + 24 // (tau + 1)
    model = nn.Sequential(Scale(), *[nn.Identity() for _ in range(n - 1)])
    with Pipeline(
        model, quadratic, sgd(step), rule=Delayed("stash"), balance=[1] * n, stages=n, slack=slack
    ) as pipe:
        losses = [pipe.train(round_).loss for _ in range(rounds)]
        assert pipe.depths[0] == tau
    rate = (losses[-1] / losses[2]) ** (0.5 / (len(round_) * (rounds - 3)))
    assert np.log(rate) == pytest.approx(np.log(growth(tau, step)), rel=0.1)
    assert losses[-1] < losses[2] / 30 if factor < 1 else losses[-1] > losses[2] * 30


@pytest.mark.parametrize("factor", [0.98, 1.02], ids=["below", "above"])
@pytest.mark.parametrize("tau", [1, 2, 4])
def test_delay_law_in_the_simulator(tau: int, factor: float) -> None:
    step = factor * bound(tau)
    losses = simulate(
        [nn.Sequential(Scale())], quadratic, sgd(step), ones(1000), depths=[tau]
    ).losses
    early, late = np.mean(losses[100:200]), np.mean(losses[900:])
    assert late < early / 5 if factor < 1 else late > early * 5
    assert depths_of(tau + 1)[0] == tau


def test_bounds_of_the_delay_law() -> None:
    """The published numbers, and the roots that cross the unit circle there."""
    known = {0: 2, 1: 1, 2: 0.618, 4: 0.3473, 6: 0.2411, 14: 0.1083, 30: 0.0515}
    for tau, value in known.items():
        assert bound(tau) == pytest.approx(value, abs=1e-4)
        assert growth(tau, 0.999 * bound(tau)) < 1 < growth(tau, 1.001 * bound(tau))
