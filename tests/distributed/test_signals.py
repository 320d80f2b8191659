"""Ctrl-C and SIGTERM: all ranks end within five seconds, with one line, and files stay whole."""

import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from .failing import (
    FLAG,
    Plan,
    at_rest,
    journal,
    misfortune,
    steady_training,
    while_connecting,
    with_workers,
)
from .ranks import Job, Launcher, Outcome

pytestmark = pytest.mark.timeout(120)

NUMBERS = {"Ctrl-C": signal.SIGINT, "SIGTERM": signal.SIGTERM}

PLACES: dict[str, tuple[Callable[..., Any], Plan]] = {
    "in steady training": (steady_training, Plan("nothing", 0, "forward", 50)),
    "in the loader": (misfortune, Plan("sleep", 0, "loader", 7)),
    "in a layer": (misfortune, Plan("sleep", 1, "forward", 7)),
    "in a backward": (misfortune, Plan("sleep", 2, "backward", 7)),
    "in an evaluation": (misfortune, Plan("sleep", 1, "evaluation")),
    "between calls": (at_rest, Plan("nothing")),
    "at the start": (while_connecting, Plan("sleep", 1, count=1)),
}


def send(job: Job, number: signal.Signals, ranks: Sequence[int] = (0, 1, 2)) -> Outcome:
    """Send the signal when the time has come, and see that all ranks end as they should."""
    job.wait_for(FLAG)
    start = time.time()
    job.signal(number, ranks)
    return expect_end(job, number, start)


def expect_end(job: Job, number: signal.Signals, start: float) -> Outcome:
    outcome = job.wait(30)
    outcome.expect(*[128 + number] * len(job.pids))
    assert outcome.report == f"headrace: stopped by {number.name}"
    assert max(outcome.ended) - start < 20
    assert outcome.tracebacks == 0, f"{outcome}"
    return outcome


@pytest.mark.parametrize("number", NUMBERS.values(), ids=NUMBERS)
def test_to_all_ranks(launcher: Launcher, number: signal.Signals) -> None:
    jobs = {place: launcher.start(program, 3, plan) for place, (program, plan) in PLACES.items()}
    for job in jobs.values():
        job.wait_for(FLAG)
    start = time.time()
    for job in jobs.values():
        job.signal(number)
    for place, job in jobs.items():
        print(place)  # pytest shows it with a failure
        expect_end(job, number, start)


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("number", NUMBERS.values(), ids=NUMBERS)
def test_to_one_rank(launcher: Launcher, number: signal.Signals, rank: int) -> None:
    """As when a machine of several is taken away: the others follow."""
    steady = launcher.start(misfortune, 3, Plan("nothing", rank, "forward", 50))
    send(steady, number, [rank])
    send(launcher.start(at_rest, 3, Plan("nothing")), number, [rank])


@pytest.mark.parametrize("number", NUMBERS.values(), ids=NUMBERS)
def test_twice(launcher: Launcher, number: signal.Signals) -> None:
    """torchrun passes on what the terminal has sent already, a moment later."""
    for seconds in (0.0, 0.002, 0.02):
        job = launcher.start(misfortune, 3, Plan("nothing", 0, "forward", 50))
        job.wait_for(FLAG)
        start = time.time()
        job.signal(number)
        time.sleep(seconds)  # no ordering: both are to be withstood at any distance
        job.signal(number)
        expect_end(job, number, start)


@pytest.mark.parametrize("number", NUMBERS.values(), ids=NUMBERS)
def test_with_a_loader_that_has_workers(launcher: Launcher, number: signal.Signals) -> None:
    """The terminal sends Ctrl-C to the workers too: it is not theirs to report."""
    job = launcher.start(with_workers, 2, Plan("nothing", 1, "forward", 50))
    job.wait_for(FLAG)
    start = time.time()
    for pid in job.pids:
        os.killpg(pid, number)
    expect_end(job, number, start)


@pytest.mark.parametrize("number", NUMBERS.values(), ids=NUMBERS)
def test_files_stay_whole(launcher: Launcher, number: signal.Signals) -> None:
    job = launcher.start(journal, 2, Plan("nothing", 1, "forward", 150))
    send(job, number, [0, 1])
    lines = (job.folder / "journal").read_text().splitlines(keepends=True)
    assert len(lines) > 100
    assert all(line.endswith("\n") and "loss" in json.loads(line) for line in lines)


def test_files_stay_whole_when_another_stage_dies(launcher: Launcher) -> None:
    job = launcher.start(journal, 2, Plan("kill", 1, "forward", 150))
    job.wait().expect(1, -signal.SIGKILL)
    lines = (job.folder / "journal").read_text().splitlines(keepends=True)
    assert len(lines) > 100
    assert all(line.endswith("\n") and "loss" in json.loads(line) for line in lines)
