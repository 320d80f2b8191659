"""A plain torch loop: on one device, and on each at once, which is the ceiling for any pipeline."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from headrace.pipeline.nest import to_device
from headrace.pipeline.partition import Partition

from ..workload import Batch, Workload
from .system import System

__all__ = ["Ceiling", "Loop", "OneDevice"]


class Loop:
    """Forward, backward, clip, step: as a torch user writes it."""

    def __init__(
        self, work: Workload, model: nn.Module, loss: Callable[[Any, Any], Tensor]
    ) -> None:
        self.work, self.model, self.loss = work, model, loss
        self.optimizers = work.optimizers(model)

    def step(self, batch: Batch) -> None:
        """Train on one mini-batch."""
        x, target = (to_device(part, self.work.device) for part in batch)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        with self.work.autocast():
            loss = self.loss(self.model(x), target)
        torch.autograd.backward(loss)
        if (limit := self.work.config.pipeline.clip_grad_norm) is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        for optimizer in self.optimizers:
            optimizer.step()


class OneDevice(System):
    """The first rank trains the whole network; the others wait, and use no processor."""

    def build(self, work: Workload, cut: Partition, micro_batches: int) -> None:
        self._works = self.works(work)
        self._emulated = work.is_emulated
        self._loop = Loop(work, work.model().to(work.device), work.loss()) if self._works else None

    def works(self, work: Workload) -> bool:
        """Whether this rank does."""
        return work.rank == 0

    def steps(self, count: int) -> int:
        # Emulated devices lie idle here: fewer steps of the same length tell as much.
        return max(5, count // 4) if self._emulated else count

    def train(self, batches: list[Batch]) -> None:
        if self._loop is not None:
            for batch in batches:
                self._loop.step(batch)

    def close(self) -> None:
        self._loop = None


class Ceiling(OneDevice):
    """Every rank trains a copy of its own, all at once: no pipeline can do more."""

    def works(self, work: Workload) -> bool:
        return True

    def rate(self, work: Workload, samples: int, seconds: float) -> float:
        total = torch.tensor(samples / seconds, dtype=torch.float64)
        dist.all_reduce(total)
        return float(total)
