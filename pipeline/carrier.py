"""How one tensor gets from one process to another: straight, through host memory, or by nccl."""

import threading
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .message import TensorSpec

__all__ = ["Carrier", "HostStaged", "Nccl"]

_issue = threading.Lock()
"""nccl calls of a process are issued one at a time."""


class Carrier:
    """Carries tensors of the CPU over a 2-rank gloo group.

    gloo sends bytes: every dtype travels, and a send returns once the receiver has taken it.
    """

    def __init__(self, device: torch.device, group: dist.ProcessGroup) -> None:
        self.device, self.group = device, group

    def warm_up(self, peer: int, sends: bool) -> None:
        """Send one number, so that the first message finds an open connection."""
        self._transfer(torch.zeros(1, dtype=torch.int64), peer, sends)

    def _transfer(self, tensor: Tensor, peer: int, sends: bool) -> None:
        (self.send_host if sends else self.receive_host)(tensor, peer)

    def close(self) -> None:
        """End the group."""
        dist.destroy_process_group(self.group)

    def mark(self) -> Any:
        """Note the moment at which a message's tensors are complete."""
        return None

    def send_host(self, tensor: Tensor, peer: int) -> None:
        """Send a tensor of the CPU; the calling thread waits."""
        flat = tensor.contiguous().view(-1)
        dist.send(flat.view(torch.uint8), peer, group=self.group)

    def receive_host(self, tensor: Tensor, peer: int) -> None:
        """Receive into a contiguous tensor of the CPU; the calling thread waits."""
        dist.recv(tensor.view(-1).view(torch.uint8), peer, group=self.group)

    def send(self, tensor: Tensor, peer: int, ready: Any) -> None:
        """Send a tensor once it is complete; the calling thread waits until it is gone."""
        self.send_host(tensor, peer)

    def receive(self, spec: TensorSpec, peer: int) -> Tensor:
        """Receive a tensor; it is complete on return."""
        tensor = torch.empty(spec.shape, dtype=spec.dtype)
        self.receive_host(tensor, peer)
        return tensor


class HostStaged(Carrier):
    """Carries CUDA tensors through pinned host memory: gloo cannot, nccl wants a GPU each."""

    def __init__(self, device: torch.device, group: dist.ProcessGroup) -> None:
        super().__init__(device, group)
        self.stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def mark(self) -> Any:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def send(self, tensor: Tensor, peer: int, ready: Any) -> None:
        if tensor.device.type == "cuda":
            with torch.cuda.stream(self.stream):
                self.stream.wait_event(ready)
                host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                host.copy_(tensor, non_blocking=True)
            self.stream.synchronize()
            tensor = host
        self.send_host(tensor, peer)

    def receive(self, spec: TensorSpec, peer: int) -> Tensor:
        if not spec.on_accelerator:
            return super().receive(spec, peer)
        host = torch.empty(spec.shape, dtype=spec.dtype, pin_memory=True)
        self.receive_host(host, peer)
        tensor = torch.empty(spec.shape, dtype=spec.dtype, device=self.device)
        with torch.cuda.stream(self.stream):
            # The caching allocator may hand out memory that the default stream still reads.
            self.stream.wait_stream(torch.cuda.default_stream(self.device))
            tensor.copy_(host, non_blocking=True)
        self.stream.synchronize()
        return tensor


class Nccl(HostStaged):
    """Carries CUDA tensors by nccl, on a group and a stream of its own; headers go by gloo."""

    def __init__(
        self, device: torch.device, group: dist.ProcessGroup, tensors: dist.ProcessGroup
    ) -> None:
        super().__init__(device, group)
        self.tensors = tensors

    def warm_up(self, peer: int, sends: bool) -> None:
        super().warm_up(peer, sends)
        if sends:
            self.send(torch.zeros(1, device=self.device), peer, self.mark())
        else:
            self.receive(TensorSpec(torch.float32, (1,), False, True), peer)

    def send(self, tensor: Tensor, peer: int, ready: Any) -> None:
        if tensor.device.type != "cuda":
            return self.send_host(tensor, peer)
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(ready)
            with _issue:
                work = dist.isend(tensor.contiguous(), peer, group=self.tensors)
            self._finish(work)

    def receive(self, spec: TensorSpec, peer: int) -> Tensor:
        if not spec.on_accelerator:
            return Carrier.receive(self, spec, peer)
        tensor = torch.empty(spec.shape, dtype=spec.dtype, device=self.device)
        with torch.cuda.stream(self.stream):
            self.stream.wait_stream(torch.cuda.default_stream(self.device))
            with _issue:
                work = dist.irecv(tensor, peer, group=self.tensors)
            self._finish(work)
        return tensor

    def _finish(self, work: dist.Work | None) -> None:
        if work is not None:
            work.wait()
        self.stream.synchronize()
