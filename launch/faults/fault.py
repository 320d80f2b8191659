"""What a fault is: something that is done to a job, and what is to be seen of it then."""

import random
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from .job import Job
from .processes import Worker
from .workload import Workload

__all__ = ["Fault", "Moment"]


@dataclass(frozen=True)
class Moment:
    """When.

    Args:
        after: so many mini-batches are in a checkpoint that the ranks of then have made.
        delay: seconds more.
        starting: count them from when the ranks are there, instead, while they start.
    """

    after: int
    delay: float
    starting: bool = False

    def __str__(self) -> str:
        after = "ranks' start" if self.starting else f"mini-batch {self.after}"
        return f"{self.delay:.2f} s after {after}"


class Fault(ABC):
    """One.

    Args:
        draws: its own random numbers.
        moment: when it comes.
    """

    name: ClassVar[str]
    while_starting: ClassVar[bool] = True
    """Whether it can come while ranks start."""
    opens: ClassVar[tuple[str, ...] | None] = None
    """Of a fault that a job begins with, which torchrun must not restart: options of that start."""

    def __init__(self, draws: random.Random, moment: Moment) -> None:
        self.draws, self.moment = draws, moment
        self.whose = ""

    @classmethod
    def suits(cls, workload: Workload) -> bool:
        """Whether it can come to such a job."""
        return True

    @property
    def when(self) -> str:
        """For a person to read."""
        return str(self.moment)

    def await_moment(self, job: Job) -> Mapping[int, Worker]:
        """The ranks that it comes to."""
        found = job.await_workers()
        if not self.moment.starting:
            job.await_progress(self.moment.after)
        time.sleep(self.moment.delay)
        return found

    @abstractmethod
    def strike(self, job: Job, ranks: Mapping[int, Worker]) -> str:
        """Do it, set `whose`, and see what the job does; it is at work when this returns.

        Returns:
            How it ended.

        Raises:
            LostError: not as it must.
        """
