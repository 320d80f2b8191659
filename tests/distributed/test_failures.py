"""A stage that is killed, stopped, or fails ends all ranks soon; the first line says which."""

import re
import signal
import socket
import time
from functools import partial
from pathlib import Path

import pytest

from .failing import (
    FLAG,
    NAP,
    Plan,
    at_rest,
    busy_then_dead,
    misfortune,
    two_pipelines,
    while_connecting,
)
from .ranks import TRANSPORTS, Job, Launcher, Outcome

pytestmark = pytest.mark.timeout(120)

STAGES = range(3)

MOMENTS = {
    "at the start": ("start", 0),
    "in the first micro-batch": ("forward", 0),
    "in steady training": ("forward", 50),
    "in a backward": ("backward", 50),
    "in an evaluation": ("evaluation", 0),
    "between calls": ("between", 0),
}


def name(stage: int) -> str:
    return f"stage {stage} of 3 (rank {stage})"


def expect_end(outcome: Outcome, stage: int, code: int, says: str, seconds: float = 20) -> None:
    """One rank ended with this code, the others with 1 soon after, and one line said why."""
    outcome.expect(*[code if rank == stage else 1 for rank in STAGES])
    assert re.match(f"headrace: {re.escape(name(stage))} {says}", outcome.report), f"{outcome}"
    assert outcome.seconds_from_first_to_last() < seconds, f"{outcome}"


@pytest.fixture(scope="module", params=TRANSPORTS)
def killed(request: pytest.FixtureRequest, launcher: Launcher) -> dict[str, Outcome]:
    cases = {
        f"{stage} {moment}": Plan("kill", stage, *MOMENTS[moment])
        for stage in STAGES
        for moment in MOMENTS
    }
    return launcher.run_many(misfortune, 3, cases, environment=TRANSPORTS[request.param])


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("stage", STAGES)
def test_killed(killed: dict[str, Outcome], stage: int, moment: str) -> None:
    outcome = killed[f"{stage} {moment}"]
    expect_end(outcome, stage, -signal.SIGKILL, "is gone")
    assert outcome.tracebacks == 0


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_killed_while_nobody_listens(launcher: Launcher, transport: str) -> None:
    """The others are in user code, in a long layer with full inboxes, or not yet connected."""
    plan = Plan("kill", 2, "forward")
    start = partial(launcher.start, environment=TRANSPORTS[transport])
    jobs = [
        start(at_rest, 3, plan),
        start(busy_then_dead, 3, plan, 0),
        start(busy_then_dead, 3, plan, 1),
        start(while_connecting, 3, Plan("kill", 2, count=0)),
        start(while_connecting, 3, Plan("kill", 2, count=3)),
    ]
    for job in jobs:
        expect_end(job.wait(), 2, -signal.SIGKILL, "is gone")


def test_ended_by_its_own_code(launcher: Launcher) -> None:
    """os._exit(0) in a layer: the rank's own code is 0, the others' is not."""
    outcome = launcher.run(misfortune, 3, Plan("vanish", 1, "forward", 50))
    expect_end(outcome, 1, 0, "is gone")


@pytest.mark.parametrize("moment", ["forward", "backward", "log", "loader"])
def test_exit_in_the_middle_of_a_call(launcher: Launcher, moment: str) -> None:
    """sys.exit() where the other ranks count on this one is no end for them."""
    outcome = launcher.run(misfortune, 3, Plan("exit", 0, moment, 7))
    expect_end(outcome, 0, 1, "ended in ")
    assert outcome.tracebacks == 0


RAISES = {
    "forward": r"layer '{layer}' \(Trap\), forward of micro-batch 50",
    "backward": "backward of micro-batch 50",
    "evaluation": r"layer '{layer}' \(Trap\), forward of micro-batch 0 without",
    "between": "the script, outside of the pipeline",
}


