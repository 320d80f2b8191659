"""How a message's large tensors get to another process: by its connection, or by nccl."""

import socket
import threading
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .message import TensorSpec
from .socket_bytes import fill, memory_of

__all__ = ["Carrier", "HostStaged", "Nccl"]

_issue = threading.Lock()
"""nccl calls of a process are issued one at a time."""


class Carrier:
    """Carries tensors of the CPU: by the connection that carried the frame, after it."""

    on_cpu = True
    """There are no others: on one host, memory can be shared instead."""

    def warm_up(self, sends: bool) -> None:
        """Have a tensor's way open before the first one comes."""

    def mark(self) -> Any:
        """Note the moment at which a message's tensors are complete."""
        return None

    def send(self, end: socket.socket, tensor: Tensor, ready: Any) -> None:
        """Send a tensor once it is complete; the calling thread waits until it may be forgotten."""
        whole = tensor.contiguous()  # a name: the memory must live until it has been read
        end.sendall(memory_of(whole))

    def receive(self, end: socket.socket, spec: TensorSpec) -> Tensor:
        """Receive a tensor; it is complete on return."""
        tensor = torch.empty(spec.shape, dtype=spec.dtype)
        fill(end, memory_of(tensor))
        return tensor


class HostStaged(Carrier):
    """Carries CUDA tensors through pinned host memory: nccl wants a GPU each."""

    on_cpu = False

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def mark(self) -> Any:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def send(self, end: socket.socket, tensor: Tensor, ready: Any) -> None:
        if tensor.device.type == "cuda":
            with torch.cuda.stream(self.stream):
                self.stream.wait_event(ready)
                host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                host.copy_(tensor, non_blocking=True)
            self.stream.synchronize()
            tensor = host
        super().send(end, tensor, ready)

    def receive(self, end: socket.socket, spec: TensorSpec) -> Tensor:
        if not spec.on_accelerator:
            return super().receive(end, spec)
        host = torch.empty(spec.shape, dtype=spec.dtype, pin_memory=True)
        fill(end, memory_of(host))
        tensor = torch.empty(spec.shape, dtype=spec.dtype, device=self.device)
        with torch.cuda.stream(self.stream):
            # The caching allocator may hand out memory that the default stream still reads.
            self.stream.wait_stream(torch.cuda.default_stream(self.device))
            tensor.copy_(host, non_blocking=True)
        self.stream.synchronize()
        return tensor


class Nccl(HostStaged):
    """Carries CUDA tensors by nccl, on a 2-rank group and a stream of its own."""

    def __init__(self, device: torch.device, group: dist.ProcessGroup, peer: int) -> None:
        super().__init__(device)
        self._group, self._peer = group, peer

    def warm_up(self, sends: bool) -> None:
        if sends:
            self._send(torch.zeros(1, device=self.device), self.mark())
        else:
            self._receive(TensorSpec(torch.float32, (1,), False, True))

    def send(self, end: socket.socket, tensor: Tensor, ready: Any) -> None:
        if tensor.device.type == "cuda":
            self._send(tensor, ready)
        else:
            super().send(end, tensor, ready)

    def receive(self, end: socket.socket, spec: TensorSpec) -> Tensor:
        return self._receive(spec) if spec.on_accelerator else super().receive(end, spec)

    def _send(self, tensor: Tensor, ready: Any) -> None:
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(ready)
            with _issue:
                work = dist.isend(tensor.contiguous(), self._peer, group=self._group)
            self._finish(work)

    def _receive(self, spec: TensorSpec) -> Tensor:
        tensor = torch.empty(spec.shape, dtype=spec.dtype, device=self.device)
        with torch.cuda.stream(self.stream):
            self.stream.wait_stream(torch.cuda.default_stream(self.device))
            with _issue:
                work = dist.irecv(tensor, self._peer, group=self._group)
            self._finish(work)
        return tensor

    def _finish(self, work: dist.Work | None) -> None:
        if work is not None:
            work.wait()
        self.stream.synchronize()
