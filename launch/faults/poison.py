"""A NaN where nothing that is not finite is allowed; then where it is skipped."""

import re
from collections.abc import Mapping

from .fault import Fault
from .fragile import AT
from .job import Job, LostError
from .processes import Worker
from .workload import BATCH

__all__ = ["Poison", "PoisonGradient"]


class Poison(Fault):
    """In the data: the job ends and says where; with on_nonfinite: skip it goes on afterwards."""

    name = "a NaN in a micro-batch"
    while_starting = False
    opens = ("--pipeline.on_nonfinite", "stop")
    stage = 0
    says = "its input is not finite"

    @property
    def when(self) -> str:
        return "in the first epoch"

    def await_moment(self, job: Job) -> Mapping[int, Worker]:
        return {}

    def strike(self, job: Job, ranks: Mapping[int, Worker]) -> str:
        assert job.poisoned is not None
        number = job.poisoned // BATCH
        self.whose = f"stage {self.stage}, micro-batch {number}"
        code = job.await_end("end at a NaN")
        place = f"stage {self.stage} of {job.grid.stages}, micro-batch {number}"
        job.expect(f"{place}: {re.escape(self.says)}", 0)
        if code != 1 or "exitcode  : 1 " not in job.said():
            raise LostError(f"torchrun ended with {code}, not 1")
        job.check_checkpoints()
        job.start()
        job.await_workers()
        return "stopped there, then skipped"


class PoisonGradient(Poison):
    """Where all that goes forward is finite, a layer gives a NaN backward: it is named."""

    name = "a NaN in a gradient"
    stage = 1
    says = f"the gradient in layer '{AT}' (Fragile) is not finite"
