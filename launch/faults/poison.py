"""A NaN in the data, where nothing that is not finite is allowed; then where it is skipped."""

from collections.abc import Mapping

from .fault import Fault
from .job import Job, LostError
from .processes import Worker
from .workload import BATCH

__all__ = ["Poison"]


class Poison(Fault):
    """The job ends with the place; started again with on_nonfinite: skip it goes on."""

    name = "a NaN in a micro-batch"
    while_starting = False
    opens = ("--pipeline.on_nonfinite", "stop")

    @property
    def when(self) -> str:
        return "in the first epoch"

    def await_moment(self, job: Job) -> Mapping[int, Worker]:
        return {}

    def strike(self, job: Job, ranks: Mapping[int, Worker]) -> str:
        assert job.poisoned is not None
        number = job.poisoned // BATCH
        self.whose = f"stage 0, micro-batch {number}"
        code = job.await_end("end at a NaN")
        job.expect(f"stage 0 of {job.stages}, micro-batch {number}: .*not finite", 0)
        if code != 1 or "exitcode  : 1 " not in job.said():
            raise LostError(f"torchrun ended with {code}, not 1")
        job.check_checkpoints()
        job.start()
        job.await_workers()
        return "stopped there, then skipped"
