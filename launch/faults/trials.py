"""Play jobs with their faults, one after the other, and keep an account."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .disk import small_disk
from .job import Job, LostError
from .plan import Trial
from .verdict import check, final_weights
from .workload import WORKLOADS

__all__ = ["Row", "Trials"]

PACE = 0.001


@dataclass(frozen=True)
class Row:
    """What is said of one fault.

    Args:
        lost: what was not as it must be; nothing, if it was survived.
    """

    number: int
    job: int
    workload: str
    what: str
    when: str
    whose: str
    ended: str
    seconds: float
    lost: str = ""

    def numbers(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class Trials:
    """Jobs in a folder.

    Args:
        tell: is called with each fault that is over, and each job's verdict.
    """

    def __init__(self, folder: Path, stages: int, tell: Callable[[str], None]) -> None:
        self.folder, self.stages, self._tell = folder, stages, tell
        self.rows: list[Row] = []
        self.lost: list[str] = []
        self._undisturbed: dict[tuple[str, int | None], dict[str, Tensor]] = {}
        self._jobs = 0

    def undisturbed(self, trial: Trial) -> dict[str, Tensor] | None:
        """The weights of the same run, in one process if it is one pipeline, to which nothing
        happens; None where they are not the same each time.
        """
        if not WORKLOADS[trial.workload].repeats:
            return None
        key = (trial.workload, trial.poisoned)
        if key not in self._undisturbed:
            folder = self.folder / f"undisturbed-{trial.workload}"
            job = Job(folder, WORKLOADS[trial.workload], self.stages, 0.0, trial.poisoned)
            try:
                if job.grid.replicas == 1:
                    job.start_alone()
                else:
                    job.start(restarts=0)
                if code := job.await_end("end"):
                    raise LostError(f"the undisturbed run ended with {code}: {job.last_words()}")
                check(job, final_weights(job))
                self._undisturbed[key] = final_weights(job)
            finally:
                job.end()
        return self._undisturbed[key]

    def play(self, trial: Trial) -> None:
        """Run a job through its faults, and see what it comes to."""
        self._jobs += 1
        weights = self.undisturbed(trial)
        folder = self.folder / f"job-{self._jobs:03d}"
        first, begin = len(self.rows) + 1, time.monotonic()
        with ExitStack() as disk:
            if trial.workload == "full":
                disk.enter_context(small_disk(folder / "runs"))
            job = Job(folder, WORKLOADS[trial.workload], self.stages, PACE, trial.poisoned)
            try:
                for row in self._disturb(job, trial):
                    self.rows.append(row)
                    self._tell(_line(row))
                if not self.rows[-1].lost:
                    self._judge(job, weights, time.monotonic() - begin)
            except LostError as error:
                last = len(self.rows)
                self.lost.append(f"job {self._jobs} ({trial.workload}, faults {first} to {last})")
                self.lost[-1] += f": {error}"
                self._tell(f"    LOST  {self.lost[-1]}")
            finally:
                job.end()

    def _judge(self, job: Job, weights: dict[str, Tensor] | None, seconds: float) -> None:
        code = job.await_end("end of training")
        if code:
            raise LostError(f"it ended with {code}: {job.last_words()}")
        check(job, weights)
        how = "every update counted" if weights is None else "as undisturbed"
        self._tell(f"      job {self._jobs} came to its end: {how} ({seconds:.0f} s)")

    def _disturb(self, job: Job, trial: Trial) -> Iterator[Row]:
        opener = trial.faults[0].opens
        if opener is None:
            job.start()
        else:
            job.start(*opener, restarts=0)
        for fault in trial.faults:
            begin, lost, ended = time.monotonic(), "", "lost"
            try:
                ended = fault.strike(job, fault.await_moment(job))
            except (LostError, OSError, LookupError, ValueError) as error:
                lost = str(error) if isinstance(error, LostError) else repr(error)
                self.lost.append(f"fault {len(self.rows) + 1} ({fault.name}): {lost}")
            what, when, whose = fault.name, fault.when, fault.whose
            seconds = time.monotonic() - begin
            number = len(self.rows) + 1
            yield Row(number, self._jobs, trial.workload, what, when, whose, ended, seconds, lost)
            if lost:
                return


def _line(row: Row) -> str:
    line = f"{row.number:4}  {row.workload:<10}{row.what:<24}{row.when:<32}{row.whose:<44} "
    return f"{line}{row.ended}, {row.seconds:.1f} s" + (f": LOST: {row.lost}" if row.lost else "")
