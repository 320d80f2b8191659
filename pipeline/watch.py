"""End all ranks when one is in trouble: nothing hangs, and the first error is said once, first.

Every rank beats in torchrun's store and reads the others' beats there. Whoever fails, or finds a
neighbour gone or a rank silent, tries to set one key; the one that succeeds prints the report,
and all the others, seeing the key, end without a word.
"""

import atexit
import json
import math
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from .bell import Bell
from .errors import InputError, NonFiniteError, first_line, told
from .layers import layer_at_fault

__all__ = ["Failure", "Pulse", "Watch", "is_reported"]

GRACE = 3.0
"""Seconds between a failure and the end of a rank whose main thread does not see it."""

CLOSED = -1
"""In a rank's last beat: it has closed its pipeline, and may be silent."""

EVIDENCE = 1.0
"""Seconds a SIGTERM waits for news of a failure: torchrun sends it to the survivors of a crash."""


@dataclass(frozen=True)
class Failure:
    """Why the job ends, and the exit code of its workers."""

    message: str
    code: int


@dataclass(frozen=True)
class Pulse:
    """What a rank tells of itself with every beat.

    Args:
        progress: grows with every message taken.
        waiting: it waits for a neighbour, and is not in user code.
    """

    progress: int
    waiting: bool
    trained: bool
    doing: str


