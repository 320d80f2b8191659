"""The gradient of one update: means by samples and by factors, from numbers added by hand.

All numbers are sums of few powers of two: no rounding, so that equal means equal.
"""

import math

import pytest
import torch
from torch import Tensor

from headrace.pipeline.gradient import Gradient, all_finite


def g(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def mean(gradient: Gradient, name: str = "w") -> list[float]:
    values: list[float] = gradient.mean()[name].to_dense().tolist()
    return values


def test_nothing_was_added() -> None:
    gradient = Gradient()
    assert gradient.mean() == {} and gradient.rate == 1 and gradient.finite
    assert (gradient.samples, gradient.versions) == (0, [])


def test_one_micro_batch_is_given_back_bit_for_bit() -> None:
    value = torch.randn(5, generator=torch.Generator().manual_seed(0))
    for factor in (1, 1 / 3):
        kept, gradient = value.clone(), Gradient()
        gradient.add({"w": kept}, 7, [3], factor=factor)
        assert gradient.mean()["w"] is kept and torch.equal(kept, value)
        assert gradient.rate == pytest.approx(factor, rel=1e-15)


def test_the_mean_is_by_samples() -> None:
    gradient = Gradient()
    gradient.add({"w": g(1, 2)}, 4, [0])
    gradient.add({"w": g(3, 8)}, 2, [0])
    gradient.add({"w": g(5, 0)}, 2, [1])
    assert mean(gradient) == [(4 * 1 + 2 * 3 + 2 * 5) / 8, (4 * 2 + 2 * 8 + 2 * 0) / 8]
    assert (gradient.samples, gradient.versions, gradient.rate) == (8, [0, 0, 1], 1)


def test_factors_weigh_the_mean_and_the_rate_makes_up_for_what_they_leave_out() -> None:
    """rate · mean = (1/c) Σ α_l g_l: eq. 3 of Zhang et al. 2016."""
    gradient = Gradient()
    gradient.add({"w": g(8)}, 1, [0], factor=0.5)
    gradient.add({"w": g(16)}, 1, [0], factor=0.25)
    gradient.add({"w": g(32)}, 1, [0], factor=0.125)
    gradient.add({"w": g(64)}, 1, [0], factor=0.125)
    assert gradient.rate == 1 / 4
    assert mean(gradient) == [8 * 0.5 + 16 * 0.25 + 32 * 0.125 + 64 * 0.125]


def test_factors_and_samples_together() -> None:
    gradient = Gradient()
    gradient.add({"w": g(2)}, 3, [0], factor=0.5)
    gradient.add({"w": g(6)}, 1, [2], factor=0.5)
    assert gradient.rate == 0.5
    assert mean(gradient)[0] == pytest.approx((3 * 2 + 1 * 6) / 4, rel=1e-15)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["first", "last"])
def test_a_factor_of_0_leaves_a_micro_batch_out_but_counts_its_samples(
    order: tuple[int, int],
) -> None:
    gradient = Gradient()
    both = [({"w": g(math.pi)}, 3, [4], 0.0), ({"w": g(2.0)}, 1, [5], 1.0)]
    for each in order:
        means, samples, versions, factor = both[each]
        gradient.add(means, samples, versions, factor=factor)
    assert gradient.rate == 1 / 4 and mean(gradient) == [2]
    assert gradient.samples == 4 and sorted(gradient.versions) == [4, 5]


def test_factors_of_0_alone_leave_nothing_to_move_on() -> None:
    gradient = Gradient()
    gradient.add({"w": g(1)}, 2, [0], factor=0)
    assert gradient.mean() == {} and gradient.rate == 0
    assert gradient.samples == 2 and gradient.versions == [0]


def test_what_is_not_finite_spoils_all_even_with_a_factor_of_0() -> None:
    gradient = Gradient()
    gradient.add({"w": g(1)}, 1, [0])
    gradient.add({"w": g(math.nan)}, 1, [0], finite=False, factor=0)
    gradient.add({"w": g(1)}, 1, [0])
    assert not gradient.finite and mean(gradient) == [1]


def test_a_weight_without_a_gradient_in_one_micro_batch_counts_as_0_there() -> None:
    gradient = Gradient()
    gradient.add({"w": g(4)}, 1, [0])
    gradient.add({"w": g(2), "v": g(6)}, 1, [0])
    assert gradient.mean()["w"].tolist() == [3] and gradient.sums["v"].tolist() == [3]


def sparse(row: int, value: float) -> Tensor:
    return torch.sparse_coo_tensor(
        [[row]], [[value, 0.0]], (4, 2), dtype=torch.float64, check_invariants=True
    )


def test_sparse_gradients_stay_sparse_and_touch_only_their_rows() -> None:
    gradient = Gradient()
    gradient.add({"w": sparse(1, 2.0)}, 1, [0])
    gradient.add({"w": sparse(1, 4.0)}, 1, [0])
    gradient.add({"w": sparse(3, 8.0)}, 2, [0])
    total = gradient.mean()["w"].coalesce()
    assert total.is_sparse and total.indices().tolist() == [[1, 3]]
    assert total.values().tolist() == [[6 / 4, 0], [16 / 4, 0]]


@pytest.mark.parametrize("sparse_first", [False, True])
def test_a_sparse_and_a_dense_gradient_of_one_weight_add_up(sparse_first: bool) -> None:
    dense = torch.arange(8, dtype=torch.float64).view(4, 2)
    both = [sparse(1, 2.0), dense.clone()]
    gradient = Gradient()
    for each in both if sparse_first else reversed(both):
        gradient.add({"w": each}, 1, [0])
    expected = dense.clone()
    expected[1, 0] += 2
    assert mean(gradient) == (expected / 2).tolist()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_all_finite(bad: float) -> None:
    good = [g(1, 2), torch.zeros(0), sparse(1, 2.0), torch.ones(2, dtype=torch.float16) * 6e4]
    assert all_finite([]) and all_finite(good)
    assert not all_finite([*good, g(1, bad)])
    assert not all_finite([sparse(2, bad), *good])
