"""Channels over TCP between processes that may come and go: a replica and a server of weights.

What goes over one is the frame and then each large tensor, as everywhere (`message`); a thread
drives each direction. A closed connection is told once, and harms nobody else.
"""

import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue

import torch
from torch import Tensor

from .channel import Outbox
from .message import Kind, Message, complete, decode, encode
from .nest import to_device
from .receiver import Receiver
from .socket_bytes import CLOSED, fill, memory_of, read_frame

__all__ = ["SocketInbox", "SocketOutbox"]

RECEIVE_AHEAD = 4
"""Messages received before they are asked for."""

Lost = Callable[[Exception], None]

_CPU = torch.device("cpu")


class SocketOutbox(threading.Thread, Outbox):
    """Sends messages one after the other; `send` copies what is not on the CPU, and returns.

    Args:
        beat: seconds without a message after which it lets the other side know that it is there.
    """

    def __init__(self, end: socket.socket, lost: Lost, beat: float = 5.0) -> None:
        super().__init__(name="headrace-send", daemon=True)
        self._socket, self._lost, self._beat = end, lost, beat
        self._queue: SimpleQueue[tuple[Kind, bytearray, list[Tensor]]] = SimpleQueue()
        self.start()

    @property
    def backlog(self) -> int:
        return self._queue.qsize()

    def send(self, message: Message) -> None:
        frame, tensors = encode(message.carrying(to_device(message.body, _CPU)))
        self._queue.put((message.kind, frame, tensors))

    def leave(self, seconds: float) -> None:
        self.join(seconds)

    def run(self) -> None:
        try:
            kind = None
            while kind is not Kind.CLOSE:
                kind, frame, tensors = self._next()
                self._socket.sendall(frame)
                for tensor in tensors:
                    whole = tensor.contiguous()
                    self._socket.sendall(memory_of(whole))
        except OSError as error:
            self._lost(_why(error))
        else:
            with suppress(OSError):  # it went first
                self._socket.shutdown(socket.SHUT_WR)

    def _next(self) -> tuple[Kind, bytearray, list[Tensor]]:
        try:
            return self._queue.get(timeout=self._beat)
        except Empty:
            return Kind.BEAT, *encode(Message(Kind.BEAT))


class SocketInbox(Receiver):
    """Receives ahead, up to a few messages.

    Args:
        arrived: called, from a thread, for every message that is there.
        lost: called once, when the connection ends without a farewell.
        silence: seconds without a message or a beat that are allowed; None: any number.
        most: bytes of a message's tensors that are allowed; None: any number.
    """

    def __init__(
        self,
        end: socket.socket,
        arrived: Callable[[], None],
        lost: Lost,
        silence: float | None = None,
        most: int | None = None,
    ) -> None:
        super().__init__(RECEIVE_AHEAD)
        self._socket, self._arrived, self._lost = end, arrived, lost
        self._silence, self._most = silence, most
        if silence is not None:
            # Of receiving alone: to send much over a slow link may take longer.
            seconds = struct.pack("ll", int(silence), int(silence % 1 * 1e6))
            end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, seconds)
        self.outside = silence is not None

    def leave(self, seconds: float) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RD)
        super().leave(seconds)

    def run(self) -> None:
        try:
            kind = None
            while kind is not Kind.CLOSE:
                self.make_room()
                while (message := self._receive()).kind is Kind.BEAT:
                    if message.body is not None or message.numbers:
                        raise ValueError("a beat that says something")
                kind = message.kind
                self.put(message)
                self._arrived()
        except BlockingIOError:
            self._lost(TimeoutError(f"it has been silent for {self._silence:.0f} s"))
        except Exception as error:  # of a frame that is none, any
            self._lost(_why(error))

    def _receive(self) -> Message:
        message, structure, parts = decode(read_frame(self._socket))
        size = sum(spec.bytes for spec, _ in parts)
        if self._most is not None and size > self._most:
            raise ValueError(
                f"a message with {size:,} bytes of tensors: {self._most:,} are allowed"
            )
        tensors = []
        for spec, part in parts:
            if part is None:
                # The system gives memory to what is written, so to what has come.
                part = torch.empty(spec.shape, dtype=spec.dtype)
                fill(self._socket, memory_of(part))
            elif not isinstance(part, Tensor):
                raise ValueError("a tensor that lies in another host's memory")
            tensors.append((spec, part))
        return complete(message, structure, tensors)


def _why(error: Exception) -> Exception:
    """What became of the other side, in words that do not depend on how much was under way."""
    return EOFError(CLOSED) if isinstance(error, ConnectionError) else error