class Watch:
    """This rank's look-out.

    Args:
        store: torchrun's; a client of our own is made of it.
        job: distinguishes the pipelines of one job.
        names: what to call each rank.
        timeout: seconds of silence that are allowed, until the first update and after it.
        pulse: asked for this rank's state at every beat.
    """

    def __init__(
        self,
        store: Store,
        job: str,
        rank: int,
        names: list[str],
        timeout: tuple[float, float],
        pulse: Callable[[], Pulse],
    ) -> None:
        self.bell = Bell()
        self.failure: Failure | None = None
        mine = store.clone()  # type: ignore[attr-defined]
        self._store = PrefixStore(f"headrace/{job}", mine)
        self._rank, self._timeout, self._pulse = rank, timeout, pulse
        self.names = names
        self._beats = [f"beat/{each}" for each in range(len(names))]
        self._interval = min(0.5, min(timeout) / 5)
        self._lock = threading.RLock()
        self._closed = threading.Event()
        self._failed_at = 0.0
        self._count = 0
        self._stopping = False
        self.saves, self.stop_requested = False, False
        self._process, self._sees = os.getpid(), _processes()
        self._handlers: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._handlers[number] = signal.signal(number, self._on_signal)
        self._excepthook = sys.excepthook
        sys.excepthook = self._on_uncaught
        self._tell(0)  # before anything can block: who is gone by then can be missed
        self._thread = threading.Thread(target=self._beat, name="headrace-watch", daemon=True)
        self._thread.start()
        threading.Thread(target=self._guard, name="headrace-guard", daemon=True).start()
        atexit.register(self.end_process_if_failed)

    @property
    def patience(self) -> float:
        """Seconds of silence that are allowed until the first update."""
        return self._timeout[0]

    @property
    def silence(self) -> float:
        """Seconds of silence that are allowed after it."""
        return self._timeout[1]

    saves: bool
    """Whether a SIGTERM is to end training with a checkpoint, which `stop_requested` asks for."""

    # For the main thread -----------------------------------------------------------------------

    def idle(self, file: int | None = None, patient: bool = True) -> None:
        """Sleep until the bell rings or a file can be read, a moment at most, and end this rank if
        the job has failed.

        Args:
            patient: nothing else is to be done soon.
        """
        self.bell.wait(0.1 if patient else 0.001, file)
        self.check()

    def check(self) -> None:
        """End this rank if the job has failed.

        Raises:
            SystemExit: with the failure's code.
        """
        if self.failure is not None:
            raise SystemExit(self.failure.code)

    def await_all(self) -> None:
        """Wait until every rank watches: here a signal is heard, in the backend's waiting none is.

        Raises:
            SystemExit: one does not come, or fails.
        """
        while not self._store.check(self._beats):
            self.bell.wait(0.01)
            self.check()

    def share(self, key: str, text: str) -> None:
        """Tell all ranks something."""
        self._store.set(key, text)

    def forget(self, key: str) -> None:
        """Take back what was told with `share`, once all have learned it."""
        self._store.delete_key(key)

    def learn(self, key: str, seconds: float = math.inf) -> str:
        """Wait for what another rank tells with `share`.

        Raises:
            TimeoutError: it does not within so many seconds.
        """
        end = time.monotonic() + seconds
        while (text := self.peek(key)) is None:
            self.bell.wait(0.01)
            self.check()
            if time.monotonic() > end:
                raise TimeoutError(key)
        return text

    def peek(self, key: str) -> str | None:
        """What a rank told with `share`, if it has; for any thread."""
        return bytes(self._store.get(key)).decode() if self._store.check([key]) else None

    def fail_by(self, error: BaseException, doing: str) -> None:
        """Report an exception of this rank; once, though it passes several places on its way."""
        if isinstance(error, SystemExit | KeyboardInterrupt) or is_reported(error):
            return
        error.headrace_reported = True  # type: ignore[attr-defined]
        if isinstance(error, dist.DistNetworkError):  # the store's, in the midst of a call
            self._mourn(error)
            return
        name = self.names[self._rank]
        if isinstance(error, InputError):
            if "killed by signal" in str(error.__cause__):
                self._await_same_signal()
            whose = self.names[self._rank]  # of several replicas, each has a loader
            line = f"{whose}: {told(error)}" if whose.startswith("replica") else told(error)
            self.fail(line, code=2)
            return
        if isinstance(error, NonFiniteError):
            self.fail(told(error), code=1)
            return
        where = ", ".join(filter(None, [layer_at_fault(error), doing]))
        text = f"{name} failed: {type(error).__name__} in {where}: {first_line(error)}"
        self.fail(text, code=1, details="".join(traceback.format_exception(error)))

    def _await_same_signal(self) -> None:
        """A DataLoader tells of workers that were killed: what killed them may be for us, too."""
        end = time.monotonic() + EVIDENCE
        while self.failure is None and time.monotonic() < end:
            time.sleep(0.02)  # our own handler, if it is called, raises from here
        self.check()

    def end_by(self, error: BaseException, doing: str) -> None:
        """Report that the user's code ended this rank in the middle of a call."""
        self.fail(f"{self.names[self._rank]} ended in {doing}, by {error!r}", code=1)

    def refuse(self, error: Exception) -> None:
        """Report an argument that cannot work: one line, and exit code 2."""
        error.headrace_reported = True  # type: ignore[attr-defined]
        self.fail(told(error), code=2)

    def stop(self, number: int) -> None:
        """End the job by a signal that was sent to this rank.

        Raises:
            SystemExit: with 128 and its number, as a shell has it.
        """
        self.fail(f"stopped by {signal.Signals(number).name}", code=128 + number)
        self.check()

    def close(self) -> None:
        """Stop watching, and give back the signal handlers."""
        self._closed.set()
        self._thread.join(timeout=10)
        with suppress(dist.DistError):
            self._store.set(
                f"beat/{self._rank}", json.dumps([CLOSED, 0, True, "closed", "", 0, ""])
            )
        atexit.unregister(self.end_process_if_failed)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if sys.excepthook == self._on_uncaught:
            sys.excepthook = self._excepthook

    # For any thread ----------------------------------------------------------------------------

    def fail(self, message: str, code: int, details: str = "") -> None:
        """End the job: print the message if no rank was quicker, and have all ranks end."""
        with self._lock:
            if self.failure is not None:
                return
            mine = json.dumps([self._rank, message, code])
            try:
                first = bytes(self._store.compare_set("failure", "", mine)).decode()
            except dist.DistError:
                first = mine  # the store is gone: then everybody says what they know
            if first == mine:
                print(f"headrace: {message}", file=sys.stderr)
                if details:
                    print(details, file=sys.stderr, end="")
                sys.stderr.flush()
                with suppress(dist.DistError):
                    self._store.set("said", "")
            else:
                self._await_said()
                _, message, code = json.loads(first)
            self._let_all_hear()
            self._note(Failure(message, code))

    def lost(self, rank: int, error: Exception) -> None:
        """The link to a neighbour broke: backends raise RuntimeErrors; others are our own."""
        if not isinstance(error, RuntimeError):
            self.fail_by(error, f"the link to {self.names[rank]}")
        elif not self._closed.is_set():
            try:
                self._store.check(["failure"])
            except dist.DistError as error:
                self._mourn(error)
            self.fail(f"{self.names[rank]} is gone: its connection was closed", code=1)

    def _note(self, failure: Failure) -> None:
        self._failed_at = time.monotonic()
        self.failure = failure
        self.bell.ring()

    def _await_said(self) -> None:
        """torchrun ends the job as soon as one rank ends: let the report be printed first."""
        end = time.monotonic() + GRACE
        with suppress(dist.DistError):
            while time.monotonic() < end and not self._store.check(["said"]):
                time.sleep(0.01)

    def _let_all_hear(self) -> None:
        """The first host's torchrun takes the store with it, as soon as a rank there ends: those on
        other hosts look for what has failed once every interval.
        """
        if os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE"):
            time.sleep(1.5 * self._interval)

    # Beats -------------------------------------------------------------------------------------

    def _beat(self) -> None:
        seen = _Seen(self._rank, len(self.names))
        count = 0
        while not self._closed.is_set():
            count += 1
            try:
                pulse = self._tell(count)
                if self.saves and not self.stop_requested and self._store.check(["stop"]):
                    self.stop_requested = True
                if self._store.check(["failure"]):
                    self._heed()
                else:
                    beats, limit = self._read_beats(), self._timeout[pulse.trained]
                    trouble = seen.trouble(beats, limit, self.names) or self._find_dead(beats)
                    if trouble:
                        self.fail(trouble, code=1)
            except dist.DistError as error:
                self._mourn(error)
            self._closed.wait(self._interval)

    def _guard(self) -> None:
        """Watch the beats: of a cable that is cut nobody is told, and the store's calls do not
        return until the system gives the connection up, after a quarter of an hour.

        Time is counted in naps, so that a process that was stopped has not been waiting.
        """
        count, silent = -1, 0.0
        while not self._closed.wait(self._interval):
            silent = silent + self._interval if count == self._count else 0.0
            count = self._count
            if self.failure is None and silent > self._timeout[self._pulse().trained]:
                self._grieve(f"no answer for {silent:.0f} s")
            if self.failure and time.monotonic() - self._failed_at > GRACE:
                _end(self.failure.code)

    def _tell(self, count: int) -> Pulse:
        self._count = count
        pulse = self._pulse()
        where = [socket.gethostname(), self._process, self._sees]
        beat = [count, pulse.progress, pulse.waiting, pulse.doing, *where]
        self._store.set(f"beat/{self._rank}", json.dumps(beat))
        return pulse

    def _read_beats(self) -> "list[_Beat | None]":
        """Each rank's latest; None of one that has not built this pipeline."""
        keys = self._beats
        if not self._store.check(keys):
            keys = [key for key in keys if self._store.check([key])]
        found = dict(zip(keys, self._store.multi_get(keys), strict=True))
        return [json.loads(bytes(found[k])) if k in found else None for k in self._beats]

    def _find_dead(self, beats: "list[_Beat | None]") -> str | None:
        """A process of this machine that has ended: no link tells, while its inbox is full."""
        for rank, beat in enumerate(beats):
            if beat is None:
                continue
            count, *_, process, sees = beat
            if count != CLOSED and sees and sees == self._sees and not _runs(process):
                last = json.loads(bytes(self._store.get(f"beat/{rank}")))
                if last[0] != CLOSED:
                    return f"{self.names[rank]} is gone: its process ({process}) has ended"
        return None

    def _mourn(self, error: Exception) -> None:
        """The store is gone: nothing can be told or heard any more, so every rank says it."""
        with self._lock:
            if self.failure is None and not self._closed.is_set():
                self._grieve(first_line(error))

    def _grieve(self, why: str) -> None:
        """Say where the store is missed; without the lock, whose holder may wait for the store."""
        met = {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
        where = " at {MASTER_ADDR}:{MASTER_PORT}".format_map(os.environ) if met else ""
        message = (
            f"{self.names[self._rank]}, on {socket.gethostname()}: the job's store is gone: "
            f"torchrun has ended{where}, or that machine is out of reach ({why})"
        )
        print(f"headrace: {message}", file=sys.stderr, flush=True)
        self._note(Failure(message, 1))

    def _heed(self) -> None:
        """Another rank, or this one, has failed."""
        with self._lock:
            if self.failure is None:
                self._await_said()
                _, message, code = json.loads(bytes(self._store.get("failure")))
                self._let_all_hear()
                self._note(Failure(message, code))

    # The ways a process ends -------------------------------------------------------------------

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            self._hand_on(number, frame)
            return
        if self._stopping or self.failure is not None:
            return  # the end is near; a second SystemExit would meet Python's own shutdown
        self._stopping = True
        end = time.monotonic() + EVIDENCE
        # A DataLoader complains, in here, of workers that the same signal has ended.
        with suppress(Exception):
            while self.failure is None and time.monotonic() < end and number == signal.SIGTERM:
                time.sleep(0.02)
        if number == signal.SIGTERM and self.saves and self.failure is None:
            # All are well: the first stage ends the call, and all save. A second one may come, from
            # torchrun and from whoever stops it: that is no reason to hurry.
            self._stopping, self.stop_requested = False, True
            self._store.set("stop", "")
            return
        self.stop(number)

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        """In a process forked from this one (a DataLoader's worker): as if we were not there."""
        before = self._handlers[number]
        if callable(before):
            before(number, frame)
        else:
            signal.signal(number, before)
            signal.raise_signal(number)

    def _on_uncaught(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        self.fail_by(error, "the script, outside of the pipeline")

    def end_process_if_failed(self) -> None:
        """At exit after a failure: threads still wait inside the backend, so Python must not."""
        if self.failure is not None:
            _end(self.failure.code)


def is_reported(error: BaseException) -> bool:
    """Whether an error was printed already, by `Watch`."""
    return getattr(error, "headrace_reported", False)


def _end(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _processes() -> str:
    """Which processes can be seen here: the same word to those who see the same; or nothing."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


_Beat = list[Any]
"""A count, what a `Pulse` has but `trained`, the host, the process, and what it sees."""


class _Seen:
    """When each rank last beat, and when any last moved.

    Args:
        own: this rank.
    """

    def __init__(self, own: int, ranks: int) -> None:
        now = time.monotonic()
        self._own = own
        self._counts: list[Any] = [None] * ranks
        self._heard = [now] * ranks
        self._progress: list[Any] = []
        self._moved = now

    def trouble(self, beats: list[_Beat | None], limit: float, names: list[str]) -> str | None:
        """Say which rank has been silent, or has not come, or that none has moved, for longer than
        the limit.
        """
        now = time.monotonic()
        for rank, beat in enumerate(beats):
            if beat is not None and beat[0] != self._counts[rank]:
                self._counts[rank], self._heard[rank] = beat[0], now
        there = [beat for beat in beats if beat is not None]
        all_wait = len(there) == len(beats) and all(waiting for _, _, waiting, *_ in there)
        progress = [beat[1] for beat in there]
        if progress != self._progress or not all_wait:
            self._progress, self._moved = progress, now
        for rank, (heard, beat) in enumerate(zip(self._heard, beats, strict=True)):
            if now - heard > limit and beat is None:
                return (
                    f"{names[rank]} has not built this pipeline for {now - heard:.0f} s, and "
                    f"{names[self._own]} has: every rank must make the same calls in the same "
                    "order; if it only takes longer until then, write a longer timeout="
                )
            if now - heard > limit and beat is not None and beat[0] != CLOSED:
                host, pid, _ = beat[4:]
                return (
                    f"{names[rank]} has been silent for {now - heard:.0f} s (process {pid} on "
                    f"{host}): it was stopped, or its machine is out of reach"
                )
        if now - self._moved > limit and any(beat[0] != CLOSED for beat in there):
            states = "; ".join(f"{n}: {b[3]}" for n, b in zip(names, there, strict=True))
            return f"no stage has made progress for {now - self._moved:.0f} s: {states}"
        return None
