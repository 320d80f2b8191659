"""Sparse generated samples: what is in them, how sparse they are, and that SGD learns them."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from headrace.launch.components import Component, build
from headrace.launch.data import SparseClassification
from headrace.launch.data.sparse import _distinct
from headrace.launch.studies.sparsity import sparsity
from headrace.models import sparse_logistic

SMALL: dict[str, Any] = {"samples": 2000, "features": 1000, "nonzeros": 6}


def test_items_are_pairs_with_a_target_and_collate_to_batches_of_them() -> None:
    data = SparseClassification(**SMALL)
    assert len(data) == len(list(iter(data))) == 2000
    (indices, values), target = data[7]
    assert (indices.shape, indices.dtype) == ((6,), torch.int64)
    assert (values.shape, values.dtype) == ((6,), torch.float32)
    assert (target.shape, target.dtype) == ((), torch.float32)
    pair, targets = next(iter(DataLoader(data, batch_size=4)))
    assert [tuple(part.shape) for part in (*pair, targets)] == [(4, 6), (4, 6), (4,)]
    assert torch.equal(pair[0], data.indices[:4])
    assert build("data.train", Component("SparseClassification")).func is SparseClassification  # type: ignore[attr-defined]


def test_features_of_a_sample_are_distinct_even_under_a_steep_law() -> None:
    data = SparseClassification(samples=500, features=20, nonzeros=10, exponent=2.0)
    assert all(len(set(row)) == 10 for row in data.indices.tolist())
    assert (data.indices.min(), data.indices.max()) == (0, 19)


def test_distinct_draws_have_the_odds_of_drawing_one_after_another() -> None:
    weights = torch.tensor([4.0, 2.0, 1.0, 1.0])
    rows = _distinct(weights, 40_000, 2, torch.Generator().manual_seed(0))
    shares = torch.bincount(rows[:, 0] * 4 + rows[:, 1], minlength=16) / 40_000
    odds = weights / 8
    for a in range(4):
        for b in range(a + 1, 4):
            expected = odds[a] * odds[b] * (1 / (1 - odds[a]) + 1 / (1 - odds[b]))
            assert shares[4 * a + b] == pytest.approx(expected.item(), abs=0.01)


def test_samples_depend_on_the_seed_and_the_split_alone() -> None:
    data, twin = SparseClassification(**SMALL), SparseClassification(**SMALL)
    test = SparseClassification(**SMALL, split="test")
    other = SparseClassification(**SMALL, seed=1)
    for name in ("indices", "values", "targets"):
        assert torch.equal(getattr(data, name), getattr(twin, name))
        assert not torch.equal(getattr(data, name), getattr(test, name))
        assert not torch.equal(getattr(data, name), getattr(other, name))
    assert torch.equal(data.weights, test.weights)
    assert not torch.equal(data.weights, other.weights)


def test_the_hidden_model_is_sparse_and_targets_are_draws_from_it() -> None:
    data = SparseClassification(samples=20_000)
    assert (data.weights != 0).float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert data.weights[data.weights != 0].std().item() == pytest.approx(4, abs=0.1)
    probability = (data.weights[data.indices] * data.values).sum(dim=1).sigmoid()
    for low in (0.0, 0.2, 0.4, 0.6, 0.8):
        among = (probability >= low) & (probability < low + 0.2)
        expected = probability[among].mean().item()
        assert data.targets[among].mean().item() == pytest.approx(expected, abs=0.05)


def test_popularity_is_a_power_law_of_no_order() -> None:
    data = SparseClassification(samples=20_000, features=1000, nonzeros=1, exponent=1.0)
    counts, order = data.indices.flatten().bincount(minlength=1000).sort(descending=True)
    harmonic = (1 / torch.arange(1, 1001)).sum().item()
    for rank in (1, 2, 4, 8):
        expected = 20_000 / rank / harmonic
        assert counts[rank - 1].item() == pytest.approx(expected, rel=0.1)
    assert order[:5].tolist() != [0, 1, 2, 3, 4]


def test_it_is_as_sparse_as_documented() -> None:
    found = sparsity(SparseClassification().indices)
    assert found.exact and found.omega == 15
    assert found.delta == pytest.approx(0.22, abs=0.005)
    assert found.rho == pytest.approx(0.49, abs=0.005)


def test_serial_sgd_learns_it() -> None:
    train = SparseClassification(samples=2000, features=300)
    test = SparseClassification(samples=2000, features=300, split="test")
    model, loss_fn = sparse_logistic(300), nn.BCEWithLogitsLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for pair, target in DataLoader(train, shuffle=True, generator=generator):
            optimizer.zero_grad()
            loss_fn(model(pair), target).backward()
            optimizer.step()
        scheduler.step()
    with torch.no_grad():
        losses = [loss_fn(model([d.indices, d.values]), d.targets).item() for d in (train, test)]
    assert losses == [pytest.approx(0.18, abs=0.03), pytest.approx(0.27, abs=0.03)]  # from 0.69


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": 0}, "samples=0: give a whole number"),
        ({"features": 2.5}, "features=2.5: give a whole number"),
        ({"nonzeros": -1}, "nonzeros=-1: give a whole number"),
        ({"features": 20, "nonzeros": 11}, "nonzeros=11: give at most half of features=20"),
        ({"exponent": -0.1}, "exponent=-0.1: give a number from 0 to 2"),
        ({"exponent": float("nan")}, "exponent=nan"),
        ({"split": "valid"}, "split='valid': give one of train, test"),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseClassification(**arguments)
