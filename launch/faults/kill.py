"""SIGKILL to ranks: torchrun starts all of them again, from the newest checkpoint."""

import os
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress

from .fault import Fault
from .job import Job
from .processes import Worker
from .workload import Workload

__all__ = ["Kill", "KillReplica", "KillServer", "KillTwo"]

GONE = r"is gone: (its process|its connection)|the link to"
"""What the others say; while they start they may hear of it from torchrun alone."""


class Kill(Fault):
    """Kill a stage, of whichever replica."""

    name = "kill a stage"
    many = 1

    def strike(self, job: Job, ranks: Mapping[int, Worker]) -> str:
        victims = self.victims(job)
        self.whose = " and ".join(map(job.name, victims))
        since, start = job.place(), ranks[0].start
        for rank in victims:
            with suppress(ProcessLookupError):
                os.kill(ranks[rank].process, signal.SIGKILL)
        job.await_restart(start)
        if not self.moment.starting and len(victims) < len(ranks):
            job.expect(GONE, since)
        return "restarted"

    def victims(self, job: Job) -> Sequence[int]:
        """The ranks that die."""
        stages = [rank for pipeline in job.grid.pipelines for rank in pipeline]
        return sorted(self.draws.sample(stages, self.many))


class KillTwo(Kill):
    """Kill two at once."""

    name = "kill two stages"
    many = 2


class KillReplica(Kill):
    """Kill all stages of a replica, as when its machine is lost."""

    name = "kill a replica"

    @classmethod
    def suits(cls, workload: Workload) -> bool:
        return workload.replicas is not None

    def victims(self, job: Job) -> Sequence[int]:
        return self.draws.choice(job.grid.pipelines)


class KillServer(Kill):
    """Kill a parameter server."""

    name = "kill a server"

    @classmethod
    def suits(cls, workload: Workload) -> bool:
        return workload.has_servers

    def victims(self, job: Job) -> Sequence[int]:
        return [self.draws.choice(range(len(job.grid.names))[-job.grid.servers :])]
