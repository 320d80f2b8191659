"""SIGKILL to one stage or two: torchrun starts all of them again, from the newest checkpoint."""

import os
import signal
from collections.abc import Mapping
from contextlib import suppress

from .fault import Fault
from .job import Job
from .processes import Worker

__all__ = ["Kill", "KillTwo"]

GONE = r"is gone: (its process|its connection)|the link to"
"""What the others say; while they start they may hear of it from torchrun alone."""


class Kill(Fault):
    """Kill a stage."""

    name = "kill a stage"
    many = 1

    def strike(self, job: Job, ranks: Mapping[int, Worker]) -> str:
        victims = sorted(self.draws.sample(sorted(ranks), self.many))
        self.whose = f"stage {' and '.join(map(str, victims))}"
        since, start = job.place(), ranks[0].start
        for rank in victims:
            with suppress(ProcessLookupError):
                os.kill(ranks[rank].process, signal.SIGKILL)
        job.await_restart(start)
        if not self.moment.starting and len(victims) < len(ranks):
            job.expect(GONE, since)
        return "restarted"


class KillTwo(Kill):
    """Kill two at once."""

    name = "kill two stages"
    many = 2
