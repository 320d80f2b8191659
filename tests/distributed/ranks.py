"""Start a job's ranks on this machine, and see how each ends: quickly, or by the real torchrun."""

import json
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

__all__ = ["TRANSPORTS", "Job", "Launcher", "Outcome", "complaints", "free_port", "torchrun"]

Program = Callable[..., Any]
"""Runs on every rank, in the job's folder; a function of a module, named to the ranks."""

AT_ONCE = 5

TRANSPORTS: dict[str, dict[str, str]] = {"one host": {}, "hosts apart": {"APART": "1"}}
"""Environments in which ranks of this machine are, or are not, aware that they share it."""

ROOT = Path(__file__).parents[2]

NAMELESS = re.compile(
    r"^.*\[c10d\] The hostname of the client socket cannot be retrieved\. err=.*\n", re.MULTILINE
)
"""What torch's store says where the name server does not answer: of the machine, not of us."""


@dataclass(frozen=True)
class Outcome:
    """How each rank ended, and what it said.

    Args:
        codes: exit codes; a signal's number, negative, where it was killed.
        ended: by `time.time()`.
        results: what the program returned; None where it did not return.
    """

    codes: list[int]
    out: list[str]
    err: list[str]
    ended: list[float]
    results: list[Any]

    @property
    def reports(self) -> list[str]:
        """The lines that Headrace printed, over all ranks."""
        lines = "\n".join(self.err + self.out).splitlines()
        return [line for line in lines if line.startswith("headrace: ")]

    @property
    def report(self) -> str:
        """The one line that Headrace printed."""
        assert len(self.reports) == 1, f"{len(self.reports)} lines instead of one:\n{self}"
        return self.reports[0]

    @property
    def tracebacks(self) -> int:
        """How many tracebacks were printed."""
        return sum(text.count("Traceback (most recent call last)") for text in self.err)

    def expect(self, *codes: int) -> None:
        """Fail, with all that was said, unless these are the exit codes."""
        assert self.codes == list(codes), f"expected exit codes {list(codes)}\n{self}"

    def seconds_from_first_to_last(self) -> float:
        """How long the survivors outlived the first rank that ended."""
        return max(self.ended) - min(self.ended)

    def __str__(self) -> str:
        parts = [f"exit codes {self.codes}"]
        for rank, (out, err) in enumerate(zip(self.out, self.err, strict=True)):
            parts += [
                f"--- rank {rank} said",
                out[-4000:],
                f"--- rank {rank} complained",
                err[-4000:],
            ]
        return "\n".join(parts)


@dataclass
class Job:
    """Ranks at work in a folder.

    Args:
        deaths: filled by the launcher: of each process that ended, its exit code and the time.
    """

    folder: Path
    pids: list[int]
    deaths: dict[int, tuple[int, float]]
    changed: threading.Condition
    store: TCPStore | None = None
    """Hosted here, as torchrun's agent does, for as long as the job lasts."""

    @property
    def has_ended(self) -> bool:
        """Whether all ranks have."""
        return all(pid in self.deaths for pid in self.pids)

    def signal(self, number: signal.Signals, ranks: Iterable[int] | None = None) -> None:
        """Send a signal to some ranks, or to all that are left."""
        for rank in range(len(self.pids)) if ranks is None else ranks:
            if self.pids[rank] not in self.deaths:
                os.kill(self.pids[rank], number)

    def wait_for(self, flag: str, seconds: float = 30.0) -> None:
        """Wait until a rank has made this file in the job's folder."""
        end = time.monotonic() + seconds
        while not (self.folder / flag).exists():
            if time.monotonic() > end or self.has_ended:
                raise AssertionError(f"no rank made {flag!r}:\n{self.wait(0.0)}")
            time.sleep(0.005)

    def wait(self, seconds: float = 60.0, ranks: Iterable[int] | None = None) -> Outcome:
        """Wait until ranks have ended; those that have not by then are killed, which is a failure.

        Args:
            ranks: which to wait for; None for all. The others are killed without ado.
        """
        outcome, in_time = self.end(seconds, ranks)
        assert in_time, f"not all ranks ended within {seconds} s:\n{outcome}"
        return outcome

    def end(self, seconds: float, ranks: Iterable[int] | None = None) -> tuple[Outcome, bool]:
        """Do as `wait` does, but tell whether the ranks ended in time."""
        awaited = [self.pids[r] for r in (range(len(self.pids)) if ranks is None else ranks)]
        with self.changed:
            ok = self.changed.wait_for(lambda: all(p in self.deaths for p in awaited), seconds)
        self.kill()
        self.store = None
        return self._outcome(), ok

    def wait_for_end(self, ranks: Iterable[int], seconds: float = 30.0) -> None:
        """Wait until these ranks have ended, and leave the others alone."""
        pids = [self.pids[rank] for rank in ranks]
        with self.changed:
            assert self.changed.wait_for(lambda: all(p in self.deaths for p in pids), seconds)

    def kill(self) -> None:
        """Kill the ranks that are left, and what they started."""
        for pid in self.pids:
            if pid not in self.deaths:  # a number that is free may be somebody else's by now
                with suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
        with self.changed:
            self.changed.wait_for(lambda: all(p in self.deaths for p in self.pids), 10)

    def _outcome(self) -> Outcome:
        ranks = range(len(self.pids))
        files = [self.folder / f"result{rank}" for rank in ranks]
        return Outcome(
            codes=[self.deaths[pid][0] for pid in self.pids],
            out=[(self.folder / f"out{rank}").read_text() for rank in ranks],
            err=[complaints((self.folder / f"err{rank}").read_text()) for rank in ranks],
            ended=[self.deaths[pid][1] for pid in self.pids],
            results=[torch.load(f, weights_only=False) if f.exists() else None for f in files],
        )


