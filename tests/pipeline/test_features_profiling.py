"""Timelines, links, and shares of time, of all stages in one process."""

import json
from collections.abc import Callable
from itertools import pairwise

import pytest

from headrace.pipeline import Link, Pipeline, Timeline
from headrace.pipeline.rules import Delayed
from headrace.pipeline.timeline import WORKING, Span, Work, chrome_trace

from .alone import pipeline
from .helpers import batches_of


def indices(timeline: Timeline, stage: int, work: Work) -> list[int]:
    return [span.index for span in timeline.stages[stage] if span.work is work]


def test_a_timeline_has_every_piece_of_work_once() -> None:
    pipe = pipeline(3)
    data = batches_of(40, 4)
    pipe.train(data)
    pipe.drain()
    with pipe.record() as recording:
        pipe.train(data)
    timeline = recording.timeline
    assert len(timeline.stages) == 3
    for stage in range(3):
        # What was in flight when the block ended is not in it: its gradient had not come yet.
        came_back = range(10, 20 - pipe.depths[stage])
        assert indices(timeline, stage, Work.FORWARD) == [*range(10, 20)]
        assert indices(timeline, stage, Work.BACKWARD) == [*came_back]
        assert indices(timeline, stage, Work.UPDATE) == [*came_back]
        starts = [span.start for span in timeline.stages[stage]]
        assert starts == sorted(starts)
    work = [[s for s in spans if s.work in WORKING] for spans in timeline.stages]
    for a, b in pairwise(sorted(span for spans in work for span in spans)):
        assert a != b
    in_turn = sorted((s for spans in work for s in spans), key=lambda s: s.start)
    assert all(a.end <= b.start for a, b in pairwise(in_turn)), "one process does one thing at once"
    assert timeline.stages[0][0].start == 0


def test_a_trace_can_be_written() -> None:
    pipe = pipeline(2)
    with pipe.record() as recording:
        pipe.train(batches_of(20, 4))
    trace = json.loads(json.dumps(chrome_trace({"stream": recording.timeline})))
    pieces = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    spans = [event for event in pieces if event["cat"] != "idle"]
    assert len(spans) == sum(map(len, recording.timeline.stages))
    assert {event["pid"] for event in spans} == {0, 1}
    idle = [event for event in pieces if event["cat"] == "idle"]
    gaps = [gap for stage in (0, 1) for gap in recording.timeline.idle(stage)]
    assert [(e["ts"], e["ts"] + e["dur"]) for e in idle] == [
        pytest.approx((1e6 * a, 1e6 * b)) for a, b in gaps
    ]
    assert {event["tid"] for event in idle} == {0}


def test_what_nothing_is_recorded_of_is_idle() -> None:
    first = [Span(Work.FORWARD, 0, 5, 7), Span(Work.SEND_DOWN, 0, 6, 9), Span(Work.WAIT, 0, 8, 9)]
    timeline = Timeline.of([first, [Span(Work.FORWARD, 0, 10, 12)]])
    assert timeline.idle(0) == [(4, 7)], "to the end of the window"
    assert timeline.idle(1) == [(0, 5)]
    assert Timeline.of([[]]).idle(0) == []


def test_recording_changes_no_number() -> None:
    data = batches_of(40, 4)
    plain, recorded = pipeline(3), pipeline(3)
    reports = [plain.train(data).loss for _ in range(2)]
    with recorded.record():
        losses = [recorded.train(data).loss]
    losses.append(recorded.train(data).loss)
    # Gathering the timeline drains, so the second call has what the first left in flight as well.
    plain.drain()
    assert losses[0] == reports[0]
    assert plain.version == 20 and recorded.version == 18


def test_the_timeline_is_there_after_the_block() -> None:
    pipe = pipeline(2)
    with (
        pipe.record() as recording,
        pytest.raises(RuntimeError, match="once the with-block of record"),
    ):
        recording.timeline  # noqa: B018
    assert recording.timeline.seconds == 0


def test_a_block_that_fails_records_nothing_more() -> None:
    pipe = pipeline(2)
    with pytest.raises(KeyError), pipe.record():
        raise KeyError
    pipe.train(batches_of(20, 4))
    with pipe.record() as recording:
        pass
    assert all(span.work is Work.WAIT for spans in recording.timeline.stages for span in spans)


def test_links_between_stages_of_one_process() -> None:
    pipe = pipeline(3)
    links = pipe.measure_links()
    assert len(links) == 2
    assert all(link.latency < 0.5 and link.bandwidth > 1e6 for link in links)
    pipe.train(batches_of(20, 4))
    assert len(pipeline(1).measure_links()) == 0


def test_shares_of_time_from_where_one_says() -> None:
    pipe = pipeline(2)
    pipe.train(batches_of(400, 4))
    pipe.reset_shares()
    fresh = pipe.statistics()
    assert all(row.busy != row.busy for row in fresh), "no training, no share: NaN"
    pipe.train(batches_of(40, 4))
    rows = pipe.statistics()
    for row in rows:
        assert 0 < row.busy <= 1 and 0 <= row.waiting < 1 and row.busy + row.waiting <= 1.001
    assert rows[1].data == 0 and 0 < rows[0].data < 1
    assert rows[0].updates > 100, "counts are not reset"


COPIES: dict[str, Callable[[int], int]] = {
    "stash": lambda depth: depth + 1 if depth else 0,  # one of each version in flight
    "current": lambda depth: 0,
    "replay": lambda depth: 0,
    "predict": lambda depth: depth + 2 if depth else 0,  # and the weights one update ago
}


@pytest.mark.parametrize("slack", [0, 2])
@pytest.mark.parametrize("weights", COPIES)
def test_micro_batches_in_flight_and_copies_of_the_weights(weights: str, slack: int) -> None:
    pipe = pipeline(4, slack=slack, rule=Delayed(weights))
    pipe.train(batches_of(120, 4))
    for row, depth in zip(pipe.statistics(), pipe.depths, strict=True):
        assert row.in_flight == depth + 1 == (3 - row.stage) * (1 + slack) + 1
        assert row.copies == COPIES[weights](depth)


@pytest.mark.parametrize(("schedule", "deepest"), [("gpipe", 4), ("1f1b", 3)])
def test_in_flight_under_a_flush(schedule: str, deepest: int) -> None:
    pipe = pipeline(3, schedule=schedule, micro_batches=4)
    pipe.train(batches_of(64, 16))
    rows = pipe.statistics()
    wanted = [deepest] * 3 if schedule == "gpipe" else [3, 2, 1]
    assert [row.in_flight for row in rows] == wanted
    assert [row.copies for row in rows] == [0] * 3


def test_an_emulated_link_needs_processes() -> None:
    with pytest.raises(ValueError, match="emulated_link= holds messages between processes back"):
        pipeline(2, emulated_link=Link(latency=0.01))
    with pytest.raises(TypeError, match=r"emulated_link=0\.01"):
        pipeline(2, emulated_link=0.01)


def test_a_closed_pipeline_says_so() -> None:
    pipe: Pipeline = pipeline(2)
    pipe.close()
    for act in (pipe.measure_links, pipe.reset_shares, lambda: pipe.record().__enter__()):
        with pytest.raises(RuntimeError, match="has ended, by close"):
            act()
