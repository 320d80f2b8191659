"""Copies of the weights: one a version in flight, and memory that is used again."""

import pytest
import torch
from torch import Tensor, nn

from headrace.pipeline import Pipeline
from headrace.pipeline.rules import Delayed
from headrace.pipeline.versions import Versions

from .helpers import SIZES, batches_of, momentum, tanh_net


def weights(value: float) -> dict[str, Tensor]:
    return {"a": torch.full((2, 3), float(value)), "b": torch.full((4,), float(value))}


def values(tensor: Tensor) -> set[float]:
    return set(tensor.flatten().tolist())


def test_one_copy_for_one_key() -> None:
    versions = Versions()
    first = versions.take(0, weights(1))
    first.users += 1
    second = versions.take(0, weights(2))
    assert second is first and len(versions.copies) == 1
    assert {name: values(leaf) for name, leaf in first.leaves.items()} == {
        "a": {1},
        "b": {1},
    }
    assert all(leaf.requires_grad and leaf.is_leaf for leaf in first.leaves.values())


def test_a_copy_that_nothing_uses_is_filled_anew() -> None:
    versions = Versions()
    one = versions.take(0, weights(0))
    one.users += 2
    memory = one.leaves["a"].data_ptr()
    one.release()
    two = versions.take(1, weights(1))
    two.users += 1
    assert two is not one and len(versions.copies) == 2
    one.release()
    three = versions.take(2, weights(2))
    assert three is one and three.leaves["a"].data_ptr() == memory
    assert values(three.leaves["a"]) == {2} and values(two.leaves["a"]) == {1}


def test_a_released_copy_is_not_found_under_its_old_key() -> None:
    """Its key may come again, after `load_state_dict`, with other weights."""
    versions = Versions()
    copy = versions.take(0, weights(1))
    copy.users += 1
    copy.release()
    assert values(versions.take(0, weights(5)).leaves["b"]) == {5}


def test_fill_computes_the_values() -> None:
    copy = Versions().take((3, 2), weights(1), lambda name, w: w + (10 if name == "a" else 20))
    assert values(copy.leaves["a"]) == {11}
    assert values(copy.leaves["b"]) == {21}


def most_in_flight(policy: str, depth: int, update_every: int) -> int:
    """Distinct weights among the forwards in flight right after one.

    Under `predict` they differ by the version they are extrapolated to, too.
    """
    if depth == 0:
        return 0  # the stage's own
    seen = []
    for i in range(100):
        version = max(0, i - depth) // update_every
        seen.append((version, i // update_every if policy == "predict" and version else 0))
    return max(len(set(seen[max(0, i - depth) : i + 1])) for i in range(100))


@pytest.mark.parametrize("policy", ["stash", "predict"])
@pytest.mark.parametrize("update_every", [1, 3])
@pytest.mark.parametrize("slack", [0, 1, 2])
def test_no_more_copies_than_distinct_versions_in_flight(
    slack: int, update_every: int, policy: str
) -> None:
    pipe = Pipeline(
        tanh_net(), nn.MSELoss(), momentum, stages=3, balance=SIZES[3], slack=slack,
        update_every=update_every, rule=Delayed(policy),
    )  # fmt: skip
    data = batches_of(200, 4)  # 50 micro-batches
    memory = []
    for epoch in range(2):
        pipe.train(data)
        for j, engine in enumerate(pipe._engines):
            copies = engine.stage.rule.policy.versions.copies  # type: ignore[attr-defined]
            expected = most_in_flight(policy, pipe.depths[j], update_every)
            assert len(copies) == expected, f"stage {j} in epoch {epoch}"
            assert all(set(c.leaves) == set(engine.stage.trainable) for c in copies)
            memory.append([leaf.data_ptr() for c in copies for leaf in c.leaves.values()])
    assert memory[:3] == memory[3:]
    assert pipe.depths == (2 + 2 * slack, 1 + slack, 0)
    # One a version: 2(1 + slack) + 1 at the first stage, for an update each micro-batch.
    if update_every == 1:
        assert len(memory[0]) == (2 * (1 + slack) + 1) * 6


@pytest.mark.parametrize("policy", ["current", "replay"])
def test_the_other_policies_keep_none(policy: str) -> None:
    pipe = Pipeline(
        tanh_net(), nn.MSELoss(), momentum, stages=3, balance=SIZES[3],
        rule=Delayed(policy),
    )  # fmt: skip
    pipe.train(batches_of(40, 4))
    flights = [f for e in pipe._engines for f in e.stage.flights.values()]
    assert len(flights) == sum(pipe.depths) and all(f.weights is None for f in flights)


def test_replay_keeps_no_graph() -> None:
    pipe = Pipeline(
        tanh_net(), nn.MSELoss(), momentum, stages=3, balance=SIZES[3], rule=Delayed("replay")
    )
    pipe.train(batches_of(40, 4))
    assert all(f.output is None for e in pipe._engines for f in e.stage.flights.values())


def test_a_flight_is_let_go_of_with_all_it_holds() -> None:
    pipe = Pipeline(tanh_net(), nn.MSELoss(), momentum, stages=3, balance=SIZES[3])
    pipe.train(batches_of(40, 4))
    assert [len(e.stage.flights) for e in pipe._engines] == list(pipe.depths)
    pipe.drain()
    for engine in pipe._engines:
        assert not engine.stage.flights
        copies = engine.stage.rule.policy.versions.copies  # type: ignore[attr-defined]
        assert [c.users for c in copies] == [0] * len(copies)
        assert all(leaf.grad is None for c in copies for leaf in c.leaves.values())
