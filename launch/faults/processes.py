"""The processes of one job, found by a word in their environment, whatever their parents are."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

__all__ = ["MARK", "Worker", "end_all", "living", "workers"]

MARK = "HEADRACE_CHAOS"


@dataclass(frozen=True)
class Worker:
    """A rank at work.

    Args:
        start: how often torchrun had started the ranks anew by then.
    """

    process: int
    rank: int
    start: int


def living(word: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Processes whose environment has the word, and that environment; the dead are not counted."""
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        with suppress(OSError):
            found = (folder / "environ").read_bytes()
            if f"{MARK}={word}".encode() in found.split(b"\0"):
                pairs = (
                    each.decode(errors="replace").partition("=") for each in found.split(b"\0")
                )
                yield int(folder.name), {name: value for name, _, value in pairs}


def workers(word: str, parent: int) -> dict[int, Worker]:
    """By rank, the processes that torchrun has started."""
    found = {}
    for process, environment in living(word):
        if "TORCHELASTIC_RESTART_COUNT" in environment and _parent(process) == parent:
            rank, start = environment["RANK"], environment["TORCHELASTIC_RESTART_COUNT"]
            found[int(rank)] = Worker(process, int(rank), int(start))
    return found


def _parent(process: int) -> int | None:
    with suppress(OSError, ValueError):
        text = Path(f"/proc/{process}/stat").read_text()
        return int(text.rpartition(")")[2].split()[1])
    return None


def end_all(word: str) -> None:
    """Kill what is left of a job."""
    while found := [process for process, _ in living(word)]:
        for process in found:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.05)
