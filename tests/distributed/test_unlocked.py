"""Full unlock over processes: a stage that stops does not hold up those behind it, up to a bound;
and whatever happens to one still ends all.
"""

import re
import signal

import pytest

from .failing import Plan, misfortune_unlocked
from .ranks import TRANSPORTS, Launcher
from .unlocked import AHEAD, Stall, stall

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_those_behind_a_stage_that_stops_go_on(
    launcher: Launcher, stage: int, transport: str
) -> None:
    """They run as many micro-batches as may be on their way, and on as far as they must."""
    plan = Stall(stage, AHEAD, "synthetic", seconds=30)
    outcome = launcher.run(stall, 4, plan, environment=TRANSPORTS[transport])
    outcome.expect(0, 0, 0, 0)
    assert outcome.results[stage] is True


@pytest.mark.parametrize("stage", [0, 1])
def test_with_real_inputs_they_wait(launcher: Launcher, stage: int) -> None:
    outcome = launcher.run(stall, 4, Stall(stage, 1, "real", seconds=1.5))
    outcome.expect(0, 0, 0, 0)
    assert outcome.results[stage] is False


def test_the_bound_is_kept(launcher: Launcher) -> None:
    """Micro-batch STOP + AHEAD runs, and then its stage must learn from STOP, which is not here."""
    outcome = launcher.run(stall, 3, Stall(1, AHEAD + 2, "synthetic", seconds=1.5))
    outcome.expect(0, 0, 0)
    assert outcome.results[1] is False


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_killed(launcher: Launcher, stage: int) -> None:
    outcome = launcher.run(misfortune_unlocked, 3, Plan("kill", stage, "forward", 50))
    outcome.expect(*[-signal.SIGKILL if rank == stage else 1 for rank in range(3)])
    assert re.match(rf"headrace: stage {stage} of 3 \(rank {stage}\) is gone", outcome.report)


@pytest.mark.parametrize(("stage", "moment"), [(0, "loader"), (1, "backward"), (2, "evaluation")])
def test_failed(launcher: Launcher, stage: int, moment: str) -> None:
    outcome = launcher.run(misfortune_unlocked, 3, Plan("raise", stage, moment, 7))
    assert 0 not in outcome.codes
    if moment == "loader":
        assert "the loader raised ArithmeticError: a fuse blew" in outcome.report
    else:
        says = rf"headrace: stage {stage} of 3 \(rank {stage}\) failed: ArithmeticError"
        assert re.match(says, outcome.report)
