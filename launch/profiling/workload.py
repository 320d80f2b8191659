"""What every system trains: the same network, mini-batches, loss, optimizer and precision."""

import itertools
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from headrace.models import EmulatedLayer
from headrace.pipeline import Link
from headrace.pipeline.feed import read
from headrace.pipeline.microbatch import samples as count_samples
from headrace.pipeline.partition import LayerCost, Partition, partition
from headrace.pipeline.settings import autocasting, make_optimizers
from headrace.pipeline.world import choose_device, meet

from ..assemble import make_loader, make_loss, make_model
from ..components import build
from ..config import Config

__all__ = ["Batch", "Workload"]

Batch = tuple[Any, Any]

DISTINCT = 20
"""Mini-batches that are read; more are these again."""

ENGINE = 3e-4
"""Seconds a mini-batch at least, whatever the layers."""


@dataclass(frozen=True)
class Workload:
    """A configuration's training, on this rank.

    Args:
        batches: full mini-batches in memory, the same on every rank: loading is not measured. As
            many as one measurement takes.
        rank, ranks: this process, of how many.
        device: this rank's. shared: several ranks use it.
        link: emulated on every hop of Headrace's own transport; None leaves it as it is.
    """

    config: Config
    batches: list[Batch]
    rank: int
    ranks: int
    device: torch.device
    shared: bool
    link: Link | None = None

    @classmethod
    def load(cls, config: Config, link: Link | None) -> "Workload":
        """Meet the other ranks, and read the first mini-batches.

        Raises:
            ValueError: the data gives no full mini-batch.
        """
        world = meet()
        assert world is not None, "the command has refused to run without torchrun"
        data = config.data
        full = replace(config, data=replace(data, drop_last=True, workers=0))
        loader = make_loader(full, "data.train", data.train)
        batches = list(itertools.islice(read(loader, pairs_only=True), DISTINCT))
        device, shared = choose_device(config.pipeline.device, world)
        return cls(config, batches, world.rank, world.size, device, shared, link)

    def of_steps(self, count: int) -> "Workload":
        """The same with so many mini-batches, over and over if need be."""
        cycled = itertools.islice(itertools.cycle(self.batches), count)
        return replace(self, batches=list(cycled))

    def steps_of_a_second(self, cut: Partition) -> int:
        """Mini-batches of about a second in a pipeline, 20 at least; the same on all ranks."""
        return max(20, math.ceil(1 / (max(cut.costs) + ENGINE)))

    # What it consists of -----------------------------------------------------------------------

    @property
    def samples(self) -> int:
        """In a mini-batch."""
        return self.config.data.batch_size

    @cached_property
    def is_emulated(self) -> bool:
        """Whether the network only pretends to work, or a link to be slow."""
        with torch.device("meta"):
            model = make_model(self.config)
        return self.link is not None or any(isinstance(m, EmulatedLayer) for m in model.modules())

    def model(self) -> nn.Sequential:
        """The whole network, its first weights the same on every rank."""
        return make_model(self.config)

    def loss(self) -> Callable[[Any, Any], Tensor]:
        """The loss, on this rank's device."""
        loss = make_loss(self.config)
        return loss.to(self.device) if isinstance(loss, nn.Module) else loss

    def optimizers(self, module: nn.Module) -> list[Optimizer]:
        """The configuration's optimizers of a module's weights."""
        parameters = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        return make_optimizers(build("optimizer", self.config.optimizer), parameters)

    def autocast(self) -> Any:
        """The configuration's precision."""
        name = self.config.pipeline.autocast
        return autocasting(getattr(torch, name) if name else None, self.device)

    # Between ranks -----------------------------------------------------------------------------

    def barrier(self) -> None:
        """Wait for all ranks, and for this rank's device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        dist.barrier()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, of what JSON can hold, in order, on every rank.

        torch's own gathering of objects would run what it is sent (it pickles).
        """
        text = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.ranks)]
        dist.all_gather(sizes, torch.tensor([len(text)]))
        most = max(int(size) for size in sizes)
        texts = [torch.zeros(most, dtype=torch.uint8) for _ in range(self.ranks)]
        dist.all_gather(texts, torch.cat([text, text.new_zeros(most - len(text))]))
        pairs = zip(texts, sizes, strict=True)
        return [json.loads(bytes(each[: int(size)].tolist())) for each, size in pairs]

    def cut(self, layers: Iterable[LayerCost]) -> Partition:
        """As the configuration's balance says."""
        return partition(self.model(), self.ranks, self.config.pipeline.balance, tuple(layers))

    def count_samples(self, batch: Batch) -> int:
        """The samples of a mini-batch."""
        return count_samples(batch[0])
