"""Channels between processes of one host: frames by a socket, large tensors by shared memory.

The main thread sends and receives by itself: a message passes from one to the other with a single
wake-up, where a process group and its threads take four.
"""

import ctypes
import os
import secrets
import socket
import struct
import time
from collections import deque
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from .channel import Inbox, Outbox
from .introduction import Introduction
from .message import Kind, Message, Note, TensorSpec, complete, decode, encode
from .shared_memory import SharedMemory
from .timeline import Recorder, Work

__all__ = ["HostInbox", "HostOutbox", "meet_receiver", "meet_sender"]

PACKET = 4096
"""Bytes of the longest frame that goes by the socket itself; a longer one lies in memory."""

QUEUE = 8
"""Connections that may wait at a receiver's socket: the sender's, and those of strangers."""

Lost = Callable[[Exception], None]


class HostOutbox(Outbox):
    """Sends from the calling thread; what the socket has no room for waits for `flush`."""

    def __init__(
        self, end: socket.socket, memory: SharedMemory, recorder: Recorder, work: Work, lost: Lost
    ) -> None:
        self._socket, self._memory = end, memory
        self._recorder, self._work, self._lost = recorder, work, lost
        self._waiting: deque[bytes | bytearray] = deque()

    def send(self, message: Message) -> None:
        start = time.perf_counter()
        frame, _ = encode(message, self._memory.place)
        if len(frame) > PACKET:
            # The stub of a long frame: a message whose body is the frame.
            whole = torch.frombuffer(frame, dtype=torch.uint8)
            frame, _ = encode(Message(Kind.FRAME, body=whole), self._memory.place)
        self._waiting.append(frame)
        self.flush()
        self._recorder.note(self._work, message.index, start)

    def flush(self) -> bool:
        while self._waiting:
            try:
                self._socket.send(self._waiting[0])
            except BlockingIOError:
                return False
            except OSError as error:
                self._waiting.clear()
                self._lost(RuntimeError(str(error)))
                return True
            self._waiting.popleft()
        return True

    def leave(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self.flush() and time.monotonic() < end:
            time.sleep(0.001)


class HostInbox(Inbox):
    """Receives in the calling thread, when it is asked."""

    def __init__(self, end: socket.socket, memory: SharedMemory, lost: Lost) -> None:
        self._socket, self._memory, self._lost = end, memory, lost
        self._closed = False
        self.file = end.fileno()

    def poll(self) -> Message | None:
        if self._closed:
            return None
        try:
            data = self._socket.recv(PACKET)
        except BlockingIOError:
            return None
        except OSError as error:
            self._end(error)
            return None
        if not data:
            self._end(EOFError("the socket was closed"))
            return None
        message = self._read(bytearray(data))
        if message.kind is Kind.FRAME:
            body = message.body
            if not isinstance(body, Tensor) or body.dtype is not torch.uint8 or body.dim() != 1:
                raise ValueError("what came is no message of Headrace's: a long one without bytes")
            message = self._read(bytearray(ctypes.string_at(body.data_ptr(), len(body))))
        if message.kind is Kind.CLOSE:
            self._closed = True
            return None
        return message

    def leave(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self._closed and time.monotonic() < end:
            if self.poll() is None:
                time.sleep(0.001)

    def _read(self, frame: bytearray) -> Message:
        message, structure, parts = decode(frame)
        memory = self._memory
        return complete(
            message,
            structure,
            [(s, memory.reach(s, p) if isinstance(p, Note) else cast(Tensor, p)) for s, p in parts],
        )

    def _end(self, error: Exception) -> None:
        self._closed = True
        self._lost(RuntimeError(str(error)))


def meet_receiver(
    introduction: Introduction, recorder: Recorder, work: Work, lost: Lost
) -> HostOutbox | None:
    """The sender's half of finding out whether both are on one host; None if they are not.

    The receiver gives the address of a socket that only its own host can reach; the sender says
    there where a tensor lies that only its own host's processes can open.
    """
    address = torch.tensor(introduction.hear(2))
    memory, end = SharedMemory(), None
    try:
        if not address[0]:
            raise OSError("the receiver has no such socket")
        end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        end.setblocking(False)  # strangers may fill the queue: nobody would make room in it
        end.connect(_name(address))
        note = memory.place(address)
    except (OSError, AttributeError):  # another host, or a system without such things
        note = Note(0, 0, 0, -1)
    introduction.tell(*note)
    (let_in,) = introduction.hear(1)
    if end is None or not let_in:
        if end is not None:
            end.close()
        return None
    return HostOutbox(end, memory, recorder, work, lost)


def meet_sender(introduction: Introduction, lost: Lost) -> HostInbox | None:
    """The receiver's half."""
    address = torch.tensor([1 + secrets.randbits(60), secrets.randbits(60)])
    door = None
    try:
        door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        door.bind(_name(address))
        door.listen(QUEUE)
        door.setblocking(False)
    except (OSError, AttributeError):
        address[0] = 0
    introduction.tell(*address.tolist())
    note, memory = Note(*introduction.hear(4)), SharedMemory()
    end = None
    try:
        if door is None or note.slot < 0:
            raise OSError("the sender did not reach this socket")
        seen = memory.reach(TensorSpec(torch.int64, (2,), False, False), note)
        if not torch.equal(seen, address):
            raise OSError("the sender's memory is another's")
        end = _accept_from(door, note.process)
        end.setblocking(False)
    except OSError:
        end = None
    introduction.tell(end is not None)
    if door is not None:
        door.close()
    return HostInbox(end, memory, lost) if end is not None else None


def _accept_from(door: socket.socket, process: int) -> socket.socket:
    """The connection of a process of this user; whoever else has found the address is left out.

    Raises:
        OSError: it is not among them.
    """
    # It was there before the first is let in; the system lets one more wait than it is told.
    for _ in range(QUEUE + 1):
        end, _ = door.accept()
        credentials = end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        peer, user, _ = _CREDENTIALS.unpack(credentials)
        if (peer, user) == (process, os.getuid()):
            return end
        end.close()
    raise OSError("strangers stand at this socket, one after the other")


_CREDENTIALS = struct.Struct("3i")
"""Process, user, group."""


def _name(address: Tensor) -> bytes:
    """An address outside the file system, which is gone with the socket.

    Memory is found by its process's number, which is another's elsewhere: containers that share a
    network, and so their sockets, do not meet unless they share the numbers too.
    """
    numbers = os.readlink("/proc/self/ns/pid")
    return b"\0headrace-" + "-".join(map(str, [*address.tolist(), numbers])).encode()
