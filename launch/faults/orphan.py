"""SIGKILL to torchrun itself: its ranks must notice, and leave."""

import os
import signal
import time
from collections.abc import Mapping

from .fault import Fault
from .job import Job
from .processes import Worker

__all__ = ["Orphan"]


class Orphan(Fault):
    """Nobody is left within seconds; the job is started again. Ranks that are still importing find
    out only then.
    """

    name = "kill torchrun"

    def strike(self, job: Job, ranks: Mapping[int, Worker]) -> str:
        self.whose = "torchrun"
        seconds = self.bereave(job)
        self.meanwhile(job)
        since = job.place()
        job.start()
        job.await_workers()
        self.afterwards(job, since)
        return f"ranks gone in {seconds:.1f} s, started again"

    def bereave(self, job: Job) -> float:
        """Kill torchrun; in how many seconds all are gone."""
        since, begin = job.place(), time.monotonic()
        os.kill(job.torchrun, signal.SIGKILL)
        job.await_end("torchrun's end", gone=60.0 if self.moment.starting else 20.0)
        if not self.moment.starting:
            job.expect(r"the job's store is gone|is gone: (its process|its connection)", since)
        job.check_checkpoints()
        return time.monotonic() - begin

    def meanwhile(self, job: Job) -> None:
        """What else happens while the job is down."""

    def afterwards(self, job: Job, since: int) -> None:
        """What is to be seen once it is up again."""
