"""From a pipeline's choices to its parts: how the model is cut, and the stages that come of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from .channel import Links, connect_locally
from .driver import Serving
from .engine import Engine
from .feed import Source
from .grid import Grid
from .layers import Layers, materialise
from .link import Link
from .measure import measure
from .microbatch import split
from .nest import Nest
from .partition import Balance, Partition, count, partition
from .random_state import RandomState
from .replicas import Replicas
from .replicas.replicas import Meeting
from .rules import Rule
from .schedule import Schedule
from .settings import Settings
from .stage import Stage
from .transport import connect
from .watch import Watch

__all__ = ["Blueprint"]

MINI_BATCH = 1 << 40
"""More micro-batches than a mini-batch has: all of them."""


@dataclass(frozen=True)
class Blueprint:
    """What a pipeline is to be; `Pipeline` says what each means, and has checked it.

    Args:
        watch: None where all stages are in this process.
        rules, depths: of each stage.
    """

    model: nn.Sequential
    grid: Grid
    watch: Watch | None
    replicas: Replicas | None
    schedule: Schedule
    rules: Sequence[Rule]
    depths: tuple[int, ...]
    settings: Settings
    device: torch.device
    seed: int
    micro_batches: int
    emulated_link: Link | None

    @property
    def kinds(self) -> dict[str, Any]:
        """What has a state of its own: a checkpoint's must be of the same, or it begins anew."""
        replicas = None if self.replicas is None else type(self.replicas).__name__
        corrections = [each.kind for each in self.settings.corrections]
        rules = [rule.kind for rule in self.rules]
        return {"rules": rules, "corrections": corrections, "replicas": replicas}

    @property
    def serves(self) -> bool:
        """Whether servers of this job have a state of their own."""
        return self.replicas is not None and self.replicas.has_servers

    # The cut -----------------------------------------------------------------------------------

    def cut(self, balance: Balance) -> Partition:
        """Cut by what needs no measuring.

        Raises:
            ValueError: it cannot be, or those in other jobs with whom weights are shared are cut
                otherwise.
        """
        sizes = [len(self.model)] if self.grid.stages == 1 else balance
        own = partition(self.model, self.grid.stages, sizes, count(self.model))
        agreed = self.replicas.agree(own) if self.replicas and self.grid.rank == 0 else None
        if agreed is not None and agreed.sizes != own.sizes:
            raise ValueError(
                f"balance: this pipeline is cut into {own.sizes} layers, those that it shares its "
                f"weights with into {agreed.sizes}: write balance={list(agreed.sizes)}"
            )
        return own

    def cut_by_time(self, batch: tuple[Nest, Nest] | None) -> Partition:
        """The first rank measures on the first micro-batch; all ranks cut alike.

        Args:
            batch: its first mini-batch; None on the other ranks.
        """
        if batch is None:
            assert self.watch is not None
            return Partition.from_json(self.watch.learn("partition"))
        # Those in other jobs with whom weights are shared may have measured already.
        known = self.replicas.agree(None) if self.replicas else None
        result = known or self._measure(batch)
        result = (self.replicas.agree(result) if self.replicas else None) or result
        if self.watch is not None:
            self.watch.share("partition", result.to_json())
        return result

    def _measure(self, batch: tuple[Nest, Nest]) -> Partition:
        x, target = cast(tuple[Nest, Nest], split(batch, self.micro_batches)[0])
        costs = measure(self.model, x, target, self.settings, self.device, self.seed)
        return partition(self.model, self.grid.stages, "time", costs)

    # The parts ---------------------------------------------------------------------------------

    def connect(self, shares_device: bool) -> list[Links]:
        """The channels of this process's stages.

        Args:
            shares_device: several processes use one device.
        """
        directly = self.rules[-1].synthesizes_inputs and self.grid.stages > 1
        if self.watch is None:
            return connect_locally(self.grid.stages, directly)
        self.watch.await_all()
        links = connect(
            self.grid,
            self.device,
            shares_device,
            self.watch.bell,
            self.watch.lost,
            self.emulated_link,
            directly,
            rings=self.replicas is not None and self.replicas.connects,
        )
        return [links]

    def build(self, cut: Partition, links: Sequence[Links], source: Source) -> list[Engine]:
        """The engines of this process's stages.

        Args:
            source: the first stage's upstream.
        """
        mine = range(self.grid.stages) if self.watch is None else [self.grid.stage]
        engines = []
        for j, own in zip(mine, links, strict=True):
            if j == 0:
                own.from_upstream = source
            stage = self._make_stage(cut, j)
            engines.append(Engine(stage, self.schedule, self.depths, own))
        return engines

    def serve(self, cut: Partition) -> Serving:
        """Serve a stage's weights in this process, which has no stage."""
        assert self.watch is not None and self.replicas is not None
        layers = self._make_layers(cut, self.grid.stage)
        return Serving(self.replicas.serve(self._meeting(layers)), self.watch)

    def _make_layers(self, cut: Partition, index: int) -> Layers:
        layers = [(cost.name, self.model.get_submodule(cost.name)) for cost in cut.stages[index]]
        for name, layer in layers:
            materialise(name, layer, self.seed, self.device)
        return Layers(layers).to(self.device)

    def _make_stage(self, cut: Partition, index: int) -> Stage:
        layers, settings, peers = self._make_layers(cut, index), self.settings, None
        if self.replicas is not None:
            peers = self.replicas.join(self._meeting(layers))
            settings = self.replicas.settings(settings)
        # The global state is a plain loop's. Where loaders of several replicas must draw the same
        # order from it, layers leave it alone.
        replica, replicas = self.grid.share
        seat = replica * self.grid.stages + index
        lone = seat == 0 and replicas == 1
        random = None if lone else RandomState.derive(self.seed, seat, self.device)
        return Stage(
            index,
            self.grid.stages,
            self.depths[index],
            layers,
            self.rules[index],
            settings,
            self.device,
            random,
            self._ahead(index),
            self.seed,
            peers,
        )

    def _meeting(self, layers: Layers) -> Meeting:
        assert self.watch is not None
        return Meeting(self.grid, layers, self.settings, self.watch, self.emulated_link)

    def _ahead(self, index: int) -> int | None:
        """Micro-batches sent on at most of which nothing has come back yet, where a stage does not
        wait: its rule's, and those that the next stage has in flight before it sends anything back.
        """
        rule, last = self.rules[index], index == self.grid.stages - 1
        if rule.ahead is None or self.grid.stages == 1 or (last and not rule.synthesizes_inputs):
            return None
        if self.schedule.unbounded:
            return MINI_BATCH
        return rule.ahead + (0 if last else self.depths[index + 1])
