"""One stage's weights in memory that several processes of a host map, and counters beside them."""

import json
import mmap
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import InputError
from .layers import Layers

if TYPE_CHECKING:
    from .watch import Watch

__all__ = ["SharedWeights"]

ROW = 8
"""int64s of counters to a replica: a cache line, so that no two write into one."""

ALIGNMENT = 64


class SharedWeights:
    """The weights and buffers of a stage's layers, moved where all its replicas see them.

    The first replica makes a memory file that has no name, so it is gone with the last process; the
    others open it under the first one's process. A GPU's memory is passed on by torch's own handles
    to it (CUDA IPC).

    Args:
        replica: this one, of `count`.
        key: what the first one's file is told under.

    Raises:
        InputError: the file cannot be opened here: the replicas are on different hosts.
    """

    def __init__(self, layers: Layers, replica: int, count: int, watch: "Watch", key: str) -> None:
        named = {**dict(layers.named_parameters()), **dict(layers.named_buffers())}
        tensors = list(named.values())
        on_cpu = all(t.device.type == "cpu" for t in tensors)
        places, size = _place(tensors if on_cpu else [], ROW * 8 * count)
        if replica == 0:
            self.file = os.memfd_create("headrace-weights")
            os.ftruncate(self.file, size)
            watch.share(key, json.dumps([os.getpid(), self.file, size]))
        else:
            process, file, theirs = json.loads(watch.learn(key))
            self.file = _open(process, file, theirs, size)
        self._memory = mmap.mmap(self.file, size)
        self.counters = memoryview(self._memory)[: ROW * 8 * count].cast("q")
        if on_cpu:
            views = [
                torch.frombuffer(self._memory, dtype=t.dtype, count=t.numel(), offset=place)
                for t, place in zip(tensors, places, strict=True)
                if t.numel()
            ]
            tensors = [t for t in tensors if t.numel()]
        else:
            views = _pass_on(tensors, replica, watch, key)
        for tensor, view in zip(tensors, views, strict=True):
            shared = view.view(tensor.shape)
            if replica == 0:
                shared.copy_(tensor.data)
            tensor.data = shared
        if replica == 0:
            watch.share(f"{key}/filled", "")
        watch.learn(f"{key}/filled")


def _place(tensors: list[Tensor], start: int) -> tuple[list[int], int]:
    """Where each tensor begins, and where the last one ends."""
    places = []
    for tensor in tensors:
        start += -start % ALIGNMENT
        places.append(start)
        start += tensor.numel() * tensor.element_size()
    return places, start


def _open(process: int, file: int, theirs: int, size: int) -> int:
    try:
        own = os.open(f"/proc/{process}/fd/{file}", os.O_RDWR)
        if not os.readlink(f"/proc/self/fd/{own}").startswith("/memfd:headrace-weights"):
            raise OSError("it is another file")
    except OSError as error:
        raise InputError(
            f"replicas: hogwild shares weights in the memory of one host, and that of replica 0 "
            f"(process {process}) cannot be opened here ({error.strerror or error}): start all "
            "replicas on one host, or share the weights by downpour"
        ) from error
    if theirs != size:
        raise RuntimeError(f"replica 0's weights take {theirs} bytes, these {size}")
    return own


def _pass_on(tensors: list[Tensor], replica: int, watch: "Watch", key: str) -> list[Tensor]:
    """The first replica's tensors on a GPU, seen from here."""
    from torch.multiprocessing.reductions import reduce_tensor

    if replica == 0:
        handles = [reduce_tensor(t.data)[1] for t in tensors]  # type: ignore[no-untyped-call]
        watch.share(f"{key}/handles", json.dumps([_to_json(each) for each in handles]))
        return [t.data for t in tensors]
    handles = json.loads(watch.learn(f"{key}/handles"))
    return [_from_json(each, t.dtype) for each, t in zip(handles, tensors, strict=True)]


def _to_json(handle: Sequence[Any]) -> list[Any]:
    """What torch would pickle: numbers, and bytes, which are written in hexadecimal."""
    numbers = [*handle[1:4], *handle[6:]]  # between them classes and the dtype, which both know
    return [
        {"bytes": each.hex()} if isinstance(each, bytes) else list(each) if n < 2 else each
        for n, each in enumerate(numbers)
    ]


def _from_json(numbers: Sequence[Any], dtype: torch.dtype) -> Tensor:
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    size, stride, offset, *rest = [
        bytes.fromhex(each["bytes"]) if isinstance(each, dict) else each for each in numbers
    ]
    kind = torch.storage.TypedStorage
    rebuilt: Tensor = rebuild_cuda_tensor(  # type: ignore[no-untyped-call]
        Tensor, torch.Size(size), tuple(stride), offset, kind, dtype, *rest
    )
    return rebuilt
