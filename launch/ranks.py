"""The processes torchrun started, beside a pipeline: who we are, and one voice for errors."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import parent_process
from types import FrameType, TracebackType
from typing import NoReturn

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from headrace.pipeline.attempt import attempt, connect
from headrace.pipeline.errors import first_line, told

__all__ = [
    "check_stages",
    "hear",
    "processes",
    "rank",
    "recall",
    "refuse",
    "refuse_error",
    "remember",
    "say_nothing_of_a_parent_that_ended",
    "stop",
    "tell",
]

GRACE = 5.0
"""Seconds that a process has to put things away, once a signal has told it to end."""


def rank() -> int:
    """This process's number; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def processes() -> int | None:
    """How many torchrun started; None without torchrun."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else None


def check_stages(stages: int | None) -> None:
    """Compare a configuration's number of stages with torchrun's processes.

    Raises:
        ValueError: they differ.
    """
    started = processes()
    if started is not None and stages not in (None, started):
        raise ValueError(
            f"stages: {stages}, but torchrun started {started} processes: start it with"
            f" --nproc-per-node {stages}, or write --stages {started}"
        )


def tell(name: str, value: str) -> None:
    """Let the other processes `hear` it."""
    if processes() is not None:
        with _store() as store:
            store.set(_key(name), value)


def hear(name: str) -> str:
    """What the first process tells under this name; ends with it if it refuses instead."""
    with _store() as store:
        while not store.check([_key(name)]):
            if store.check([_key("refused")]):
                raise SystemExit(2)
            time.sleep(0.05)
        return str(store.get(_key(name)).decode())


def remember(name: str, value: str) -> None:
    """Keep something for the processes that torchrun starts in the place of these."""
    if processes() is not None:
        with _store() as store:
            store.set(f"headrace/launch/{name}", value)


def recall(name: str) -> str | None:
    """What an earlier start of this job wanted to be remembered; None where this is the first."""
    if processes() is None:
        return None
    key = f"headrace/launch/{name}"
    with _store() as store:
        return str(store.get(key).decode()) if store.check([key]) else None


def refuse(message: str, code: int = 2) -> NoReturn:
    """Print one line on stderr, once however many processes refuse, and end with this exit code."""
    line = f"headrace: {message}\n"
    if processes() is None:
        sys.stderr.write(line)
        raise SystemExit(code)
    mine = str(rank())
    with _store() as store:
        if store.compare_set(_key("refused"), "", mine).decode() == mine:
            sys.stderr.write(line)
            sys.stderr.flush()
            store.set(_key("printed"), mine)
        else:
            # torchrun ends all processes as soon as one has ended: not before the line is out.
            store.wait([_key("printed")], timedelta(seconds=5))
    raise SystemExit(code)


def refuse_error(error: Exception, code: int = 2) -> NoReturn:
    """Refuse in an error's one line, in a configuration's words, unless a pipeline under torchrun
    has printed it already.
    """
    if getattr(error, "headrace_reported", False):
        sys.stdout.flush()
        os._exit(code)  # the backend's threads may still wait, so Python must not end by itself
    refuse(told(error), code)


def stop(number: int, frame: FrameType | None) -> None:
    """End on a signal, and say so, once.

    It comes anywhere, in the middle of what a library does under a lock too: then nobody may wait
    for that library's threads for long.
    """
    if parent_process() is not None:  # a loader's worker, whom the terminal tells too
        if number != signal.SIGINT:
            raise SystemExit(128 + number)
        return  # its parent ends it
    code = 128 + number
    if rank() == 0:
        sys.stderr.write(f"headrace: stopped by {signal.Signals(number).name}\n")
    watchdog = threading.Timer(GRACE, os._exit, [code])
    watchdog.daemon = True
    watchdog.start()
    raise SystemExit(code)


def say_nothing_of_a_parent_that_ended(worker: int) -> None:
    """In a loader's worker: its thread that hands over mini-batches may find that the process it
    hands them to has ended, of which that process itself tells.
    """

    def hook(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        if not isinstance(error, ConnectionError | EOFError):
            sys.__excepthook__(kind, error, traceback)

    sys.excepthook = hook


@contextmanager
def _store() -> Iterator[TCPStore]:
    """A client of torchrun's store, which is there before any process group; ends this process,
    with 1, if it is gone.
    """
    try:
        yield connect()
    except dist.DistNetworkError as error:
        sys.stderr.write(
            "headrace: the job's store is gone: torchrun has ended, or its machine is out of reach "
            f"({first_line(error)})\n"
        )
        raise SystemExit(1) from None


def _key(name: str) -> str:
    """Of this start of the processes: torchrun may restart them on the same store."""
    return f"headrace/launch/{attempt()}/{name}"
