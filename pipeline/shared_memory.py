"""Pass tensors of the CPU to another process of this host through memory that both map.

Over loopback a tensor is copied into the system and out of it, in threads that take the cores' time
from the layers. Here the sender copies it once, into a free slot of a memory file, and the
receiver's tensor is that slot; when the last view of it is gone, the slot is free again.
"""

import ctypes
import mmap
import os
import weakref

import torch
from torch import Tensor

from .message import Note, TensorSpec

__all__ = ["SharedMemory"]

SLOTS = 64
PAGE = mmap.ALLOCATIONGRANULARITY


class _Arena:
    """A memory file of `SLOTS` slots, behind one page of flags: 1 for a slot in use.

    The sender makes it, the receiver opens it under the sender's process; it has no name, so it is
    gone with the two. Pages that are never written take no memory.
    """

    def __init__(self, file: int, slot_bytes: int) -> None:
        self.file, self.slot_bytes = file, slot_bytes
        self.memory = mmap.mmap(file, PAGE + SLOTS * slot_bytes)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self._held: dict[int, weakref.ref[memoryview]] = {}

    @classmethod
    def make(cls, least: int) -> "_Arena":
        """Make one whose slots hold at least so many bytes, in powers of two."""
        slot_bytes = max(PAGE, 1 << (least - 1).bit_length())
        file = os.memfd_create("headrace")
        os.ftruncate(file, PAGE + SLOTS * slot_bytes)
        arena = cls(file, slot_bytes)
        weakref.finalize(arena, os.close, file)
        return arena

    @classmethod
    def open(cls, process: int, file: int, slot_bytes: int) -> "_Arena":
        """Open one that another process of this host has made."""
        own = os.open(f"/proc/{process}/fd/{file}", os.O_RDWR)
        try:
            return cls(own, slot_bytes)
        finally:
            os.close(own)

    def take(self) -> int | None:
        """A free slot, now in use; the lowest, whose pages are likely in memory already."""
        slot = self.memory.find(b"\0", 0, SLOTS)
        if slot < 0:
            return None
        self.memory[slot] = 1
        return slot

    def fill(self, slot: int, tensor: Tensor, size: int) -> None:
        """Copy a tensor's elements into a slot."""
        source = tensor.contiguous()
        ctypes.memmove(self._address + self._start(slot), source.data_ptr(), size)

    def hold(self, slot: int, size: int) -> memoryview:
        """The first bytes of a slot, which is free once the last view of them is gone."""
        start = self._start(slot)
        view = memoryview(self.memory)[start : start + size]
        self._held[slot] = weakref.ref(view, lambda _: self._free(slot))
        return view

    def _free(self, slot: int) -> None:
        del self._held[slot]
        self.memory[slot] = 0

    def _start(self, slot: int) -> int:
        return PAGE + slot * self.slot_bytes


class SharedMemory:
    """One direction between two processes; each end has its own, of the same files.

    A sender keeps all the files it has made: the receiver opens one when it comes to it.
    """

    def __init__(self) -> None:
        self._arenas: dict[tuple[int, int], _Arena] = {}

    def place(self, tensor: Tensor) -> Note:
        """Copy a tensor, which is not empty, into a free slot, and say which.

        Raises:
            OSError: the system has no such memory, or no more of it.
        """
        size = tensor.numel() * tensor.element_size()
        arena, slot = self._find(size)
        arena.fill(slot, tensor, size)
        return Note(os.getpid(), arena.file, arena.slot_bytes, slot)

    def _find(self, size: int) -> tuple[_Arena, int]:
        for arena in self._arenas.values():
            # A far larger slot would do, and be wasted.
            if size <= arena.slot_bytes <= max(PAGE, 2 * size):
                slot = arena.take()
                if slot is not None:
                    return arena, slot
        arena = _Arena.make(size)
        self._arenas[os.getpid(), arena.file] = arena
        return arena, arena.take() or 0

    def reach(self, spec: TensorSpec, note: Note) -> Tensor:
        """Give a tensor that lives in the slot; the slot is free when the last view is gone.

        Raises:
            OSError: the sender's memory cannot be opened here.
            ValueError: there is no such slot, or the tensor does not fit into it.
        """
        process, file, slot_bytes, slot = note
        if not (0 <= slot < SLOTS and 0 < spec.bytes <= slot_bytes and slot_bytes % PAGE == 0):
            raise ValueError(f"{note} is no place of a tensor of {spec.bytes} bytes")
        if (process, file) not in self._arenas:
            self._arenas[process, file] = _Arena.open(process, file, slot_bytes)
        arena = self._arenas[process, file]
        view = arena.hold(slot, spec.bytes)
        return torch.frombuffer(view, dtype=spec.dtype).view(spec.shape)