@pytest.fixture(scope="module")
def raised(launcher: Launcher) -> dict[str, Outcome]:
    cases = {
        f"{stage} {moment}": Plan("raise", stage, moment, 50)
        for stage in STAGES
        for moment in RAISES
    }
    return launcher.run_many(misfortune, 3, cases)


@pytest.mark.parametrize("moment", RAISES)
@pytest.mark.parametrize("stage", STAGES)
def test_raises(raised: dict[str, Outcome], stage: int, moment: str) -> None:
    outcome = raised[f"{stage} {moment}"]
    where = RAISES[moment].format(layer=3 * stage + 1)
    expect_end(outcome, stage, 1, f"failed: ArithmeticError in {where}.*: a fuse blew$")
    assert outcome.tracebacks == 1
    assert "ArithmeticError: a fuse blew" in outcome.err[stage], "it is said where it happened"


def test_raises_while_connecting(launcher: Launcher) -> None:
    jobs = [launcher.start(while_connecting, 3, Plan("raise", 1, count=k)) for k in (0, 3)]
    for job in jobs:
        outcome = job.wait()
        expect_end(outcome, 1, 1, "failed: ArithmeticError in building the pipeline: a fuse blew")
        assert outcome.tracebacks == 1


def await_end_of_others(job: Job, stage: int) -> tuple[Outcome, float]:
    """Wait for the ranks that are not stopped; gives the seconds since the stop as well."""
    job.wait_for(FLAG)
    start = (job.folder / FLAG).stat().st_mtime
    others = [rank for rank in STAGES if rank != stage]
    outcome = job.wait(30, others)
    return outcome, max(outcome.ended[rank] for rank in others) - start


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("moment", ["in steady training", "in an evaluation", "between calls"])
def test_stopped(launcher: Launcher, moment: str, transport: str) -> None:
    """After three seconds without a sign of life, counted from the last one heard."""
    plans = [Plan("stop", stage, *MOMENTS[moment], timeout=(6, 3)) for stage in STAGES]
    start = partial(launcher.start, environment=TRANSPORTS[transport])
    jobs = [start(misfortune, 3, plan) for plan in plans]
    for stage, job in enumerate(jobs):
        outcome, seconds = await_end_of_others(job, stage)
        expect_end(outcome, stage, -signal.SIGKILL, r"has been silent for \d s", seconds=99)
        assert 2 < seconds < 18


def test_stopped_before_the_first_update(launcher: Launcher) -> None:
    plans = [Plan("stop", stage, "start", timeout=(5, 60)) for stage in STAGES]
    jobs = [launcher.start(misfortune, 3, plan) for plan in plans]
    for stage, job in enumerate(jobs):
        outcome, seconds = await_end_of_others(job, stage)
        expect_end(outcome, stage, -signal.SIGKILL, r"has been silent for \d s", seconds=99)
        assert 4 < seconds < 19


def test_stopped_and_continued_too_late(launcher: Launcher) -> None:
    """A rank that comes back after the others have ended ends too, and adds nothing."""
    job = launcher.start(misfortune, 3, Plan("stop", 1, "forward", 50, timeout=(3, 2)))
    job.wait_for(FLAG)
    job.wait_for_end([0, 2])
    job.signal(signal.SIGCONT)
    expect_end(job.wait(10), 1, 1, r"has been silent for \d s")


@pytest.mark.parametrize("deed", ["exit", "sleep"])
def test_a_rank_that_does_not_build_the_next_pipeline(launcher: Launcher, deed: str) -> None:
    """It has ended, or is elsewhere: the others do not wait for longer than they would at first."""
    jobs = [
        launcher.start(two_pipelines, 3, Plan(deed, k, "between", timeout=(8, 60))) for k in STAGES
    ]
    for stage, job in enumerate(jobs):
        others = [rank for rank in STAGES if rank != stage]
        outcome = job.wait(45, others)
        assert [outcome.codes[rank] for rank in others] == [1, 1], f"{outcome}"
        assert re.match(
            rf"headrace: {re.escape(name(stage))} has not built this pipeline for \d+ s, and "
            r"stage \d of 3 \(rank \d\) has: every rank must make the same calls",
            outcome.report,
        ), f"{outcome}"
        assert min(outcome.ended[k] for k in others) - (job.folder / FLAG).stat().st_mtime > 4


