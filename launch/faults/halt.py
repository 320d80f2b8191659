"""SIGSTOP to a stage: for a moment, for too long, or for good."""

import os
import signal
import time
from collections.abc import Mapping

from .fault import Fault
from .job import Job, LostError
from .processes import Worker
from .workload import SILENCE

__all__ = ["Halt", "HaltForGood", "Pause"]

SILENT = r"has been silent for \d+ s|no stage has made progress for \d+ s"


class Pause(Fault):
    """Stop a stage for less than it would be given up after: nothing is to be seen of it."""

    name = "pause a stage"

    def strike(self, job: Job, ranks: Mapping[int, Worker]) -> str:
        rank = self.draws.choice(sorted(ranks))
        seconds = self.draws.uniform(0.05, SILENCE / 3)
        self.whose = f"stage {rank}, {seconds:.1f} s"
        since = job.place()
        os.kill(ranks[rank].process, signal.SIGSTOP)
        time.sleep(seconds)
        os.kill(ranks[rank].process, signal.SIGCONT)
        time.sleep(0.3)
        if job.reports(since) or (job.code is None and _starts(job) > ranks[0].start):
            raise LostError(f"it was not withstood: {job.reports(since) or 'a restart'}")
        return "went on"


def _starts(job: Job) -> int:
    return max((worker.start for worker in job.workers().values()), default=0)


class Halt(Fault):
    """Stop a stage until the others have given it up; it comes back when all is over."""

    name = "halt a stage"
    while_starting = False
    returns = True

    def strike(self, job: Job, ranks: Mapping[int, Worker]) -> str:
        rank = self.draws.choice(sorted(ranks))
        self.whose = f"stage {rank}"
        since = job.place()
        os.kill(ranks[rank].process, signal.SIGSTOP)
        job.wait(lambda: job.reports(since) or None, "report of a stage that is silent", 60)
        line = job.expect(SILENT, since)
        if "silent" in line and f"stage {rank} of" not in line:
            raise LostError(f"stage {rank} was stopped, and the report says {line!r}")
        if self.returns:
            time.sleep(1.0)
            os.kill(ranks[rank].process, signal.SIGCONT)
        job.await_restart(ranks[0].start)
        return "restarted"


class HaltForGood(Halt):
    """It does not come back: torchrun kills it after half a minute."""

    name = "halt a stage for good"
    returns = False
