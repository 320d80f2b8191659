"""Learners and parameter servers in one process: the real shards, and time that is drawn.

What a learner does is what `Downpour` does: it computes a mini-batch, pushes the gradient, asks for
the weights, and goes on when it has them. Time is a heap of events, so a run is the same again with
the same seed, and which gradient meets which weights depends on the times alone.
"""

import heapq
import random
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from headrace.pipeline.replicas.shard import Shard
from headrace.pipeline.settings import OptimizerFactory, make_optimizers

__all__ = ["Times", "simulate"]


@dataclass(frozen=True)
class Times:
    """How long everything takes; the unit is an ordinary learner's mean time for a mini-batch.

    Args:
        spread: the standard deviation of a mini-batch's time over its mean, gamma-distributed and
            drawn anew each time; 0: always the mean.
        latency: a message's mean time to or from a shard, exponential and drawn anew for each
            message and shard; 0: none. Messages do not overtake each other on their way between a
            learner and a shard, so a fetch comes after the learner's own pushes.
        paces: each learner's mean time for a mini-batch; () is 1 for all.
        seed: of what is drawn.
    """

    spread: float = 0.2
    latency: float = 0.0
    paces: Sequence[float] = ()
    seed: int = 0


@dataclass
class _Learner:
    """One that computes gradients.

    Args:
        weights, versions: what it computes with, by name; and by shard, its count of updates then.
        asked, answers: by shard, fetches whose answers it has not taken in; answers that are here.
        arrivals: when the last message to, and from, each shard arrives.
        sums, samples, used: what it has not pushed yet; the versions by shard, one list each.
    """

    number: int
    versions: list[int]
    asked: list[int]
    answers: list[deque[tuple[int, dict[str, Tensor]]]]
    arrivals: tuple[list[float], list[float]]
    used: list[list[int]]
    weights: dict[str, Tensor] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)
    samples: int = 0
    updates: int = 0
    began: bool = False
    busy: bool = False
    own: dict[str, nn.Parameter] = field(default_factory=dict)
    optimizers: list[torch.optim.Optimizer] = field(default_factory=list)


def simulate(
    model: nn.Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    shards: Sequence[Shard],
    learners: int,
    times: Times | None = None,
    *,
    n_fetch: int = 1,
    n_push: int = 1,
    prefetch: int = 0,
    optimizer: OptimizerFactory | None = None,
) -> Counter[int]:
    """Train until the mini-batches are used up; whoever begins one takes the next.

    Args:
        model: only to compute with; holds the shards' weights in the end. It has no buffers.
        shards: each with some of the model's weights, for replicas 0 to learners - 1.
        n_fetch, n_push, prefetch: as in `Downpour`.
        optimizer: moves a learner's own copy where n_fetch > 1.

    Returns:
        How many gradients had which staleness, over all shards: each gradient counts once in each.

    Raises:
        ValueError: the shards do not share out the model's weights, no optimizer for n_fetch > 1.
        RuntimeError: learners that wait for each other for ever.
    """
    names = [name for name, weight in model.named_parameters() if weight.requires_grad]
    served = [name for shard in shards for name in shard.names]
    if sorted(names) != sorted(served):
        raise ValueError(f"shards: they have the weights {served}, the model has {names}")
    if n_fetch > 1 and optimizer is None:
        raise ValueError(f"n_fetch={n_fetch}: give the optimizer that moves the learners' copies")
    every = _Simulation(model, loss_fn, batches, shards, learners, times or Times())
    every.n_fetch, every.n_push, every.prefetch, every.optimizer = (
        n_fetch, n_push, prefetch, optimizer,
    )  # fmt: skip
    every.run()
    return sum((shard.staleness for shard in shards), Counter())


