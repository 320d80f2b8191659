"""A thread that receives messages before they are asked for."""

import threading
from collections import deque

from .channel import Inbox
from .message import Message

__all__ = ["Receiver"]


class Receiver(threading.Thread, Inbox):
    """Its `run` is for those who know the way: `make_room`, receive, `put`.

    Args:
        ahead: how many messages may wait: bounds memory, hides the link.
    """

    def __init__(self, ahead: int) -> None:
        super().__init__(name="headrace-receive", daemon=True)
        self._messages: deque[Message] = deque()
        self._room = threading.Semaphore(ahead)

    def make_room(self) -> None:
        """Wait until one more message may come."""
        self._room.acquire()

    def put(self, message: Message) -> None:
        """This one has come."""
        self._messages.append(message)

    def poll(self) -> Message | None:
        if not self._messages:
            return None
        self._room.release()
        return self._messages.popleft()

    def leave(self, seconds: float) -> None:
        self.join(seconds)
