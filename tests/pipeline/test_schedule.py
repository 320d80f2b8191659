"""Schedules as literal staircases: who does what in which order, and where the updates are."""

import itertools
from textwrap import dedent

import pytest

from headrace.pipeline.schedule import (
    SCHEDULES,
    Action,
    Backward,
    Forward,
    Learn,
    Update,
    depths,
    draw,
    play,
)

STAIRCASES = {
    ("gpipe", 3, 0): """
        F0 F1 F2 F3 .  .  .  .  B0 B1 B2 B3
        .  F0 F1 F2 F3 .  .  B0 B1 B2 B3 .
        .  .  F0 F1 F2 F3 B0 B1 B2 B3 .  .
        """,
    ("gpipe", 4, 0): """
        F0 F1 F2 F3 .  .  .  .  .  .  B0 B1 B2 B3
        .  F0 F1 F2 F3 .  .  .  .  B0 B1 B2 B3 .
        .  .  F0 F1 F2 F3 .  .  B0 B1 B2 B3 .  .
        .  .  .  F0 F1 F2 F3 B0 B1 B2 B3 .  .  .
        """,
    ("1f1b", 3, 0): """
        F0 F1 F2 .  .  B0 F3 B1 .  B2 .  B3
        .  F0 F1 .  B0 F2 B1 F3 B2 .  B3 .
        .  .  F0 B0 F1 B1 F2 B2 F3 B3 .  .
        """,
    ("1f1b", 4, 0): """
        F0 F1 F2 F3 .  .  .  B0 .  B1 .  B2 .  B3
        .  F0 F1 F2 .  .  B0 F3 B1 .  B2 .  B3 .
        .  .  F0 F1 .  B0 F2 B1 F3 B2 .  B3 .  .
        .  .  .  F0 B0 F1 B1 F2 B2 F3 B3 .  .  .
        """,
    ("stream", 3, 0): """
        F0 F1 F2 .  .  B0 F3 B1 F4 B2 F5 B3 .  B4 .  B5
        .  F0 F1 .  B0 F2 B1 F3 B2 F4 B3 F5 B4 .  B5 .
        .  .  F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5 .  .
        """,
    ("stream", 3, 1): """
        F0 F1 F2 F3 F4 B0 F5 B1 .  B2 .  B3 .  B4 .  B5
        .  F0 F1 F2 B0 F3 B1 F4 B2 F5 B3 .  B4 .  B5 .
        .  .  F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5 .  .
        """,
    ("stream", 4, 0): """
        F0 F1 F2 F3 .  .  .  B0 F4 B1 F5 B2 .  B3 .  B4 .  B5
        .  F0 F1 F2 .  .  B0 F3 B1 F4 B2 F5 B3 .  B4 .  B5 .
        .  .  F0 F1 .  B0 F2 B1 F3 B2 F4 B3 F5 B4 .  B5 .  .
        .  .  .  F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5 .  .  .
        """,
    ("stream", 4, 1): """
        F0 F1 F2 F3 F4 F5 F6 B0 F7 B1 .  B2 .  B3 .  B4 .  B5 .  B6 .  B7
        .  F0 F1 F2 F3 F4 B0 F5 B1 F6 B2 F7 B3 .  B4 .  B5 .  B6 .  B7 .
        .  .  F0 F1 F2 B0 F3 B1 F4 B2 F5 B3 F6 B4 F7 B5 .  B6 .  B7 .  .
        .  .  .  F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5 F6 B6 F7 B7 .  .  .
        """,
}


@pytest.mark.parametrize(("name", "stages", "slack"), STAIRCASES)
def test_staircase(name: str, stages: int, slack: int) -> None:
    picture = dedent(STAIRCASES[name, stages, slack]).strip()
    micro_batches = picture.splitlines()[-1].count("F")
    assert draw(SCHEDULES[name], stages, micro_batches, slack) == picture


@pytest.mark.parametrize(("name", "stages"), [("gpipe", 3), ("1f1b", 2), ("stream", 4)])
def test_one_stage_has_nothing_to_wait_for(name: str, stages: int) -> None:
    one = draw(SCHEDULES[name], 1, 3)
    assert one == ("F0 F1 F2 B0 B1 B2" if name == "gpipe" else "F0 B0 F1 B1 F2 B2")
    few = draw(SCHEDULES[name], stages, 1).splitlines()  # fewer micro-batches than stages
    assert [row.split() for row in few] == [
        ["."] * j + ["F0"] + ["."] * (2 * (stages - 1 - j)) + ["B0"] + ["."] * j
        for j in range(stages)
    ]


@pytest.mark.parametrize(
    ("stages", "slack", "expected"),
    [
        (1, 0, (0,)),
        (1, [], (0,)),
        (3, 0, (2, 1, 0)),
        (4, 0, (3, 2, 1, 0)),
        (3, 1, (4, 2, 0)),
        (4, 1, (6, 4, 2, 0)),
        (4, [0, 2, 1], (6, 5, 2, 0)),
        (3, (3, 0), (5, 1, 0)),
    ],
)
def test_depths(stages: int, slack: int | list[int], expected: tuple[int, ...]) -> None:
    assert depths(stages, slack) == expected
    assert SCHEDULES["stream"].depths(stages, slack) == expected
    for name in ("gpipe", "1f1b"):  # slack is the stream's alone
        assert SCHEDULES[name].depths(stages, slack) == depths(stages, 0)


