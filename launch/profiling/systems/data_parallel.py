"""DistributedDataParallel: every rank has the whole network, and a part of each mini-batch."""

import warnings
from typing import cast

from torch.nn.parallel import DistributedDataParallel

from headrace.pipeline.microbatch import split
from headrace.pipeline.partition import Partition

from ..workload import Batch, Workload
from .alone import Loop
from .system import Facts, System

__all__ = ["DataParallel"]


class DataParallel(System):
    """n ranks at the same global mini-batch."""

    def refuses(self, work: Workload, cut: Partition, micro_batches: int) -> str | None:
        if work.link is not None:
            return "the emulated latency is in Headrace's transport only"
        if work.samples < work.ranks:
            return f"{work.samples} samples give nothing to some of {work.ranks} ranks"
        return None

    def build(self, work: Workload, cut: Partition, micro_batches: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = DistributedDataParallel(work.model().to(work.device))
        self._loop, self._work = Loop(work, model, work.loss()), work

    def train(self, batches: list[Batch]) -> None:
        for batch in batches:
            mine = split(batch, self._work.ranks)[self._work.rank]
            self._loop.step(cast(Batch, mine))

    def facts(self, seconds: float) -> Facts:
        return Facts(staleness=0.0)

    def close(self) -> None:
        del self._loop
