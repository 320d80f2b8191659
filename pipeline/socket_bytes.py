"""Frames and tensors, byte by byte, over a connection's socket."""

import ctypes
import socket

from torch import Tensor

from .message import frame_bytes

__all__ = ["CLOSED", "fill", "memory_of", "read_frame"]

PIECE = 1 << 20
"""Bytes of a frame for which memory is taken at a time: it grows with what has come."""

CLOSED = "its connection was closed"


def read_frame(end: socket.socket) -> bytearray:
    """Receive a whole frame.

    Raises:
        ValueError: what comes is none.
        EOFError, OSError: the connection ends before.
    """
    frame = bytearray(8)
    fill(end, memoryview(frame))
    size = frame_bytes(frame)
    while len(frame) < size:
        piece = bytearray(min(PIECE, size - len(frame)))
        fill(end, memoryview(piece))
        frame += piece
    return frame


def fill(end: socket.socket, memory: memoryview) -> None:
    """Receive as many bytes as there is memory.

    Raises:
        EOFError, OSError: the connection ends before.
    """
    while memory.nbytes:
        got = end.recv_into(memory, flags=socket.MSG_WAITALL)  # one call for a tensor, as a rule
        if not got:
            raise EOFError(CLOSED)
        memory = memory[got:]


def memory_of(tensor: Tensor) -> memoryview:
    """A contiguous tensor's bytes, as long as it lives."""
    size = tensor.numel() * tensor.element_size()
    array = (ctypes.c_char * size).from_address(tensor.data_ptr())
    return memoryview(array).cast("B")
