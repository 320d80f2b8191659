"""A disk that is full when a checkpoint is to be written; and one that can be filled."""

import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from .fault import Fault
from .job import Job, LostError
from .processes import Worker

__all__ = ["Fill", "can_mount", "small_disk"]

MEGABYTES = 8


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """Have a small disk, in memory, at a folder.

    Raises:
        OSError: this is not allowed; only root may.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={MEGABYTES}m", "headrace-chaos", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"a small disk cannot be had: {done.stderr.strip()}")
    try:
        yield
    finally:
        # Lazily: the kernel may not be done yet with a process that was killed.
        subprocess.run(["umount", "-l", str(folder)], check=True)


def can_mount(folder: Path) -> str:
    """Nothing, or why there can be no small disk."""
    try:
        with small_disk(folder):
            return ""
    except OSError as error:
        return str(error)
    finally:
        folder.rmdir()


class Fill(Fault):
    """Fill the disk: the job ends and says why; it goes on when there is room again."""

    name = "fill the disk"
    while_starting = False
    opens = ()

    def strike(self, job: Job, ranks: Mapping[int, Worker]) -> str:
        self.whose = "the run's disk"
        since = job.place()
        ballast = job.folder / "runs" / "ballast"
        _fill(ballast)
        code = job.await_end("end on a full disk")
        line = job.expect("No space left on device", since)
        if code != 1:
            raise LostError(f"torchrun ended with {code}, not 1, after {line!r}")
        job.check_checkpoints()
        if not job.saved():
            raise LostError("no checkpoint is left")
        ballast.unlink()
        job.start()
        job.await_workers()
        what = "a checkpoint" if "checkpoint" in line else "the journal"
        return f"said so of {what}, started again"


def _fill(ballast: Path) -> None:
    number = os.open(ballast, os.O_CREAT | os.O_WRONLY)
    try:
        while True:
            os.write(number, bytes(4096))
    except OSError:
        pass
    finally:
        os.close(number)
