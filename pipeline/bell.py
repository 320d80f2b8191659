"""What a main thread sleeps on: a neighbour's message, or another thread's ring."""

import os
import select
from contextlib import suppress

__all__ = ["Bell"]


class Bell:
    """Rung from any thread; one thread waits for it, and for a file at the same time."""

    def __init__(self) -> None:
        self._hears, self._rings = os.pipe()
        os.set_blocking(self._hears, False)
        os.set_blocking(self._rings, False)
        self._polls: dict[int | None, select.poll] = {}

    def ring(self) -> None:
        """Wake the one who waits, or who will wait next."""
        with suppress(BlockingIOError):  # a full pipe rings already
            os.write(self._rings, b"\0")

    def wait(self, seconds: float, file: int | None = None) -> None:
        """Sleep until it rings, the file can be read, or the time is over."""
        if file not in self._polls:
            self._polls[file] = poll = select.poll()
            for each in (self._hears, file):
                if each is not None:
                    poll.register(each, select.POLLIN)
        ready = self._polls[file].poll(seconds * 1000)
        if any(each == self._hears for each, _ in ready):
            with suppress(BlockingIOError):
                os.read(self._hears, 4096)
