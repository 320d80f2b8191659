"""What every system trains: the same network, mini-batches, loss, optimizer and precision."""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from headrace.models import EmulatedLayer
from headrace.pipeline import Link
from headrace.pipeline.feed import read
from headrace.pipeline.measure import measure
from headrace.pipeline.microbatch import samples as count_samples
from headrace.pipeline.microbatch import split
from headrace.pipeline.partition import LayerCost, Partition, partition
from headrace.pipeline.settings import autocasting, make_optimizers
from headrace.pipeline.world import choose_device, meet

from ..assemble import make_loader, make_loss, make_model, make_settings
from ..components import build
from ..config import Config

__all__ = ["Batch", "Workload"]

Batch = tuple[Any, Any]


@dataclass(frozen=True)
class Workload:
    """A configuration's training, on this rank.

    Args:
        batches: full mini-batches in memory, the same on every rank: loading is not measured.
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
    def load(cls, config: Config, count: int, link: Link | None) -> "Workload":
        """Meet the other ranks, and read the first `count` mini-batches, over and over if need be.

        Raises:
            ValueError: not started by torchrun, or the data gives no full mini-batch.
        """
        world = meet()
        if world is None:
            raise ValueError(
                "throughput compares systems over several processes: start it with torchrun "
                "--nproc-per-node N -m headrace.launch.throughput --config FILE"
            )
        data = config.data
        full = replace(config, data=replace(data, drop_last=True, workers=0))
        loader = make_loader(full, "data.train", data.train)
        batches = list(itertools.islice(read(loader, pairs_only=True), count))
        cycled = list(itertools.islice(itertools.cycle(batches), count))
        device, shared = choose_device(config.pipeline.device, world)
        return cls(config, cycled, world.rank, world.size, device, shared, link)

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
        """Every rank's value, in order, on every rank."""
        values: list[Any] = [None] * self.ranks
        dist.all_gather_object(values, value)
        return values

    # Costs -------------------------------------------------------------------------------------

    def measure(self, samples: int) -> tuple[LayerCost, ...]:
        """Each layer's cost for so many samples of a mini-batch, the mean over ranks.

        All ranks measure at once, so that they get in each other's way as they do in training.
        """
        inputs, target = cast(Batch, split(self.batches[0], max(1, self.samples // samples))[0])
        settings, seed = make_settings(self.config), self.config.seed
        self.barrier()
        costs = measure(self.model(), inputs, target, settings, self.device, seed)
        # Twice: who comes late to the first time finds the others gone.
        self.barrier()
        costs = measure(self.model(), inputs, target, settings, self.device, seed)
        times = torch.tensor([[c.forward, c.backward, c.update] for c in costs]).double()
        dist.all_reduce(times)
        return tuple(
            replace(cost, forward=f, backward=b, update=u)
            for cost, (f, b, u) in zip(costs, (times / self.ranks).tolist(), strict=True)
        )

    def cut(self, layers: Iterable[LayerCost], stages: int | None = None) -> Partition:
        """As the configuration's balance says; for another number of stages, by time."""
        balance = self.config.pipeline.balance if stages is None else "time"
        return partition(self.model(), stages or self.ranks, balance, tuple(layers))

    def count_samples(self, batch: Batch) -> int:
        """The samples of a mini-batch."""
        return count_samples(batch[0])
