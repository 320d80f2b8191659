"""The centre of elastic averaging, by hand: d = α(x - x̃); x ← x - d; x̃ ← x̃ + d."""

import copy

import pytest
import torch
from torch import Tensor

from headrace.pipeline.replicas.elastic import Centre


def g(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def make(alpha: float = 0.5, start: float = 0.0) -> Centre:
    return Centre(2, {"w": g(start)}, alpha)


def exchange(centre: Centre, replica: int, x: float, version: int) -> float:
    """Offer a replica's weight, and give the one that it has afterwards."""
    centre.take(replica, {"w": g(x)}, 0, [version])
    centre.fetch(replica)
    assert centre.answers() == [replica]
    return x - centre.give(replica)["w"].item()


def w(centre: Centre) -> float:
    return centre.weights["w"].item()


def test_both_move_towards_each_other() -> None:
    centre = make()
    assert (exchange(centre, 0, 8.0, 0), w(centre)) == (4, 4)
    assert (exchange(centre, 1, -4.0, 0), w(centre)) == (0, 0)
    assert (exchange(centre, 0, 4.0, 1), w(centre)) == (2, 2)
    assert (centre.version, centre.staleness) == (3, {0: 1, 1: 2})
    assert centre.latest == {0: 1, 1: 1} and centre.pushed == {0: 2, 1: 1}


@pytest.mark.parametrize("alpha", [0.25, 0.5, 1.0])
def test_a_replica_that_stays_where_it_is_draws_the_centre_there(alpha: float) -> None:
    """After k exchanges x̃ is short of x by (1 - α)^k; the replica and the centre keep their sum."""
    centre = make(alpha)
    for k in range(1, 8):
        before = w(centre)
        after = exchange(centre, 0, 64.0, k - 1)
        assert w(centre) == pytest.approx(64 * (1 - (1 - alpha) ** k), rel=1e-14)
        assert after + w(centre) == pytest.approx(64 + before, rel=1e-14)


def test_each_moves_by_what_it_has_offered_though_others_came_in_between() -> None:
    centre = make(start=4)
    centre.take(0, {"w": g(8.0)}, 0, [0])
    centre.take(1, {"w": g(0.0)}, 0, [0])
    for replica in (1, 0):
        centre.fetch(replica)
    assert centre.answers() == [1, 0] and centre.answers() == []
    assert centre.give(0)["w"].item() == 0.5 * (8 - 4)
    assert centre.give(1)["w"].item() == 0.5 * (0 - 6)
    assert w(centre) == 4 + 2 - 3


def test_several_weights_each_by_its_own_difference() -> None:
    centre = Centre(0, {"a": g(0, 4), "b": g(1)}, 0.5)
    centre.take(0, {"b": g(3), "a": g(2, 2)}, 0, [0])
    assert centre.names == ["a", "b"]
    moved = centre.give(0)
    assert {name: value.tolist() for name, value in moved.items()} == {"a": [1, -1], "b": [1]}
    weights = {name: value.tolist() for name, value in centre.weights.items()}
    assert weights == {"a": [1, 3], "b": [2]}


def test_what_is_offered_and_what_is_given_are_nobody_elses() -> None:
    given, offered = g(0), g(8)
    centre = Centre(0, {"w": given}, 0.5)
    centre.take(0, {"w": offered}, 0, [0])
    moved, snapshot = centre.give(0), centre.snapshot()
    exchange(centre, 0, 100.0, 1)
    assert (given.item(), offered.item(), moved["w"].item()) == (0, 8, 4)
    assert snapshot["w"].item() == 4
    loaded = {"w": g(1)}
    centre.load(loaded)
    exchange(centre, 0, 9.0, 2)
    assert (loaded["w"].item(), w(centre)) == (1, 5)


def test_nobody_waits_and_nothing_is_left_over() -> None:
    centre = make()
    centre.enter(0)
    centre.leave(1)
    centre.finish()
    assert (centre.version, w(centre), centre.answers()) == (0, 0, [])


def test_statistics() -> None:
    centre = make()
    exchange(centre, 1, 8.0, 0)
    exchange(centre, 0, 8.0, 0)
    statistics = centre.statistics
    assert (statistics.stage, statistics.updates) == (2, 2)
    assert (statistics.staleness, statistics.pushed) == ({0: 1, 1: 1}, {0: 1, 1: 1})
    assert statistics.learning_rate is None and centre.learning_rates == []


def test_it_goes_on_from_its_state_which_is_a_copy() -> None:
    centre, other = make(), make(start=100)
    exchange(centre, 0, 8.0, 0)
    state = centre.state_dict()
    before = copy.deepcopy(state)
    other.load_state_dict(state)
    assert (other.version, w(other)) == (1, 4)
    for each in (centre, other):
        assert (exchange(each, 0, 0.0, 1), w(each)) == (2, 2)
    assert state == before
