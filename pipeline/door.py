"""Connections over TCP: who knocks, who is let in, and how a connection is made ready."""

import hmac
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

__all__ = ["STRANGERS", "Door", "dial", "greet", "listen", "prepare"]

STRANGERS = 64
"""Connections that have not said yet who they are; more wait at the door."""

DAWDLING = 10.0
"""Seconds for which one may leave it unsaid."""


class Door:
    """Open at a port until `close`: who greets as is expected is let in, others are shown out.

    Args:
        welcome: called, from a thread, with each connection that is let in.
        greeting: what is expected.
        host, port: where; port 0 is any that is free, and `port` is then which.

    Raises:
        OSError: the address cannot be had.
    """

    def __init__(
        self, welcome: Callable[[socket.socket], None], greeting: bytes, host: str, port: int = 0
    ) -> None:
        self._welcome, self._greeting = welcome, greeting
        self._strangers, self._closing = threading.Semaphore(STRANGERS), False
        self._socket = listen(host, port)
        self.port = int(self._socket.getsockname()[1])
        threading.Thread(target=self._open, name="headrace-door", daemon=True).start()

    def close(self) -> None:
        """Let in nobody more."""
        self._closing = True
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # closing alone does not wake who waits there
        self._socket.close()

    def _open(self) -> None:
        while True:
            self._strangers.acquire()
            try:
                end, _ = self._socket.accept()
            except OSError:
                self._strangers.release()
                if self._closing:
                    return
                time.sleep(0.1)  # no file is left for one more, for now
                continue
            threading.Thread(target=self._greet, args=[end], daemon=True).start()

    def _greet(self, end: socket.socket) -> None:
        try:
            known = greet(end, self._greeting)
        finally:
            self._strangers.release()
        if known:
            self._welcome(end)


def listen(host: str, port: int = 0) -> socket.socket:
    """A socket that listens at this address; port 0 is any that is free.

    Raises:
        OSError: it cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=64)


def dial(host: str, port: int, greeting: bytes, seconds: float) -> socket.socket:
    """Knock at a door, and say the greeting.

    Raises:
        OSError: nobody opens.
    """
    end = socket.create_connection((host, port), timeout=seconds)
    end.settimeout(None)
    end.sendall(greeting)
    return end


def greet(end: socket.socket, greeting: bytes, seconds: float = DAWDLING) -> bool:
    """Hear whether who has knocked says the greeting. So many seconds, however it dawdles."""
    deadline, heard = time.monotonic() + seconds, b""
    with suppress(OSError, ValueError):  # a time-out that is over is a ValueError
        while len(heard) < len(greeting):
            end.settimeout(deadline - time.monotonic())
            more = end.recv(len(greeting) - len(heard))
            if not more:
                break
            heard += more
        end.settimeout(None)
        if hmac.compare_digest(heard, greeting):
            return True
    end.close()
    return False


def prepare(end: socket.socket, probes: int) -> None:
    """Send small messages at once; and knock at the other machine while nothing is sent.

    Args:
        probes: as many without an answer, ten seconds apart, and the connection is lost.
    """
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", probes)):
        if hasattr(socket, name):
            end.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
