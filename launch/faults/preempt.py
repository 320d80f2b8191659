"""SIGTERM to torchrun, as from a cluster that wants its machines back."""

import os
import signal
from collections.abc import Mapping

from .fault import Fault
from .job import Job, LostError
from .processes import Worker
from .workload import Workload

__all__ = ["Preempt"]


class Preempt(Fault):
    """The job saves, where an undisturbed run does not, and ends; it is started again."""

    name = "SIGTERM to torchrun"

    @classmethod
    def suits(cls, workload: Workload) -> bool:
        return not workload.drains

    def strike(self, job: Job, ranks: Mapping[int, Worker]) -> str:
        self.whose = "all"
        since = job.place()
        os.kill(job.torchrun, signal.SIGTERM)
        job.await_end("end after SIGTERM", 60)
        if not self.moment.starting:
            self._check_saved(job, since)
        job.check_checkpoints()
        job.start()
        job.await_workers()
        return "saved, started again" if not self.moment.starting else "started again"

    def _check_saved(self, job: Job, since: int) -> None:
        line = job.expect(r"stopped by SIGTERM; .*step-\d+ goes on from here", since)
        path = line.partition("SIGTERM; ")[2].partition(" goes on")[0]
        newest = job.saved()[-1][1]
        if newest.name != path.rpartition("/")[2]:
            raise LostError(f"the newest checkpoint is {newest.name}, and the job said {line!r}")
        if found := [x for x in job.reports(since) if "stopped by SIGTERM" not in x]:
            raise LostError(f"there is more in the log: {found}")
