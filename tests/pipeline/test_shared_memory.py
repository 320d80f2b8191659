"""Large tensors in memory that two processes map: here both ends are one process."""

import gc

import pytest
import torch
from torch import Tensor

from headrace.pipeline.message import TensorSpec
from headrace.pipeline.shared_memory import SLOTS, SharedMemory


@pytest.fixture
def ends() -> tuple[SharedMemory, SharedMemory]:
    """A sender and a receiver."""
    return SharedMemory(), SharedMemory()


def spec_of(tensor: Tensor) -> TensorSpec:
    return TensorSpec(tensor.dtype, tuple(tensor.shape), False, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_a_tensor_arrives_as_it_was_sent(
    ends: tuple[SharedMemory, SharedMemory], dtype: torch.dtype
) -> None:
    sender, receiver = ends
    tensor = torch.randint(0, 2, (3, 700), generator=torch.Generator().manual_seed(0)).to(dtype).T
    arrived = receiver.reach(spec_of(tensor), sender.place(tensor))
    assert arrived.dtype == dtype and arrived.is_contiguous() and torch.equal(arrived, tensor)


def test_what_was_announced_can_still_be_opened_after_larger_tensors_came(
    ends: tuple[SharedMemory, SharedMemory],
) -> None:
    # The sender once closed a memory file when it made a larger one, before it had been opened.
    sender, receiver = ends
    tensors = [torch.full((1000 * 2**k,), float(k)) for k in range(6)]
    notes = [sender.place(tensor) for tensor in tensors]
    assert len({note.file for note in notes}) == len(tensors)
    for tensor, note in zip(tensors, notes, strict=True):
        assert torch.equal(receiver.reach(spec_of(tensor), note), tensor)


def test_a_slot_is_free_when_the_last_view_is_gone(
    ends: tuple[SharedMemory, SharedMemory],
) -> None:
    sender, receiver = ends
    tensor = torch.randn(1000)
    first = sender.place(tensor)
    arrived = receiver.reach(spec_of(tensor), first)
    part = arrived[10:20]
    del arrived
    gc.collect()
    assert sender.place(torch.zeros(1000)).slot != first.slot  # a view of it lives
    assert torch.equal(part, tensor[10:20])
    del part
    gc.collect()
    assert sender.place(tensor).slot == first.slot


def test_without_a_free_slot_another_file_is_made(ends: tuple[SharedMemory, SharedMemory]) -> None:
    sender, receiver = ends
    tensors = [torch.full((1000,), float(k)) for k in range(SLOTS + 1)]
    notes = [sender.place(tensor) for tensor in tensors]
    kept = [receiver.reach(spec_of(t), note) for t, note in zip(tensors, notes, strict=True)]
    assert sorted(note.slot for note in notes[:-1]) == list(range(SLOTS))
    assert len({note.file for note in notes[:-1]}) == 1
    assert notes[-1].file != notes[0].file
    assert all(torch.equal(k, t) for k, t in zip(kept, tensors, strict=True))
    del kept
    gc.collect()
    assert sender.place(tensors[0])[1:] == notes[0][1:]  # the first slot of the first file again
