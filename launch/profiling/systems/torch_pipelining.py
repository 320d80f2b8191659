"""torch.distributed.pipelining's schedules, on the same network and cut."""

import time
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch.distributed.pipelining as torch_pipelining
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from headrace.pipeline.partition import Partition, cut

from ..workload import Batch, Workload
from .system import Facts, System

__all__ = ["Interleaved", "Straight", "ZeroBubble"]

_WORK = ("forward_one_chunk", "backward_one_chunk", "backward_weight_one_chunk")


class Straight(System):
    """A stage a rank: GPipe, 1F1B.

    Args:
        schedule: the name of torch's class.
    """

    cuts_mini_batches = True
    per_rank = 1
    """Stages on each rank."""

    def __init__(self, schedule: str) -> None:
        self._schedule_name = schedule

    def refuses(self, work: Workload, cut: Partition, micro_batches: int) -> str | None:
        x, target = work.batches[0]
        if not isinstance(x, Tensor) or not isinstance(target, Tensor):
            return "inputs and targets must be single tensors here"
        if work.link is not None:
            return "the emulated latency is in Headrace's transport only"
        if work.device.type == "cuda":
            return "its stages would need a group of the GPUs' own backend"
        if work.samples % micro_batches:
            return f"{work.samples} samples do not divide into {micro_batches} micro-batches"
        if micro_batches < work.ranks:
            return f"it needs {work.ranks} micro-batches at least"
        if len(cut.layers) < self.per_rank * work.ranks:
            return f"{len(cut.layers)} layers make no {self.per_rank * work.ranks} stages"
        return None

    def build(self, work: Workload, cut: Partition, micro_batches: int) -> None:
        stages = self.per_rank * work.ranks
        sizes = cut.sizes if self.per_rank == 1 else _finer(cut, stages)
        bounds = [0, *accumulate(sizes)]
        model = work.model()
        self._first, self._last = work.rank == 0, False
        self._stages, modules = [], []
        self._busy = 0.0
        for index in range(work.rank, stages, work.ranks):
            module = model[bounds[index] : bounds[index + 1]].to(work.device)
            modules.append(module)
            self._last = self._last or index == stages - 1
            stage = PipelineStage(_Joined(module), index, stages, work.device)
            for name in _WORK:
                setattr(stage, name, self._timed(getattr(stage, name)))
            self._stages.append(stage)
        self._optimizers = [o for module in modules for o in work.optimizers(module)]
        self._schedule = self._make_schedule(work, micro_batches)
        self._work = work

    def _make_schedule(self, work: Workload, micro_batches: int) -> Any:
        make = getattr(torch_pipelining, self._schedule_name)
        return make(self._stages[0], micro_batches, loss_fn=self._loss(work))

    def _loss(self, work: Workload) -> Callable[[Any, Any], Tensor]:
        loss = work.loss()

        def timed(output: Any, target: Any) -> Tensor:
            start = time.perf_counter()
            value = loss(output, target)
            self._busy += time.perf_counter() - start
            return value

        return timed

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self._busy += time.perf_counter() - start
            return result

        return timed

    def train(self, batches: list[Batch]) -> None:
        for x, target in batches:
            for optimizer in self._optimizers:
                optimizer.zero_grad()
            inputs = (x,) if self._first else ()
            with self._work.autocast():
                self._schedule.step(*inputs, target=target if self._last else None)
            start = time.perf_counter()
            for optimizer in self._optimizers:
                optimizer.step()
            self._busy += time.perf_counter() - start

    def begin(self) -> None:
        self._busy = 0.0

    def facts(self, seconds: float) -> Facts:
        busy = self._busy / seconds
        return Facts(busy, 1 - busy, 0.0)

    def close(self) -> None:
        del self._schedule, self._stages, self._optimizers


class _Joined(nn.Module):
    """torch hands the tensors of a tuple over one by one; our layers take it as it is."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, *x: Tensor) -> Any:
        return self.layers(x[0] if len(x) == 1 else x)


class Interleaved(Straight):
    """Two stages a rank: rank r has stages r and r + n."""

    per_rank = 2

    def refuses(self, work: Workload, cut: Partition, micro_batches: int) -> str | None:
        if micro_batches % work.ranks:
            return f"{micro_batches} micro-batches are not a multiple of {work.ranks} ranks"
        return super().refuses(work, cut, micro_batches)

    def _make_schedule(self, work: Workload, micro_batches: int) -> Any:
        make = getattr(torch_pipelining, self._schedule_name)
        return make(self._stages, micro_batches, loss_fn=self._loss(work))


class ZeroBubble(Interleaved):
    """The backward in two, of inputs and of weights, the latter filling what the former leaves."""


def _finer(coarse: Partition, stages: int) -> tuple[int, ...]:
    return cut([layer.total for layer in coarse.layers], stages)
