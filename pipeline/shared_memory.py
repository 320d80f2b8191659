"""Carry tensors of the CPU between processes of one host through memory that both map.

gloo copies a tensor four times on its way over loopback, in threads that take the cores' time from
the layers. Here the sender copies it once, into a free slot of a memory file, and the receiver's
tensor is that slot; when the last view of it is gone, the slot is free again. A tensor that finds
no free slot (the receiver keeps many) goes by gloo.
"""

import mmap
import os
import secrets
import weakref

import torch
import torch.distributed as dist
from torch import Tensor

from .carrier import Carrier
from .message import BY_WIRE, Note, TensorSpec

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

    def view(self, slot: int, size: int) -> memoryview:
        """The first bytes of a slot."""
        start = PAGE + slot * self.slot_bytes
        return memoryview(self.memory)[start : start + size]

    def free_with(self, view: memoryview, slot: int) -> None:
        """Free a slot once its view is gone."""
        weakref.finalize(view, self.memory.__setitem__, slot, 0).atexit = False


class SharedMemory(Carrier):
    """A carrier whose large tensors stay in memory; what says where they are goes by gloo."""

    def __init__(self, device: torch.device, group: dist.ProcessGroup) -> None:
        super().__init__(device, group)
        # A sender keeps all it has made: the receiver opens one when it comes to it.
        self._arenas: dict[tuple[int, int], _Arena] = {}
        self._shares = False

    def warm_up(self, peer: int, sends: bool) -> None:
        """Open the connection, and find out whether the receiver can open the sender's memory."""
        super().warm_up(peer, sends)
        answer = torch.zeros(1, dtype=torch.int64)
        if sends:
            probe = _make_arena(8)
            word = secrets.randbits(60)
            if probe:
                probe.view(0, 8)[:] = word.to_bytes(8, "little")
            self.send_host(torch.tensor(_note(probe, word)), peer)
            self.receive_host(answer, peer)
        else:
            note = torch.empty(4, dtype=torch.int64)
            self.receive_host(note, peer)
            answer.fill_(_can_open(note.tolist()))
            self.send_host(answer, peer)
        self._shares = bool(answer)

    def place(self, tensor: Tensor) -> Note:
        """Copy a tensor into a free slot, if there is one."""
        size = tensor.numel() * tensor.element_size()
        if not self._shares:
            return BY_WIRE
        arena = next((a for a in self._arenas.values() if a.slot_bytes >= size), None)
        arena = arena or self._make(size)
        slot = arena.take() if arena else None
        if arena is None or slot is None:
            return BY_WIRE
        flat = torch.frombuffer(arena.view(slot, size), dtype=tensor.dtype)
        flat.view(tensor.shape).copy_(tensor)
        return _note(arena, slot)

    def _make(self, size: int) -> _Arena | None:
        arena = _make_arena(size)
        if arena:
            self._arenas[os.getpid(), arena.file] = arena
        return arena

    def reach(self, spec: TensorSpec, note: Note) -> Tensor:
        """Give a tensor that lives in the slot; the slot is free when the last view is gone."""
        process, file, slot_bytes, slot = note
        if (process, file) not in self._arenas:
            self._arenas[process, file] = _Arena.open(process, file, slot_bytes)
        arena = self._arenas[process, file]
        view = arena.view(slot, spec.bytes)
        arena.free_with(view, slot)
        return torch.frombuffer(view, dtype=spec.dtype).view(spec.shape)


def _note(arena: _Arena | None, slot: int) -> Note:
    """Where a tensor is: the sender's process, its file there, the slots' size, the slot."""
    return Note(os.getpid(), arena.file, arena.slot_bytes, slot) if arena else BY_WIRE


def _make_arena(least: int) -> _Arena | None:
    """An arena, or None where the system has no such memory."""
    try:
        return _Arena.make(least)
    except (AttributeError, OSError):
        return None


def _can_open(note: list[int]) -> bool:
    """Whether the memory that a note names can be opened here, and has the word in it."""
    process, file, slot_bytes, word = note
    try:
        arena = _Arena.open(process, file, slot_bytes)
    except (OSError, ValueError):
        return False
    return bytes(arena.view(0, 8)) == word.to_bytes(8, "little")