def test_who_waits_for_another_to_build_the_next_pipeline_hears_a_signal(
    launcher: Launcher,
) -> None:
    job = launcher.start(two_pipelines, 2, Plan("sleep", 0, "between"))
    job.wait_for("again1")
    job.signal(signal.SIGTERM, [1])
    outcome = job.wait(30, [1])
    assert outcome.codes[1] == 128 + signal.SIGTERM, f"{outcome}"
    assert outcome.report == "headrace: stopped by SIGTERM"


SLOW = {
    "the loader, at first": Plan("nap", 0, "loader", 0, timeout=(2, 2)),
    "the loader, later": Plan("nap", 0, "loader", 9, timeout=(2, 2)),
    "a layer, at first": Plan("nap", 1, "forward", 0, timeout=(2, 2)),
    "a layer, later": Plan("nap", 0, "backward", 9, timeout=(2, 2)),
    "an evaluation": Plan("nap", 1, "evaluation", timeout=(2, 2)),
    "the script": Plan("nap", 1, "between", timeout=(2, 2)),
    "the log": Plan("nap", 0, "log", timeout=(2, 2)),
}


def test_slow_is_not_dead(launcher: Launcher) -> None:
    """Whoever is in user code for longer than the time-out is waited for."""
    jobs = {what: launcher.start(misfortune, 2, plan, 1) for what, plan in SLOW.items()}
    for what, job in jobs.items():
        outcome = job.wait()
        assert outcome.codes == [0, 0], f"{what} took {NAP} s:\n{outcome}"
        assert not outcome.reports, what
        assert Path(job.folder / FLAG).exists(), what


def test_slow_to_build_the_next_pipeline(launcher: Launcher) -> None:
    """Within what is allowed until the first update."""
    jobs = [
        launcher.start(two_pipelines, 3, Plan("nap", k, "between", timeout=(60, 2))) for k in STAGES
    ]
    for job in jobs:
        outcome = job.wait()
        outcome.expect(0, 0, 0)
        assert not outcome.reports


def test_the_store_is_gone(launcher: Launcher) -> None:
    """torchrun itself was killed, say: nobody can tell anybody anything, and all end."""
    jobs = [
        launcher.start(at_rest, 3, Plan("nothing")),
        launcher.start(misfortune, 3, Plan("nothing", 0, "forward", 50), 10_000),
    ]
    for job in jobs:
        job.wait_for(FLAG)
    for job in jobs:
        job.store = None
    start = time.time()
    for job in jobs:
        outcome = job.wait(30)
        outcome.expect(1, 1, 1)
        assert max(outcome.ended) - start < 20
        assert outcome.reports
        assert all("store is gone" in line for line in outcome.reports), f"{outcome}"


def test_the_store_does_not_answer(launcher: Launcher) -> None:
    """It is rank 0's, which stops: calls of the store do not return, as behind a cable cut."""
    plan = Plan("stop", 0, "forward", 50, timeout=(20, 3))
    job = launcher.start(misfortune, 3, plan, 10_000, agent=False)
    outcome, seconds = await_end_of_others(job, 0)
    outcome.expect(-signal.SIGKILL, 1, 1)
    assert 2 < seconds < 18
    for stage, line in zip((1, 2), sorted(outcome.reports), strict=True):
        where = rf"stage {stage} of 3 \(rank {stage}\), on {re.escape(socket.gethostname())}"
        assert re.fullmatch(
            rf"headrace: {where}: the job's store is gone: torchrun has ended at 127\.0\.0\.1:\d+, "
            r"or that machine is out of reach \(no answer for \d s\)",
            line,
        ), f"{outcome}"