@dataclass
class Launcher:
    """Has ranks forked from a server that has imported what they need: milliseconds, not seconds.

    The server is a process of its own, so that a rank inherits no thread and no socket from the
    tests; a rank ends as a script does, by way of `sys.excepthook` and `atexit`.
    """

    folder: Path
    _jobs: list[Job] = field(default_factory=list)
    _started: int | None = None
    _count: int = 0
    _deaths: dict[int, tuple[int, float]] = field(default_factory=dict)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def __post_init__(self) -> None:
        os.environ.update(_surroundings())  # the stores are hosted here
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for pytest; the server ends with its input
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)} | _surroundings(),
        )
        threading.Thread(target=self._listen, daemon=True).start()

    def start(
        self,
        program: Program,
        ranks: int,
        *args: Any,
        agent: bool = True,
        environment: dict[str, str] | None = None,
    ) -> Job:
        """Start a program on so many ranks.

        Args:
            args: picklable.
            agent: the store is hosted outside of the ranks, as torchrun does; else by rank 0.
        """
        self._count += 1
        folder = self.folder / f"job{self._count}"
        folder.mkdir()
        (folder / "arguments").write_bytes(pickle.dumps(args))
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        common = {
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port if agent else free_port()),
            "TORCHELASTIC_USE_AGENT_STORE": str(agent),
            **(environment or {}),
        }
        pids = []
        for rank in range(ranks):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            pids.append(
                self._fork(f"{program.__module__}:{program.__name__}", folder, common | own)
            )
        self._jobs.append(Job(folder, pids, self._deaths, self._changed, store))
        return self._jobs[-1]

    def run(
        self, program: Program, ranks: int, *args: Any, seconds: float = 60.0, **how: Any
    ) -> Outcome:
        """Start a program and wait for its end."""
        return self.start(program, ranks, *args, **how).wait(seconds)

    def run_many(
        self,
        program: Program,
        ranks: int,
        arguments: Mapping[str, Any],
        seconds: float = 60.0,
        **how: Any,
    ) -> dict[str, Outcome]:
        """Run a program once for each argument, a few jobs at a time, for they wait a lot.

        Ranks that take longer are killed; their exit codes tell.
        """
        outcomes = {}
        for names in batched(arguments, AT_ONCE):
            jobs = {name: self.start(program, ranks, arguments[name], **how) for name in names}
            outcomes.update({name: job.end(seconds)[0] for name, job in jobs.items()})
        return outcomes

    def end_jobs(self) -> None:
        """Kill what is left of the jobs so far."""
        for job in self._jobs:
            if not job.has_ended:
                job.kill()
        self._jobs.clear()

    def close(self) -> None:
        """End the server, which kills what is left of its own."""
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(timeout=30)

    def _fork(self, program: str, folder: Path, environment: dict[str, str]) -> int:
        assert self._server.stdin is not None
        request = {"program": program, "folder": str(folder), "environment": environment}
        with self._changed:
            self._started = None
            self._server.stdin.write(json.dumps(request) + "\n")
            self._server.stdin.flush()
            self._changed.wait_for(lambda: self._started is not None, 60)
            assert self._started is not None, "the server does not fork"
            return self._started

    def _listen(self) -> None:
        assert self._server.stdout is not None
        for line in self._server.stdout:
            pid, code, when = json.loads(line)
            with self._changed:
                if code is None:
                    self._started = pid
                    self._deaths.pop(pid, None)  # the system gives numbers out again
                else:
                    self._deaths[pid] = (code, when)
                self._changed.notify_all()


def torchrun(
    folder: Path,
    program: Program,
    ranks: int,
    *args: Any,
    options: Sequence[str] = ("--standalone",),
) -> "subprocess.Popen[str]":
    """Start a program by the real torchrun, which takes seconds; the caller waits for it."""
    (folder / "arguments").write_bytes(pickle.dumps(args))
    name = f"{program.__module__}:{program.__name__}"
    command = [sys.executable, "-m", "torch.distributed.run", *options]
    command += ["--nproc-per-node", str(ranks), "-m", "tests.distributed.play", name]
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)} | _surroundings(),
    )


def complaints(stderr: str) -> str:
    """What a process wrote there, without torch's own line on a name it could not look up."""
    return NAMELESS.sub("", stderr)


def batched(names: Iterable[str], size: int) -> Iterator[list[str]]:
    left = iter(names)
    while batch := list(islice(left, size)):
        yield batch


def free_port() -> int:
    """A port of the loopback that nobody holds at the moment."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _surroundings() -> dict[str, str]:
    # torch's store looks up the name of every address it connects to; glibc gives a name server
    # that does not answer five seconds each time, unless told otherwise.
    linux = {"GLOO_SOCKET_IFNAME": "lo", "RES_OPTIONS": "timeout:1 attempts:1"}
    return {"OMP_NUM_THREADS": "1", **(linux if sys.platform == "linux" else {})}
