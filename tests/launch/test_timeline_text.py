"""Timelines drawn in letters, against drawings made by hand."""

import pytest

from headrace.launch.profiling.text import LEGEND, timeline_text, timelines_text
from headrace.pipeline import Timeline
from headrace.pipeline.timeline import Span, Work

WORKS = {
    "F": Work.FORWARD, "B": Work.BACKWARD, "u": Work.UPDATE, ".": Work.WAIT, "d": Work.DATA,
    "v": Work.SEND_DOWN, "^": Work.SEND_UP,
}  # fmt: skip


def row(*spans: tuple[str, float, float]) -> tuple[Span, ...]:
    """Spans of a stage, each a letter, its start and its end."""
    return tuple(Span(WORKS[letter], 0, start, end) for letter, start, end in spans)


def letters(text: str, slot: float = 1.0) -> tuple[Span, ...]:
    """A stage that is at one thing for each slot; a space is nothing."""
    spans = [(letter, k * slot, (k + 1) * slot) for k, letter in enumerate(text)]
    return row(*(span for span in spans if span[0] != " "))


def test_a_flush_is_a_staircase_with_a_bubble() -> None:
    timeline = Timeline((letters("FF....BBBBu"), letters(" .FFBBBB..u")))
    assert (
        timeline_text(timeline, width=22)
        == """\
stage 0   |FFFF........BBBBBBBBuu| 64%
stage 1   |  ..FFFFBBBBBBBB....uu| 64%
          0            11000.0 ms"""
    )


def test_a_stream_is_a_staircase_without_one() -> None:
    timeline = Timeline(
        (letters("dFFF.BuF"), letters("  .FBuFB"), letters("   .FBuF", slot=1)),
    )
    assert (
        timeline_text(timeline, width=16)
        == """\
stage 0   |ddFFFFFF..BBuuFF| 75%
stage 1   |    ..FFBBuuFFBB| 62%
stage 2   |      ..FFBBuuFF| 50%
          0       8000.0 ms"""
    )


def test_of_a_letter_most_counts() -> None:
    """Letters of 10 ms each: 4 F and 6 B; 3 u, 4 F and 3 B; 1 F and nothing else."""
    mixed = row(
        ("F", 0, 0.004), ("B", 0.004, 0.01), ("u", 0.01, 0.013), ("F", 0.013, 0.017),
        ("B", 0.017, 0.02), ("F", 0.024, 0.025), (".", 0.03, 0.04),
    )  # fmt: skip
    assert (
        timeline_text(Timeline((mixed,)), width=4)
        == """\
stage 0   |BFF.| 52%
          0 40.0 ms"""
    )


def test_spans_of_one_kind_count_together() -> None:
    """Twice 3 ms of F are more than 4 ms of B in between."""
    spans = row(("F", 0, 0.003), ("B", 0.003, 0.007), ("F", 0.007, 0.01))
    assert timeline_text(Timeline((spans,)), width=1).startswith("stage 0   |F| 100%\n")


@pytest.mark.parametrize("slot", [0.001, 0.003, 0.007, 0.1, 0.3])
@pytest.mark.parametrize("end", [1, 3, 7, 49, 71])
def test_a_span_ends_where_it_ends(slot: float, end: int) -> None:
    """A rounding error once was a letter where there was nothing."""
    timeline = Timeline((row(("F", 0, slot * end)), row(("B", 0, slot * 72))))
    first, second, _ = timeline_text(timeline).splitlines()
    assert first == f"stage 0   |{'F' * end}{' ' * (72 - end)}| {end / 72:.0%}"
    assert second == f"stage 1   |{'B' * 72}| 100%"


def test_what_is_sent_meanwhile_is_not_drawn_but_takes_time() -> None:
    timeline = Timeline((row(("F", 0, 1), ("v", 1, 4), ("^", 0, 2)),))
    assert (
        timeline_text(timeline, width=8)
        == """\
stage 0   |FF      | 25%
          0 4000.0 ms"""
    )


def test_many_stages_stay_below_each_other() -> None:
    lines = timeline_text(Timeline((letters("FB"),) * 101), width=2).splitlines()
    assert (lines[9], lines[10]) == ("stage 9   |FB| 100%", "stage 10  |FB| 100%")
    assert lines[100] == "stage 100 |FB| 100%"


def test_an_empty_timeline_is_blank() -> None:
    assert (
        timeline_text(Timeline(((), ())), width=12)
        == """\
stage 0   |            | 0%
stage 1   |            | 0%
          0      0.0 ms"""
    )
    assert (
        timeline_text(Timeline((row(("F", 0, 0)),)), 2) == "stage 0   |  | 0%\n          0 0.0 ms"
    )
    assert timeline_text(Timeline(()), width=12) == "          0      0.0 ms"


def test_two_timelines_have_one_scale() -> None:
    """The shorter one takes half the width."""
    stream, flush = Timeline((letters("FBFB"),)), Timeline((letters("FF..BBBB"),))
    assert (
        timelines_text({"stream": stream, "1F1B": flush}, width=24)
        == f"""\
stream
stage 0   |FFFBBBFFFBBB| 100%
          0   4000.0 ms

1F1B
stage 0   |FFFFFF......BBBBBBBBBBBB| 75%
          0               8000.0 ms

{LEGEND}"""
    )
    for word in ("F forward", "B backward", ". waiting", "blank: the engine", "at the right"):
        assert word in LEGEND


def test_timelines_without_spans_have_a_scale_too() -> None:
    empty, short = Timeline(((),)), Timeline((letters("F"),))
    assert timelines_text({"a": empty}, width=9).splitlines()[1] == f"stage 0   |{' ' * 9}| 0%"
    drawn = timelines_text({"a": empty, "b": short}, width=9).splitlines()
    assert drawn[1] == "stage 0   | | 0%"
    assert drawn[5] == "stage 0   |FFFFFFFFF| 100%"
