"""Predict the time of a mini-batch, by playing a schedule with given costs: nothing is run.

All stages are played at once, a tick after the other. In tick k every stage runs micro-batch k
forward, and micro-batch k - d backward, d being its depth. What a backward waits for was sent in
an earlier tick, and the forwards of one tick hang together by a recurrence of maxima and sums,
which is one cumulative maximum over the stages: a thousand stages take little longer than two.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .link import Link
from .schedule import Schedule

__all__ = ["StageWork", "data_parallel_period", "period"]

BUCKET = 25 * 2**20
"""Bytes of gradients that DistributedDataParallel sends at once, by default."""


@dataclass(frozen=True)
class StageWork:
    """What one stage does for one micro-batch.

    Args:
        forward, backward: seconds. update: seconds, of one update.
        activation_bytes, gradient_bytes: sent to the next stage, and to the one before.
    """

    forward: float
    backward: float
    update: float = 0.0
    activation_bytes: float = 0.0
    gradient_bytes: float = 0.0

    @property
    def total(self) -> float:
        """Seconds for one micro-batch with an update."""
        return self.forward + self.backward + self.update


def period(
    schedule: Schedule,
    stages: Sequence[StageWork],
    links: Sequence[Link],
    slack: Sequence[int] | int = 0,
    micro_batches: int = 1,
    update_every: int = 1,
) -> float:
    """Seconds from one mini-batch to the next in the steady state.

    A forward waits for the message of the stage before, a backward for that of the stage after.
    The messages of one direction follow each other on their link; sending costs a stage nothing.

    Args:
        stages: what each does for one micro-batch.
        links: of each hop, the same in both directions.
        slack: of each hop; the stream's alone.
        micro_batches: of one mini-batch.
        update_every: micro-batches (stream) or mini-batches (others) to an update.
    """
    depths = schedule.depths(len(stages), slack)
    play = _Play(stages, links, depths)
    if not schedule.flushes:
        return micro_batches * _stream(play, update_every)
    ends = [0.0]
    for k in range(2 * update_every + 1):
        updates = (k + 1) % update_every == 0
        (_gpipe if schedule.unbounded else _one_f_one_b)(play, micro_batches)
        play.clock = play.clock + play.update * updates
        ends.append(float(play.clock[0]))
    return (ends[-1] - ends[-1 - update_every]) / update_every


class _Play:
    """Where every stage and link is, in seconds: one tick moves all of them."""

    def __init__(
        self, stages: Sequence[StageWork], links: Sequence[Link], depths: Sequence[int]
    ) -> None:
        def row(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float64)

        self.forward_time = row([s.forward for s in stages])
        self.backward_time = row([s.backward for s in stages])
        self.update = row([s.update for s in stages])
        self.latency = row([link.latency for link in links])
        down = [link.occupied(s.activation_bytes) for s, link in zip(stages, links, strict=False)]
        up = [link.occupied(s.gradient_bytes) for s, link in zip(stages[1:], links, strict=True)]
        self.occupied_down, self.occupied_up = row(down), row(up)
        self.depths = torch.tensor(depths)
        self.ahead = self.depths[:-1] - self.depths[1:]
        self.clock = torch.zeros(len(stages), dtype=torch.float64)
        self.free_down = torch.zeros_like(self.latency)
        self.free_up = torch.zeros_like(self.latency)
        # What a stage's forward may be behind that of the stage before, summed from the first.
        step = self.occupied_down + self.latency + self.forward_time[1:]
        self.path = torch.cat([torch.zeros(1, dtype=torch.float64), step.cumsum(0)])
        back = self.occupied_up + self.latency + self.backward_time[:-1]
        self.path_back = torch.cat([back.flip(0).cumsum(0).flip(0), torch.zeros(1).double()])
        # When the gradient of each recent tick reached each stage but the last.
        ring = int(self.ahead.max()) + 1 if len(links) else 1
        self.arrived = torch.zeros(ring, len(links), dtype=torch.float64)
        self.hops = torch.arange(len(links))

    def forward(self) -> None:
        """All stages run a micro-batch forward: end_j = max(clock_j, arrival from j-1) + f_j."""
        alone = self.clock + self.forward_time
        if len(self.hops):
            link_bound = self.free_down + self.occupied_down + self.latency + self.forward_time[1:]
            alone[1:] = torch.maximum(alone[1:], link_bound)
            self.clock = (alone - self.path).cummax(0).values + self.path
            self.free_down = torch.maximum(self.clock[:-1], self.free_down) + self.occupied_down
        else:
            self.clock = alone

    def backward(self, tick: int, first: int, count: float) -> Tensor:
        """Stages run micro-batch tick - d backward where that is one of `count` from `first` on.

        Returns:
            Which micro-batch each stage ran; -1 where none.
        """
        index = tick - self.depths
        active = (index >= first) & (index < first + count)
        start = self.clock.clone()
        if len(self.hops):
            arrival = self.arrived[(tick - self.ahead) % len(self.arrived), self.hops]
            start[:-1] = torch.maximum(start[:-1], arrival)
        end = start + self.backward_time
        self.clock = torch.where(active, end, self.clock)
        if len(self.hops):
            sent = torch.maximum(end[1:], self.free_up) + self.occupied_up
            self.free_up = torch.where(active[1:], sent, self.free_up)
            self.arrived[tick % len(self.arrived)] = sent + self.latency
        return torch.where(active, index, -1)

    def backward_chain(self) -> None:
        """All stages run one micro-batch backward, each after the stage behind it."""
        alone = self.clock + self.backward_time
        if len(self.hops):
            link_bound = self.free_up + self.occupied_up + self.latency + self.backward_time[:-1]
            alone[:-1] = torch.maximum(alone[:-1], link_bound)
            relative = (alone - self.path_back).flip(0).cummax(0).values.flip(0)
            self.clock = relative + self.path_back
            self.free_up = torch.maximum(self.clock[1:], self.free_up) + self.occupied_up
        else:
            self.clock = alone


def _stream(play: _Play, update_every: int) -> float:
    """Seconds a micro-batch, once the start is forgotten."""
    deepest = int(play.depths[0])
    longest = (deepest + 1) * update_every
    ends = []
    for tick in range(6 * longest + 40):
        play.forward()
        index = play.backward(tick, 0, math.inf)
        play.clock = play.clock + play.update * ((index >= 0) & ((index + 1) % update_every == 0))
        ends.append(play.clock[0])
    return _steady(torch.stack(ends).tolist()[deepest:], longest, update_every)


def _one_f_one_b(play: _Play, micro_batches: int) -> None:
    for tick in range(micro_batches + int(play.depths[0])):
        if tick < micro_batches:
            play.forward()
        play.backward(tick, 0, micro_batches)


def _gpipe(play: _Play, micro_batches: int) -> None:
    for _ in range(micro_batches):
        play.forward()
    for _ in range(micro_batches):
        play.backward_chain()


def _steady(ends: Sequence[float], longest: int, least: int) -> float:
    """The mean step of a sequence that ends in a pattern: behind slow links they come in bursts."""
    steps = [b - a for a, b in pairwise(ends)]
    for length in range(least, longest + 1, least):
        pairs = zip(steps[-2 * longest :], steps[-2 * longest - length : -length], strict=True)
        if all(math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-12) for a, b in pairs):
            return sum(steps[-length:]) / length
    half = len(ends) // 2
    return (ends[-1] - ends[half]) / (len(ends) - 1 - half)


def data_parallel_period(
    whole: StageWork, parameter_bytes: float, ranks: int, link: Link, host: float = 0.0
) -> float:
    """Seconds of a mini-batch of which each rank trains a part, as DistributedDataParallel does.

    Gradients leave in buckets while the backward goes on (Li et al., "PyTorch Distributed", VLDB
    2020); each bucket is reduced by a ring, whose time for B bytes is 2(n-1)/n · B/bandwidth +
    2(n-1) · latency (Patarasuk and Yuan 2009).

    Args:
        whole: the whole network's work for one rank's part.
        link: between two neighbours of the ring.
        host: seconds a byte of gradients that reducing takes from the processor which also runs the
            layers; 0 where others do it.
    """
    buckets = max(1, math.ceil(parameter_bytes / BUCKET))
    size = parameter_bytes / buckets
    reduce = 2 * (ranks - 1) * (link.occupied(size) / ranks + link.latency)
    end = 0.0
    for k in range(1, buckets + 1):
        ready = whole.forward + whole.backward * k / buckets + host * size * k
        end = max(end, ready) + reduce
    return end + whole.update