class _Simulation:
    n_fetch = n_push = 1
    prefetch = 0
    optimizer: OptimizerFactory | None = None

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Tensor, Tensor], Tensor],
        batches: Iterable[tuple[Tensor, Tensor]],
        shards: Sequence[Shard],
        learners: int,
        times: Times,
    ) -> None:
        self._model, self._loss_fn, self._batches = model, loss_fn, iter(batches)
        self._parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._shards, self._times, self._draws = shards, times, random.Random(times.seed)
        many = range(len(shards))
        self._learners = [
            _Learner(
                number,
                versions=[0 for _ in many],
                asked=[0 for _ in many],
                answers=[deque() for _ in many],
                arrivals=([0.0 for _ in many], [0.0 for _ in many]),
                used=[[] for _ in many],
            )
            for number in range(learners)
        ]
        self._now, self._order = 0.0, 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._left = 0

    def run(self) -> None:
        for learner in self._learners:
            self._fetch(learner)
        while self._events:
            self._now, _, happen = heapq.heappop(self._events)
            happen()
        if self._left < len(self._learners):
            raise RuntimeError(f"{len(self._learners) - self._left} learners wait for ever")
        for shard in self._shards:
            shard.finish()
            self._set(shard.snapshot())

    def _at(self, time: float, happen: Callable[[], None]) -> None:
        """Of events at the same time, the one that was planned first comes first."""
        self._order += 1
        heapq.heappush(self._events, (time, self._order, happen))

    # A learner ---------------------------------------------------------------------------------

    def _go_on(self, learner: _Learner) -> None:
        """Begin the next mini-batch, if it has the weights it waits for and there is one."""
        if learner.busy or not self._heard(learner):
            return
        learner.began = learner.busy = True
        batch = next(self._batches, None)
        if batch is not None:
            self._at(self._now + self._duration(learner), partial(self._done, learner, *batch))
            return
        self._push(learner)
        self._left += 1
        for k, shard in enumerate(self._shards):
            self._send(learner, k, partial(shard.leave, learner.number))

    def _heard(self, learner: _Learner) -> bool:
        """Take in the oldest answers, until no more are open than may be."""
        may_be = self.prefetch if learner.began else 0
        for k, answers in enumerate(learner.answers):
            while learner.asked[k] > may_be and answers:
                learner.asked[k] -= 1
                learner.versions[k], weights = answers.popleft()
                learner.weights.update(weights)
                if self.n_fetch > 1:
                    self._load_own(learner, weights)
        return max(learner.asked) <= may_be

    def _load_own(self, learner: _Learner, weights: dict[str, Tensor]) -> None:
        for name, weight in weights.items():
            if name in learner.own:
                learner.own[name].data.copy_(weight)
            else:
                learner.own[name] = nn.Parameter(weight.clone())
            learner.weights[name] = learner.own[name].data

    def _done(self, learner: _Learner, inputs: Tensor, targets: Tensor) -> None:
        """A mini-batch is computed."""
        self._set(learner.weights)
        loss = self._loss_fn(self._model(inputs), targets)
        gradients = torch.autograd.grad(loss, list(self._parameters.values()))
        for name, gradient in zip(self._parameters, gradients, strict=True):
            held = learner.sums.get(name)
            learner.sums[name] = gradient if held is None else held + gradient
        learner.samples += len(inputs)
        for used, version in zip(learner.used, learner.versions, strict=True):
            used.append(version)
        if self.n_fetch > 1:
            self._step(learner, dict(zip(self._parameters, gradients, strict=True)))
        learner.updates += 1
        if learner.updates % self.n_push == 0:
            self._push(learner)
        if learner.updates % self.n_fetch == 0:
            self._fetch(learner)
        learner.busy = False
        self._go_on(learner)

    def _step(self, learner: _Learner, gradients: dict[str, Tensor]) -> None:
        if not learner.optimizers and self.optimizer is not None:
            learner.optimizers = make_optimizers(self.optimizer, list(learner.own.items()))
        for name, parameter in learner.own.items():
            parameter.grad = gradients[name].clone()  # the other is on its way to a shard
        for optimizer in learner.optimizers:
            optimizer.step()

    def _push(self, learner: _Learner) -> None:
        if not learner.samples:
            return
        for k, shard in enumerate(self._shards):
            gradients = {name: learner.sums[name] for name in shard.names}
            arguments = learner.number, gradients, learner.samples, learner.used[k]
            self._send(learner, k, partial(shard.take, *arguments))
            learner.used[k] = []
        learner.sums, learner.samples = {}, 0

    def _fetch(self, learner: _Learner) -> None:
        for k, shard in enumerate(self._shards):
            learner.asked[k] += 1
            self._send(learner, k, partial(shard.fetch, learner.number))

    # Messages ----------------------------------------------------------------------------------

    def _send(self, learner: _Learner, k: int, act: Callable[[], None]) -> None:
        """To shard k; when it has acted, it answers those who may be answered."""

        def arrive() -> None:
            act()
            shard = self._shards[k]
            for number in shard.answers():
                self._answer(self._learners[number], k, shard.version, shard.give(number))

        self._at(self._arrival(learner.arrivals[0], k), arrive)

    def _answer(self, learner: _Learner, k: int, version: int, weights: dict[str, Tensor]) -> None:
        def arrive() -> None:
            learner.answers[k].append((version, weights))
            self._go_on(learner)

        self._at(self._arrival(learner.arrivals[1], k), arrive)

    def _arrival(self, last: list[float], k: int) -> float:
        mean = self._times.latency
        late = self._draws.expovariate(1 / mean) if mean else 0.0
        last[k] = max(last[k], self._now + late)
        return last[k]

    def _duration(self, learner: _Learner) -> float:
        times = self._times
        mean = times.paces[learner.number] if times.paces else 1.0
        if not times.spread:
            return mean
        shape = times.spread**-2
        return mean * self._draws.gammavariate(shape, 1 / shape)

    def _set(self, weights: dict[str, Tensor]) -> None:
        """Let the model compute with these tensors, which nobody changes while it does."""
        for name, weight in weights.items():
            self._parameters[name].data = weight
