"""A training job under the real torchrun, watched from outside: by its files and its processes."""

import os
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from headrace.pipeline.checkpoints import Checkpoint, CheckpointError

from ..strict_yaml import dump
from .processes import MARK, Worker, end_all, living, workers
from .workload import Workload

__all__ = ["PATIENCE", "Job", "LostError"]

PATIENCE = 120.0
"""Seconds within which a job must come as far as is waited for."""

Found = TypeVar("Found")


class LostError(Exception):
    """A job did not do what it must after a fault; the message says what."""


class Job:
    """One run, started as often as need be.

    Args:
        folder: of its own, in which the run is in runs/job.
        stages: of a pipeline; where there are replicas they have their own number.
        poisoned: an item of the data that a NaN comes of.
    """

    def __init__(
        self,
        folder: Path,
        workload: Workload,
        stages: int,
        pace: float = 0.0,
        poisoned: int | None = None,
    ) -> None:
        self.folder, self.workload, self.grid = folder, workload, workload.grid(stages)
        self.poisoned = poisoned
        self.word = uuid.uuid4().hex
        self.log = folder / "log"
        self.checkpoints = folder / "runs" / "job" / "checkpoints"
        self.run = self.checkpoints.parent
        self._torchrun: subprocess.Popen[bytes] | None = None
        self._ranks: set[int] = set()
        self._began = 0.0
        for each in (folder, folder / "tmp", folder / "runs"):
            each.mkdir(parents=True, exist_ok=True)
        config = workload.config(stages, pace, poisoned)
        (folder / "job.yaml").write_text(dump(config), encoding="utf-8")

    # Its processes -----------------------------------------------------------------------------

    def start(self, *options: str, restarts: int = 20) -> None:
        """Start torchrun; what was there before is gone on with."""
        torchrun = ["torch.distributed.run", "--standalone", f"--max-restarts={restarts}"]
        torchrun += ["--nproc-per-node", str(len(self.grid.names)), "-m"]
        self._start([*torchrun, "headrace.launch.train"], "--checkpoint.resume", "auto", *options)

    def start_alone(self, *options: str) -> None:
        """Start one process, in which all stages are."""
        self._start(["headrace.launch.train"], *options)

    def _start(self, module: list[str], *options: str) -> None:
        own = {MARK: self.word, "TMPDIR": str(self.folder / "tmp"), "CUDA_VISIBLE_DEVICES": ""}
        own |= {"OMP_NUM_THREADS": "1", "RES_OPTIONS": "timeout:1 attempts:1"}
        command = [sys.executable, "-m", *module, "--config", "job.yaml", *options]
        with self.log.open("ab") as log:
            self._torchrun = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env={**os.environ, **own},
                start_new_session=True,
            )

    @property
    def torchrun(self) -> int:
        """Its process."""
        assert self._torchrun is not None
        return self._torchrun.pid

    @property
    def code(self) -> int | None:
        """What torchrun ended with, if it has."""
        assert self._torchrun is not None
        return self._torchrun.poll()

    def workers(self) -> dict[int, Worker]:
        """The ranks that are there now."""
        return workers(self.word, self.torchrun)

    def await_workers(self, start: int = 0) -> dict[int, Worker]:
        """All ranks of the n-th start, or of a later one."""

        def look() -> dict[int, Worker] | None:
            found = self.workers()
            whole = len(found) == len(self.grid.names)
            return found if whole and min(w.start for w in found.values()) >= start else None

        found = self.wait(look, f"ranks of start {start}")
        if (now := {worker.process for worker in found.values()}) != self._ranks:
            self._ranks, self._began = now, time.time()
        return found

    def await_restart(self, start: int) -> None:
        """All ranks of the start after this one.

        Raises:
            LostError: torchrun had to start them more than once.
        """
        if (now := self.await_workers(start + 1)[0].start) != start + 1:
            raise LostError(f"the ranks were started {now - start} times, not once")

    def await_end(self, what: str, seconds: float = PATIENCE, gone: float = 20.0) -> int:
        """Torchrun's exit code, once it and, soon after, all that it started are gone."""
        code = self.wait(lambda: None if self.code is None else (self.code,), what, seconds)[0]
        self.await_nobody(gone)
        return code

    def await_nobody(self, seconds: float) -> None:
        """See that no process of the job is left, soon."""
        end = time.monotonic() + seconds
        while left := [process for process, _ in living(self.word)]:
            if time.monotonic() > end:
                raise LostError(f"processes {left} are left, {seconds:.0f} s after torchrun's end")
            time.sleep(0.02)

    def end(self) -> None:
        """Whatever is going on."""
        end_all(self.word)
        if self._torchrun is not None:
            self._torchrun.wait()

    def name(self, rank: int) -> str:
        """What to call a rank in an account."""
        return re.sub(r" of \d+| \(.*", "", self.grid.names[rank])

    # What is seen of it ------------------------------------------------------------------------

    def wait(self, look: Callable[[], Found | None], what: str, seconds: float = PATIENCE) -> Found:
        """Look until there is something to be seen.

        Raises:
            LostError: there is not, or the job has ended meanwhile.
        """
        end = time.monotonic() + seconds
        while True:
            ended = self.code is not None
            if (found := look()) is not None:
                return found
            if ended or time.monotonic() > end:
                how = f"the job ended with {self.code}" if ended else f"it took {seconds:.0f} s"
                raise LostError(f"{how}, and there was no {what}; it had said {self.last_words()}")
            time.sleep(0.01)

    def said(self, since: int = 0) -> str:
        """What all processes have printed, from a place of the log on."""
        with self.log.open("rb") as log:
            log.seek(since)
            return log.read().decode(errors="replace")

    def place(self) -> int:
        """The end of the log."""
        return self.log.stat().st_size if self.log.exists() else 0

    def reports(self, since: int = 0) -> list[str]:
        """The lines that Headrace printed of what is wrong."""
        return [x for x in self.said(since).splitlines() if x.startswith("headrace: ")]

    def last_words(self) -> str:
        """For a message: its last report, or line."""
        lines = self.reports() or self.said().splitlines()
        return repr(lines[-1]) if lines else "nothing"

    def expect(self, pattern: str, since: int) -> str:
        """The report that matches.

        Raises:
            LostError: none does.
        """
        found = self.reports(since)
        for line in found:
            if re.search(pattern, line):
                return line
        raise LostError(f"no report matches {pattern!r}: there is {found or 'none'}")

    def saved(self) -> list[tuple[int, Path]]:
        """Mini-batches and folder of each checkpoint, the oldest first."""
        found = [file.parent for file in self.checkpoints.glob("step-*/checkpoint.json")]
        whole = [path for path in found if path.name[5:].isdigit()]  # and not .replaced
        return sorted((int(path.name[5:]) // self.workload.cuts, path) for path in whole)

    def await_progress(self, mini_batches: int) -> None:
        """Until the ranks that are there now have made a checkpoint of so many, or more."""

        def look() -> bool | None:
            own = [number for number, path in self.saved() if _written(path) > self._began]
            return max(own, default=0) >= mini_batches or None

        self.wait(look, f"checkpoint after mini-batch {mini_batches}")

    def check_checkpoints(self) -> None:
        """See that all that have a manifest are whole.

        Raises:
            LostError: one is not.
        """
        for _, path in self.saved():
            try:
                fault: Any = Checkpoint.open(path).fault()
            except CheckpointError as error:
                fault = str(error)
            if fault:
                raise LostError(f"a checkpoint is not whole: {fault}")


def _written(checkpoint: Path) -> float:
    with suppress(OSError):  # it is being removed
        return (checkpoint / "checkpoint.json").stat().st_mtime
    return 0.0
