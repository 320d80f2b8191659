"""End all ranks when one is in trouble: nothing hangs, and the first error is said once, first.

Every rank beats in torchrun's store and reads the others' beats there. Whoever fails, or finds a
neighbour gone or a rank silent, tries to set one key; the one that succeeds prints the report,
and all the others, seeing the key, end without a word.
"""

import atexit
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from .errors import InputError, first_line
from .layers import layer_at_fault

__all__ = ["Failure", "Pulse", "Watch", "is_reported", "title"]

GRACE = 3.0
"""Seconds between a failure and the end of a rank whose main thread does not see it."""

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


def title(stage: int, stages: int, rank: int) -> str:
    """Name a stage and its rank, for messages."""
    return f"stage {stage} of {stages} (rank {rank})"


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
        self.bell = threading.Event()
        self.failure: Failure | None = None
        mine = store.clone()  # type: ignore[attr-defined]
        self._store = PrefixStore(f"headrace/{job}", mine)
        self._rank, self._names, self._timeout, self._pulse = rank, names, timeout, pulse
        self._interval = min(0.5, min(timeout) / 5)
        self._lock = threading.RLock()
        self._closed = threading.Event()
        self._failed_at = 0.0
        self._handlers = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._handlers[number] = signal.signal(number, self._on_signal)
        self._excepthook = sys.excepthook
        sys.excepthook = self._on_uncaught
        self._thread = threading.Thread(target=self._beat, name="headrace-watch", daemon=True)
        self._thread.start()
        atexit.register(self.end_process_if_failed)

    # For the main thread -----------------------------------------------------------------------

    def idle(self) -> None:
        """Sleep until the bell rings, a moment at most, and end this rank if the job has failed."""
        self.bell.wait(0.1)
        self.bell.clear()
        self.check()

    def check(self) -> None:
        """End this rank if the job has failed.

        Raises:
            SystemExit: with the failure's code.
        """
        if self.failure is not None:
            raise SystemExit(self.failure.code)

    def share(self, key: str, text: str) -> None:
        """Tell all ranks something."""
        self._store.set(key, text)

    def learn(self, key: str) -> str:
        """Wait for what another rank tells with `share`."""
        while not self._store.check([key]):
            self.idle()
        return bytes(self._store.get(key)).decode()

    def fail_by(self, error: BaseException, doing: str) -> None:
        """Report an exception of this rank; once, though it passes several places on its way."""
        if isinstance(error, SystemExit | KeyboardInterrupt) or is_reported(error):
            return
        error.headrace_reported = True  # type: ignore[attr-defined]
        name = self._names[self._rank]
        if isinstance(error, InputError):
            self.fail(str(error), code=2)
            return
        layer = layer_at_fault(error)
        where = ", ".join(filter(None, [layer, doing]))
        if isinstance(error, FloatingPointError) and layer is None:
            self.fail(str(error), code=1)  # our own: it says where, and a traceback says no more
            return
        text = f"{name} failed: {type(error).__name__} in {where}: {first_line(error)}"
        self.fail(text, code=1, details="".join(traceback.format_exception(error)))

    def refuse(self, error: Exception) -> None:
        """Report an argument that cannot work: one line, and exit code 2."""
        error.headrace_reported = True  # type: ignore[attr-defined]
        self.fail(str(error), code=2)

    def close(self) -> None:
        """Stop watching, and give back the signal handlers."""
        self._closed.set()
        self._thread.join(timeout=10)
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
                self._say_said()
                self._note(Failure(message, code))
            else:
                self._await_said()
                _, message, code = json.loads(first)
                self._note(Failure(message, code))

    def lost(self, rank: int, error: Exception) -> None:
        """The link to a neighbour broke: backends raise RuntimeErrors; others are our own."""
        if not isinstance(error, RuntimeError):
            self.fail_by(error, f"the link to {self._names[rank]}")
        elif not self._closed.is_set():
            self.fail(f"{self._names[rank]} is gone: its connection was closed", code=1)

    def _note(self, failure: Failure) -> None:
        self._failed_at = time.monotonic()
        self.failure = failure
        self.bell.set()

    def _say_said(self) -> None:
        try:
            self._store.set("said", "")
        except dist.DistError:
            return

    def _await_said(self) -> None:
        """torchrun ends the job as soon as one rank ends: let the report be printed first."""
        end = time.monotonic() + GRACE
        try:
            while time.monotonic() < end and not self._store.check(["said"]):
                time.sleep(0.01)
        except dist.DistError:
            return

    # Beats -------------------------------------------------------------------------------------

    def _beat(self) -> None:
        seen = _Seen(len(self._names))
        keys = [f"beat/{rank}" for rank in range(len(self._names))]
        count = 0
        while not self._closed.is_set():
            pulse = self._pulse()
            count += 1
            mine = [count, pulse.progress, pulse.waiting, pulse.doing, socket.gethostname(),
                    os.getpid()]  # fmt: skip
            try:
                self._store.set(keys[self._rank], json.dumps(mine))
                if self._store.check(["failure"]):
                    self._heed()
                elif self._store.check(keys):
                    beats = [json.loads(bytes(b)) for b in self._store.multi_get(keys)]
                    limit = self._timeout[pulse.trained]
                    trouble = seen.trouble(beats, limit, self._names)
                    if trouble:
                        self.fail(trouble, code=1)
            except dist.DistError as error:
                if not self._closed.is_set():
                    self._note(Failure(f"the store is gone: {first_line(error)}", 1))
            if self.failure and time.monotonic() - self._failed_at > GRACE:
                _end(self.failure.code)
            self._closed.wait(self._interval)

    def _heed(self) -> None:
        """Another rank, or this one, has failed."""
        with self._lock:
            if self.failure is None:
                self._await_said()
                _, message, code = json.loads(bytes(self._store.get("failure")))
                self._note(Failure(message, code))

    # The ways a process ends -------------------------------------------------------------------

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        end = time.monotonic() + EVIDENCE
        while self.failure is None and time.monotonic() < end and number == signal.SIGTERM:
            time.sleep(0.02)
        name = signal.Signals(number).name
        self.fail(f"stopped by {name}", code=128 + number)
        self.check()

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


class _Seen:
    """When each rank last beat, and when any last moved."""

    def __init__(self, ranks: int) -> None:
        now = time.monotonic()
        self._counts: list[Any] = [None] * ranks
        self._heard = [now] * ranks
        self._progress: list[Any] = []
        self._moved = now

    def trouble(self, beats: list[list[Any]], limit: float, names: list[str]) -> str | None:
        """Say which rank has been silent, or that none has moved, for longer than the limit."""
        now = time.monotonic()
        for rank, (count, *_) in enumerate(beats):
            if count != self._counts[rank]:
                self._counts[rank], self._heard[rank] = count, now
        progress = [beat[1] for beat in beats]
        if progress != self._progress or not all(waiting for _, _, waiting, *_ in beats):
            self._progress, self._moved = progress, now
        for rank, heard in enumerate(self._heard):
            if now - heard > limit:
                host, pid = beats[rank][4:]
                return (
                    f"{names[rank]} has been silent for {now - heard:.0f} s (process {pid} on "
                    f"{host}): it was stopped, or its machine is out of reach"
                )
        if now - self._moved > limit:
            states = "; ".join(f"{n}: {b[3]}" for n, b in zip(names, beats, strict=True))
            return f"no stage has made progress for {now - self._moved:.0f} s: {states}"
        return None
