"""One clock for all ranks; links as they are; no more in flight than the schedule says."""

import re
from itertools import pairwise

import pytest

from headrace.pipeline import Link, Timeline
from headrace.pipeline.timeline import Work

from .profiling import look, tune, watch_channels
from .ranks import TRANSPORTS, Launcher

pytestmark = pytest.mark.timeout(120)

Seen = tuple[Timeline, list[Link]]


def look_at(launcher: Launcher, latency: float | None, transport: str = "one host") -> Seen:
    outcome = launcher.run(look, 3, latency, environment=TRANSPORTS[transport])
    outcome.expect(0, 0, 0)
    first, *others = outcome.results
    assert others == [first, first], "every rank is told the same"
    timeline, links = first
    return timeline, links


def ends(timeline: Timeline, stage: int, work: Work) -> dict[int, tuple[float, float]]:
    return {s.index: (s.start, s.end) for s in timeline.stages[stage] if s.work is work}


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_one_clock(launcher: Launcher, transport: str) -> None:
    timeline, links = look_at(launcher, None, transport)
    assert len(timeline.stages) == 3 and len(links) == 2
    for link in links:
        assert 0 < link.latency < 0.2 and link.bandwidth > 1e6
    # Nothing arrives before it was sent; what clocks and their measuring err by is less than 1 ms.
    for upper, lower in pairwise(range(3)):
        sent, taken = (ends(timeline, j, Work.FORWARD) for j in (upper, lower))
        assert len(sent.keys() & taken.keys()) == 30
        assert all(taken[i][0] > sent[i][1] - 1e-3 for i in sent)
        back, arrived = (ends(timeline, j, Work.BACKWARD) for j in (lower, upper))
        both = back.keys() & arrived.keys()
        assert len(both) > 20
        assert all(arrived[i][0] > back[i][1] - 1e-3 for i in both)
    for stage, spans in enumerate(timeline.stages):
        sends = {span.work for span in spans} & {Work.SEND_DOWN, Work.SEND_UP}
        assert sends == ({Work.SEND_DOWN} if stage < 2 else set()) | (
            {Work.SEND_UP} if stage else set()
        )
        own = [s for s in spans if s.work not in (Work.SEND_DOWN, Work.SEND_UP)]
        assert all(a.end <= b.start + 1e-9 for a, b in pairwise(own)), "one thing at a time"


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_emulated_link_is_as_slow_as_it_says(launcher: Launcher, transport: str) -> None:
    timeline, links = look_at(launcher, 0.03, transport)
    assert all(0.03 <= link.latency < 0.15 for link in links)
    for upper, lower in pairwise(range(3)):
        sent, taken = (ends(timeline, j, Work.FORWARD) for j in (upper, lower))
        assert all(taken[i][0] - sent[i][1] > 0.029 for i in sent), "clocks agree all the same"


def test_slack_auto_knows_a_stages_pace(launcher: Launcher) -> None:
    """The drain before measuring brings back more than went forward since the stage was warm: once
    the pace was taken to be a quarter slower than it is, and the slack chosen too small.
    """
    outcome = launcher.run(tune, 3, 0.04)
    outcome.expect(0, 0, 0)
    (said,) = re.findall(r"the slowest stage takes ([\d.]+) ms", "".join(outcome.out))
    assert 55 <= float(said) < 72
    (slack,) = re.findall(r"^slack \[(\d), (\d)\]", "".join(outcome.out), re.M)
    assert slack in [("1", "2"), ("2", "1"), ("2", "2")], "twice 40.3 ms of 60.3"


def most_waiting(sent: dict[int, float], taken: dict[int, float]) -> dict[int, int]:
    """At each message's sending: how many of this channel had not been taken."""
    return {
        index: sum(t <= moment for t in sent.values()) - sum(t < moment for t in taken.values())
        for index, moment in sent.items()
    }


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("slack", [0, 1])
def test_what_is_in_flight(launcher: Launcher, slack: int, transport: str) -> None:
    """At a stage of depth d: d + 1 saved graphs, and two messages more from either side (one more
    for each slack), which is how far the schedule lets its neighbours be ahead; while the pipeline
    fills, and when it drains, what the stage before may have in flight.
    """
    outcome = launcher.run(watch_channels, 3, slack, environment=TRANSPORTS[transport])
    outcome.expect(0, 0, 0)
    accounts = outcome.results
    depths = accounts[0]["depths"]
    assert depths == (2 + 2 * slack, 1 + slack, 0)
    assert accounts[0]["rows"] == [(d + 1, d + 1 if d else 0) for d in depths]
    waiting = {}
    for upper, lower in pairwise(range(3)):
        for source, out, target, into in (
            (upper, "to_downstream", lower, "from_upstream"),
            (lower, "to_upstream", upper, "from_downstream"),
        ):
            sent, taken = accounts[source]["times"][out], accounts[target]["times"][into]
            assert len(taken) > 100 and sent.keys() >= taken.keys()
            at_most = most_waiting(sent, taken)
            between = range(2 * depths[0] + 1, 120 - depths[0])
            steady = max(at_most[index] for index in at_most.keys() & between)
            waiting[source, target] = steady
            assert max(at_most.values()) <= depths[upper] + 1
    assert max(waiting.values()) <= 2 + slack, waiting
    for upper, lower in pairwise(range(3) if transport == "one host" else ()):
        # The next stage's saved inputs lie where they arrived: there is no copy beside them.
        assert accounts[upper]["slots"] <= max(depths[lower] + 1 + 2 + slack, depths[upper] + 1)
        assert accounts[upper]["slots"] >= depths[lower] + 1
