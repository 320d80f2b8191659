"""A link's times."""

import math

import pytest

from headrace.pipeline import Link


def test_a_link_that_costs_nothing() -> None:
    assert Link().seconds(1e9) == 0 and Link().occupied(1e9) == 0


def test_latency_and_bandwidth() -> None:
    link = Link(latency=0.5, bandwidth=100)
    assert link.occupied(300) == 3
    assert link.seconds(300) == 3.5
    assert link.seconds(0) == 0.5


@pytest.mark.parametrize("latency", [-0.1, math.inf, math.nan])
def test_latency_must_be_one(latency: float) -> None:
    with pytest.raises(ValueError, match=f"latency={latency}: give seconds, 0 or more"):
        Link(latency=latency)


@pytest.mark.parametrize("bandwidth", [0.0, -1.0, math.nan])
def test_bandwidth_must_be_one(bandwidth: float) -> None:
    with pytest.raises(ValueError, match=f"bandwidth={bandwidth}: give bytes a second"):
        Link(bandwidth=bandwidth)
