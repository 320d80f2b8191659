"""How scripts end, well and badly, outside of the pipeline's calls."""

import pytest

from ..pipeline.helpers import assert_same
from .ranks import Launcher
from .scripts import (
    call_differently,
    close_late,
    end_in_function,
    end_without_close,
    swallow,
    two_at_once,
    two_in_turn,
    use_closed,
)

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize("calls", [["train", "evaluate"], ["evaluate", "train"],
                                   ["train", "nothing"], ["nothing", "train"],
                                   ["state_dict", "predict"], ["drain", "statistics"]])  # fmt: skip
def test_unlike_calls(launcher: Launcher, calls: list[str]) -> None:
    outcome = launcher.run(call_differently, 2, calls)
    outcome.expect(1, 1)
    first, second = ("close" if call == "nothing" else call for call in calls)
    assert outcome.report.startswith("headrace: stage 1 of 2 (rank 1) failed: RuntimeError in ")
    assert f"the first stage called {first}() while stage 1 called {second}()" in outcome.report


def test_unlike_calls_of_the_last_rank(launcher: Launcher) -> None:
    """The first stage has nothing left to do by then: it ends with an error all the same."""
    outcome = launcher.run(call_differently, 3, ["drain", "drain", "state_dict"])
    outcome.expect(1, 1, 1)
    assert "called drain() while stage 2 called state_dict()" in outcome.report


@pytest.mark.parametrize("code", [None, 0, 5])
def test_end_without_close(launcher: Launcher, code: int | None) -> None:
    outcome = launcher.run(end_without_close, 3, code)
    outcome.expect(*[code or 0] * 3)
    assert not outcome.reports
    assert outcome.tracebacks == 0


def test_end_without_close_where_rank_0_hosts_the_store(launcher: Launcher) -> None:
    """Started by other means than torchrun."""
    launcher.run(end_without_close, 2, None, agent=False).expect(0, 0)


def test_end_out_of_scope(launcher: Launcher) -> None:
    launcher.run(end_in_function, 3).expect(0, 0, 0)


@pytest.mark.parametrize("agent", [True, False])
def test_a_rank_that_is_long_before_it_closes(launcher: Launcher, agent: bool) -> None:
    """For longer than the time-out; the others are waiting in close(), or have left."""
    outcome = launcher.run(close_late, 3, 4.0, (2.0, 2.0), agent=agent)
    outcome.expect(0, 0, 0)
    assert not outcome.reports


@pytest.mark.parametrize("program", [two_in_turn, two_at_once])
def test_two_pipelines(launcher: Launcher, program: object) -> None:
    assert callable(program)
    outcome = launcher.run(program, 3)
    outcome.expect(0, 0, 0)
    for found in outcome.results:
        for weights, wanted in zip(found, outcome.results[0], strict=True):
            assert_same(weights, wanted)


def test_two_pipelines_the_same_numbers(launcher: Launcher) -> None:
    """The second starts from the same seed, and is not touched by the first."""
    first, second = launcher.run(two_in_turn, 2).results[0]
    assert_same(first, second)


def test_closed_is_closed(launcher: Launcher) -> None:
    outcome = launcher.run(use_closed, 2)
    outcome.expect(1, 1)
    assert "RuntimeError: this pipeline has ended" in outcome.err[0]


def test_errors_that_are_swallowed_end_all_the_same(launcher: Launcher) -> None:
    outcome = launcher.run(swallow, 3)
    outcome.expect(2, 2, 2)
    assert outcome.report.startswith("headrace: the loader gave no mini-batch")
    assert outcome.seconds_from_first_to_last() < 20