@pytest.mark.parametrize("slack", [-1, [1], [1, 2, 3], [0, -1], [0.5, 1], "aut"])
def test_a_slack_that_cannot_be_is_refused(slack: int) -> None:
    with pytest.raises(ValueError, match=r"one for each of the 2 hops .*\[1, 1\]"):
        depths(3, slack)


def listing(actions: list[Action]) -> str:
    letters = {Forward: "F", Backward: "B", Learn: "L"}
    words = [letters[type(a)] + str(a.index) if not isinstance(a, Update) else "U" for a in actions]
    return " ".join(words)


def stretch(name: str, depth: int, marks: str, start: int = 0) -> str:
    """`marks`: a letter for each micro-batch, u where it closes an update."""
    actions = SCHEDULES[name].actions(depth, start)
    return listing(list(play(actions, [mark == "u" for mark in marks])))


def test_a_stream_updates_after_each_backward() -> None:
    assert stretch("stream", 2, "uuuu") == "F0 F1 F2 B0 U F3 B1 U B2 U B3 U"
    assert stretch("stream", 0, "uu") == "F0 B0 U F1 B1 U"


def test_a_stream_updates_after_those_that_are_marked() -> None:
    # Three to an update; drained after 4, and after none: what is accumulated stays.
    assert stretch("stream", 1, "..u.") == "F0 F1 B0 F2 B1 F3 B2 U B3"
    assert stretch("stream", 1, "", start=4) == ""
    assert stretch("stream", 1, ".u.", start=4) == "F4 F5 B4 F6 B5 U B6"
    # A batch that grows while two are in flight: a mark takes effect where it rides.
    assert stretch("stream", 2, "uu.u..u") == ("F0 F1 F2 B0 U F3 B1 U F4 B2 F5 B3 U F6 B4 B5 B6 U")


def test_a_drain_in_the_middle_loses_nothing_and_keeps_the_order() -> None:
    for depth, first, second in itertools.product(range(4), (0, 1, 2, 5), (1, 3)):
        words = stretch("stream", depth, "u" * first).split()
        words += stretch("stream", depth, "u" * second, start=first).split()
        for kind in "FB":
            found = [int(word[1:]) for word in words if word[0] == kind]
            assert found == list(range(first + second))
        in_flight = 0
        for word in words:
            in_flight += (word[0] == "F") - (word[0] == "B")
            assert 0 <= in_flight <= depth + 1


def test_a_flush_updates_once_at_the_end_of_every_so_many_mini_batches() -> None:
    assert stretch("gpipe", 2, "..u") == "F0 F1 F2 B0 B1 B2 U"
    assert stretch("1f1b", 1, "..u") == "F0 F1 B0 F2 B1 B2 U"
    assert stretch("1f1b", 1, "..", start=0) == "F0 F1 B0 B1"
    assert stretch("1f1b", 1, ".u", start=2) == "F2 F3 B2 B3 U"
    assert stretch("gpipe", 1, "") == ""  # an empty stretch is no mini-batch


@pytest.mark.parametrize("name", ["stream", "gpipe", "1f1b"])
def test_a_stage_that_waits_for_no_gradient(name: str) -> None:
    """Depth and flushing schedules mean nothing to it, but for the updates."""
    update = "" if name != "stream" else " U"
    wanted = f"F0 B0{update} L-3 F1 B1{update} L-2 F2 B2{update} L-1 F3 B3{update} L0 L3"
    actions, marks = SCHEDULES[name].actions(5, 0, ahead=3), [name == "stream"] * 3 + [True]
    assert listing(list(play(actions, marks))) == wanted + (" U" if name != "stream" else "")
    # With lag 0 it learns at once; after a drain it begins anew.
    actions = SCHEDULES["stream"].actions(0, 4, ahead=0)
    assert listing(list(play(actions, [False, True, False]))) == "F4 B4 L4 F5 B5 U L5 F6 B6 L6 L6"


def test_depths_end_where_no_gradient_is_waited_for() -> None:
    assert depths(5, 0, [True, True, False, True, True]) == (2, 1, 0, 1, 0)
    assert depths(4, 1, [False, True, True, False]) == (0, 4, 2, 0)
    assert depths(3, 0, [False, False, False]) == (0, 0, 0)


def test_memory_is_bounded_as_the_names_say() -> None:
    """gpipe keeps all micro-batches of a mini-batch in flight, 1f1b as many as stages are below."""
    for stages, count in ((3, 8), (4, 6)):
        for j, depth in enumerate(depths(stages, 0)):
            for name, most in (("gpipe", count), ("1f1b", stages - j), ("stream", stages - j)):
                steps = [
                    (word[0] == "F") - (word[0] == "B")
                    for word in stretch(name, depth, "." * count).split()
                ]
                assert max(itertools.accumulate(steps)) == most
