"""A link that is slower than the machine's: to see what a slow one would do, without having one."""

import threading
from collections.abc import Callable
from queue import SimpleQueue
from time import perf_counter, sleep

from .channel import Outbox
from .link import Link
from .message import Kind, Message
from .nest import total_bytes

__all__ = ["EmulatedLink"]


class EmulatedLink(Outbox, threading.Thread):
    """The near end of a slow link: it hands each message to the real one when its time has come.

    Args:
        outbox: the real one.
        link: how slow.
        on_error: told what a send raised, for this is a thread.
    """

    def __init__(self, outbox: Outbox, link: Link, on_error: Callable[[Exception], None]) -> None:
        threading.Thread.__init__(self, name="headrace-emulated-link", daemon=True)
        self._outbox, self._link, self._on_error = outbox, link, on_error
        self._queue: SimpleQueue[tuple[Message, float]] = SimpleQueue()
        self.start()

    @property
    def backlog(self) -> int:
        return self._queue.qsize() + self._outbox.backlog

    def send(self, message: Message) -> None:
        self._queue.put((message, perf_counter()))

    def leave(self, seconds: float) -> None:
        self.join(seconds)
        self._outbox.leave(seconds)

    def run(self) -> None:
        free = 0.0
        kind = None
        try:
            while kind is not Kind.CLOSE:
                message, handed_over = self._queue.get()
                kind = message.kind
                free = max(free, handed_over) + self._link.occupied(total_bytes(message.body))
                sleep(max(0.0, free + self._link.latency - perf_counter()))
                self._outbox.send(message)
                while not self._outbox.flush():
                    sleep(0.001)
        except Exception as error:
            self._on_error(error)
