"""SIGSTOP to a rank: for a moment, again and again, for too long, or for good."""

import os
import signal
import time
from collections.abc import Mapping

from .fault import Fault
from .job import Job, LostError
from .processes import Worker
from .workload import SILENCE

__all__ = ["Delay", "Halt", "HaltForGood", "Pause"]

SILENT = r"has been silent for \d+ s|no stage has made progress for \d+ s"


class Pause(Fault):
    """Stop a stage for less than it would be given up after: nothing is to be seen of it."""

    name = "pause a stage"

    def strike(self, job: Job, ranks: Mapping[int, Worker]) -> str:
        rank = self.draws.choice(sorted(ranks))
        since = job.place()
        what = self.hold(ranks[rank].process)
        self.whose = f"{job.name(rank)}, {what}"
        time.sleep(0.3)
        if job.reports(since) or (job.code is None and _starts(job) > ranks[0].start):
            raise LostError(f"it was not withstood: {job.reports(since) or 'a restart'}")
        return "went on"

    def hold(self, process: int) -> str:
        """Stop it and let it go; how, in words."""
        seconds = self.draws.uniform(0.05, SILENCE / 3)
        _stop(process, seconds)
        return f"{seconds:.1f} s"


class Delay(Pause):
    """Have a stage run now and then only, as on a machine that others use, too."""

    name = "delay a stage"

    def hold(self, process: int) -> str:
        share, rounds = self.draws.uniform(0.1, 0.5), 20
        for _ in range(rounds):
            length = self.draws.uniform(0.05, 0.25)
            _stop(process, (1 - share) * length)
            time.sleep(share * length)
        return f"{share:.0%} of its time, {rounds} times"


def _stop(process: int, seconds: float) -> None:
    os.kill(process, signal.SIGSTOP)
    try:
        time.sleep(seconds)
    finally:
        os.kill(process, signal.SIGCONT)


def _starts(job: Job) -> int:
    return max((worker.start for worker in job.workers().values()), default=0)


class Halt(Fault):
    """Stop a stage until the others have given it up; it comes back when all is over."""

    name = "halt a stage"
    while_starting = False
    returns = True

    def strike(self, job: Job, ranks: Mapping[int, Worker]) -> str:
        rank = self.draws.choice(sorted(ranks))
        self.whose = job.name(rank)
        since = job.place()
        os.kill(ranks[rank].process, signal.SIGSTOP)
        job.wait(lambda: job.reports(since) or None, "report of a stage that is silent", 60)
        line = job.expect(SILENT, since)
        if "silent" in line and job.grid.names[rank] not in line:
            raise LostError(f"{self.whose} was stopped, and the report says {line!r}")
        if self.returns:
            time.sleep(1.0)
            os.kill(ranks[rank].process, signal.SIGCONT)
        job.await_restart(ranks[0].start)
        return "restarted"


class HaltForGood(Halt):
    """It does not come back: torchrun kills it after half a minute."""

    name = "halt a stage for good"
    returns = False
