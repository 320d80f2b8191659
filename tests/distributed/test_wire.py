"""Everything that can travel between stages does, and arrives as it was sent."""

import re

import pytest

from headrace.pipeline.schedule import depths

from ..pipeline.helpers import assert_close, assert_same
from .payloads import PAYLOADS, Seen, choose_slack, plain, train_payloads
from .ranks import TRANSPORTS, Launcher

pytestmark = pytest.mark.timeout(120)

All = dict[str, tuple[Seen, Seen]]


@pytest.fixture(scope="module", params=TRANSPORTS)
def trained(request: pytest.FixtureRequest, launcher: Launcher) -> tuple[All, list[All]]:
    """In one process alone, and on each of three ranks; all payloads in one launch."""
    outcome = launcher.run(train_payloads, 3, False, environment=TRANSPORTS[request.param])
    outcome.expect(0, 0, 0)
    assert not outcome.reports
    return train_payloads(alone=True), outcome.results


@pytest.mark.parametrize("name", PAYLOADS)
def test_bitwise_as_in_one_process(trained: tuple[All, list[All]], name: str) -> None:
    alone, ranks = trained
    for way in range(2):
        for rank in ranks:
            assert_same(rank[name][way].weights, alone[name][way].weights)
            assert str(rank[name][way].losses) == str(alone[name][way].losses)


@pytest.mark.parametrize("name", PAYLOADS)
def test_exact_as_on_one_device(trained: tuple[All, list[All]], name: str) -> None:
    assert_close(trained[1][0][name][1].weights, plain(PAYLOADS[name]), 1e-6)


@pytest.mark.parametrize("name", PAYLOADS)
def test_what_the_layers_take(trained: tuple[All, list[All]], name: str) -> None:
    for layer, wanted in PAYLOADS[name].seen.items():
        seen = [rank[name][0].layers[layer] for rank in trained[1]]
        assert sorted(seen, key=len) == [set(), set(), wanted], "on one rank, its own"


def test_slack_auto_is_chosen_once_and_alike(launcher: Launcher) -> None:
    outcome = launcher.run(choose_slack, 3, 24)
    outcome.expect(0, 0, 0)
    chosen = re.findall(r"^slack \[(\d+), (\d+)\]: .+$", "".join(outcome.out), re.MULTILINE)
    assert len(chosen) == 1, f"{outcome}"
    slack = [int(number) for number in chosen[0]]
    for depth, weights, losses in outcome.results:
        assert depth == depths(3, slack)
        assert_same(weights, outcome.results[0][1])
        assert losses == outcome.results[0][2]


def test_slack_auto_waits_for_its_moment(launcher: Launcher) -> None:
    """Fewer micro-batches than it measures on: nothing is chosen, and nothing hangs."""
    outcome = launcher.run(choose_slack, 3, 7)
    outcome.expect(0, 0, 0)
    assert "slack" not in "".join(outcome.out)
    assert [result[0] for result in outcome.results] == [depths(3, 1)] * 3
