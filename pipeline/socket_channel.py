"""Channels over TCP between processes that may come and go: a replica and a server of weights.

What goes over one is the frame and then each large tensor, as everywhere (`message`); a thread
drives each direction. A closed connection is told once, and harms nobody else.
"""

import ctypes
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

import torch
from torch import Tensor

from .channel import Inbox, Outbox
from .message import Kind, Message, complete, decode, encode, frame_bytes
from .nest import to_device

__all__ = ["SocketInbox", "SocketOutbox", "dial", "greet", "listen"]

RECEIVE_AHEAD = 4
"""Messages received before they are asked for."""

GREETING = b"headrace weights"
"""What a replica says first: others who find the port are shown the door."""

PIECE = 1 << 20
"""Bytes of a frame for which memory is taken at a time: it grows with what has come."""

CLOSED = "its connection was closed"

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
                    self._socket.sendall(_memory(whole))
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


class SocketInbox(threading.Thread, Inbox):
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
        super().__init__(name="headrace-receive", daemon=True)
        self._socket, self._arrived, self._lost = end, arrived, lost
        self._silence, self._most = silence, most
        if silence is not None:
            # Of receiving alone: to send much over a slow link may take longer.
            seconds = struct.pack("ll", int(silence), int(silence % 1 * 1e6))
            end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, seconds)
        self.outside = silence is not None
        self._messages: deque[Message] = deque()
        self._room = threading.Semaphore(RECEIVE_AHEAD)

    def poll(self) -> Message | None:
        if not self._messages:
            return None
        self._room.release()
        return self._messages.popleft()

    def leave(self, seconds: float) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RD)
        self.join(seconds)

    def run(self) -> None:
        try:
            kind = None
            while kind is not Kind.CLOSE:
                self._room.acquire()
                while (message := self._receive()).kind is Kind.BEAT:
                    pass
                kind = message.kind
                self._messages.append(message)
                self._arrived()
        except BlockingIOError:
            self._lost(TimeoutError(f"it has been silent for {self._silence:.0f} s"))
        except Exception as error:  # of a frame that is none, any
            self._lost(_why(error))

    def _receive(self) -> Message:
        message, structure, parts = decode(self._frame())
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
                self._fill(_memory(part))
            elif not isinstance(part, Tensor):
                raise ValueError("a tensor that lies in another host's memory")
            tensors.append((spec, part))
        return complete(message, structure, tensors)

    def _frame(self) -> bytearray:
        frame = bytearray(8)
        self._fill(memoryview(frame))
        size = frame_bytes(frame)
        while len(frame) < size:
            piece = bytearray(min(PIECE, size - len(frame)))
            self._fill(memoryview(piece))
            frame += piece
        return frame

    def _fill(self, memory: memoryview) -> None:
        while memory.nbytes:
            got = self._socket.recv_into(memory)
            if not got:
                raise EOFError(CLOSED)
            memory = memory[got:]


def listen(host: str, port: int = 0) -> socket.socket:
    """A door at this address; port 0 is any that is free.

    Raises:
        OSError: it cannot be had.
    """
    return socket.create_server((host, port), backlog=64)


def dial(host: str, port: int, seconds: float) -> socket.socket:
    """Knock at a server's door.

    Raises:
        OSError: nobody opens.
    """
    end = socket.create_connection((host, port), timeout=seconds)
    end.settimeout(None)
    end.sendall(GREETING)
    return _prepared(end)


def greet(end: socket.socket, seconds: float = 10.0) -> bool:
    """Hear who has knocked: whether it is a replica. So many seconds, however it dawdles."""
    deadline, heard = time.monotonic() + seconds, b""
    with suppress(OSError, ValueError):  # a time-out that is over is a ValueError
        while len(heard) < len(GREETING):
            end.settimeout(deadline - time.monotonic())
            more = end.recv(len(GREETING) - len(heard))
            if not more:
                break
            heard += more
        end.settimeout(None)
        if heard == GREETING:
            _prepared(end)
            return True
    end.close()
    return False


def _prepared(end: socket.socket) -> socket.socket:
    """Send small messages at once; and find out when the other machine is gone without a word."""
    options: list[tuple[int, Any, int]] = [
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    ]
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            options.append((socket.IPPROTO_TCP, getattr(socket, name), value))
    for level, option, value in options:
        end.setsockopt(level, option, value)
    return end


def _why(error: Exception) -> Exception:
    """What became of the other side, in words that do not depend on how much was under way."""
    return EOFError(CLOSED) if isinstance(error, ConnectionError) else error


def _memory(tensor: Tensor) -> memoryview:
    """A contiguous tensor's bytes."""
    size = tensor.numel() * tensor.element_size()
    array = (ctypes.c_char * size).from_address(tensor.data_ptr())
    return memoryview(array).cast("B")
