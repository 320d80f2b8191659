"""The slack that hides the links: simulated periods against closed forms, choices against all."""

import itertools
import random

import pytest

from headrace.pipeline.slack import LARGEST, TOLERANCE, choose_slack, period


@pytest.mark.parametrize("stages", [2, 3, 4, 6])
@pytest.mark.parametrize("hop", [0.0, 0.1, 0.3, 1.0])
def test_a_stream_without_slack_pays_for_its_links(stages: int, hop: float) -> None:
    """n micro-batches are under way and each pays 2(n-1) hops: 2(n-1)/n of a hop a micro-batch."""
    got = period([1.0] * stages, [hop] * (stages - 1), [0] * (stages - 1))
    assert got == pytest.approx(1 + 2 * (stages - 1) / stages * hop, rel=1e-6)


@pytest.mark.parametrize("stages", [2, 3, 5])
@pytest.mark.parametrize("slack", [1, 2, 4])
def test_a_slack_of_two_hops_over_the_period_hides_them(stages: int, slack: int) -> None:
    hops, slacks = [slack / 2] * (stages - 1), [slack] * (stages - 1)
    assert period([1.0] * stages, hops, slacks) == pytest.approx(1, rel=1e-9)
    less = [slack - 1] * (stages - 1)
    assert period([1.0] * stages, hops, less) > 1.05


def test_the_slowest_stage_sets_the_period() -> None:
    assert period([0.3, 1.0, 0.2], [0.0, 0.0], [0, 0]) == pytest.approx(1.0)
    assert period([2.0], [], []) == pytest.approx(2.0)


def test_more_in_flight_at_the_first_stage_alone_does_not_help() -> None:
    """The cycle between the two last neighbours binds."""
    tight = period([1.0] * 3, [0.4, 0.4], [0, 0])
    assert period([1.0] * 3, [0.4, 0.4], [4, 0]) > 0.9 * tight
    assert period([1.0] * 3, [0.4, 0.4], [1, 1]) == pytest.approx(1)


def test_the_choice_is_the_least_of_all_that_are_fast_enough() -> None:
    dice = random.Random(0)
    for _ in range(20):
        stages = dice.choice([2, 3, 3, 4])
        seconds = [dice.uniform(0.5, 1) for _ in range(stages)]
        hops = [dice.choice([0.01, 0.2, 0.5, 1.0, 1.6]) * dice.random() for _ in range(stages - 1)]
        chosen, _ = choose_slack(seconds, hops)
        goal = TOLERANCE * max(seconds)
        assert period(seconds, hops, chosen) <= goal
        less = [
            slack
            for slack in itertools.product(range(min(5, sum(chosen))), repeat=stages - 1)
            if sum(slack) < sum(chosen) and period(seconds, hops, slack) <= goal
        ]
        assert not less, (seconds, hops)


def test_a_link_too_slow_to_hide_gets_the_most_and_the_others_what_they_need() -> None:
    """Where no slack reached the goal every hop once got the most, its staleness for nothing."""
    chosen, why = choose_slack([1.0, 1.0, 1.0], [0.001, 50.0])
    assert chosen[1] == LARGEST and chosen[0] <= 1
    assert "8 is the most that is tried: the links limit this pipeline" in why


def test_the_reason_is_given_in_milliseconds() -> None:
    chosen, why = choose_slack([0.002, 0.004], [0.002])
    assert chosen == [1]
    assert why == (
        "slack [1]: the slowest stage takes 4.00 ms a micro-batch, the hops 2.00 ms one way; "
        "predicted 4.00 ms a micro-batch, 5.00 ms without slack"
    )


def test_one_stage_has_no_hops() -> None:
    assert choose_slack([1.0], [])[0] == []
