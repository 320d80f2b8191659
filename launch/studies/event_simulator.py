"""Learners and their parameter servers in one process: the real shards, and times that are drawn.

A learner does what a replica does under `Downpour`: it computes a mini-batch, pushes the gradient,
asks for the weights, and goes on when it has them. What happens when is a heap of events, so a run
is the same again with the same seed, and which gradient meets which weights is up to the times.
"""

import heapq
import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from headrace.pipeline.replicas import Downpour
from headrace.pipeline.replicas.shard import Shard
from headrace.pipeline.settings import Settings, make_optimizers

__all__ = ["Times", "simulate"]


@dataclass(frozen=True)
class Times:
    """How long everything takes; the unit is an ordinary learner's mean time for a mini-batch.

    Args:
        spread: standard deviation of a mini-batch's time over its mean; gamma-distributed, drawn
            for each. 0: always the mean.
        latency: a message's mean time to a shard or from it; exponential, drawn for each. 0: none.
        paces: each learner's mean time for a mini-batch; () is 1 for all.
        seed: of what is drawn.

    Messages between a learner and a shard do not overtake each other.
    """

    spread: float = 0.2
    latency: float = 0.0
    paces: Sequence[float] = ()
    seed: int = 0


@dataclass
class _Answer:
    version: int
    weights: dict[str, Tensor]
    rates: list[float]


@dataclass(eq=False)
class _End:
    """A learner's side of one shard.

    Args:
        version, weights: what it computes with.
        asked, answers: fetches whose answers it has not taken in; the answers that are here.
        there, here: when the last message arrives at the shard, and at the learner.
        sums, used: what it has not pushed: gradients added up, and the version of each.
        own, optimizers: with n_fetch > 1, its copy of the weights and what moves it.
    """

    shard: Shard
    version: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)
    asked: int = 0
    answers: deque[_Answer] = field(default_factory=deque)
    there: float = 0.0
    here: float = 0.0
    sums: dict[str, Tensor] = field(default_factory=dict)
    used: list[int] = field(default_factory=list)
    own: dict[str, nn.Parameter] = field(default_factory=dict)
    optimizers: list[torch.optim.Optimizer] = field(default_factory=list)


@dataclass(eq=False)
class _Learner:
    number: int
    ends: list[_End]
    samples: int = 0
    updates: int = 0
    began: bool = False
    busy: bool = False
    done: bool = False


def simulate(
    model: nn.Module,
    settings: Settings,
    way: Downpour,
    learners: int,
    batches: Iterable[tuple[Tensor, Tensor]],
    times: Times | None = None,
    shares: Sequence[Sequence[str]] | None = None,
) -> list[Shard]:
    """Train until the mini-batches are used up; whoever begins one takes the next.

    Args:
        model: gives the weights to begin with and has the shards' in the end; no buffers.
        settings: of the shards; `optimizer` also moves the learners' copies where n_fetch > 1.
        way: the protocol, n_fetch, n_push and prefetch.
        shares: names of each shard's weights; None: all on one.

    Returns:
        The shards, with what they counted.

    Raises:
        ValueError: the shares are not all of the weights, each once.
        RuntimeError: learners that wait for each other for ever.
    """
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    shares = [list(weights)] if shares is None else shares
    if sorted(name for share in shares for name in share) != sorted(weights):
        raise ValueError(f"shares={shares!r}: give each of {', '.join(weights)} to one shard")
    protocol, numbers = way.protocol(learners), range(learners)
    shards = [
        Shard(k, {name: weights[name] for name in share}, settings, protocol, numbers)
        for k, share in enumerate(shares)
    ]
    _Simulation(model, settings, way, shards, learners, iter(batches), times or Times()).run()
    return shards


class _Simulation:
    def __init__(
        self,
        model: nn.Module,
        settings: Settings,
        way: Downpour,
        shards: list[Shard],
        learners: int,
        batches: Iterable[tuple[Tensor, Tensor]],
        times: Times,
    ) -> None:
        self._model, self._settings, self._way, self._shards = model, settings, way, shards
        self._batches, self._times = iter(batches), times
        self._parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._learners = [_Learner(r, [_End(shard) for shard in shards]) for r in range(learners)]
        self._draws, self._now, self._planned = random.Random(times.seed), 0.0, 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []

    def run(self) -> None:
        for learner in self._learners:
            self._fetch(learner)
        waiting = self._learners
        while waiting:
            while self._events:
                self._now, _, happen = heapq.heappop(self._events)
                happen()
            # Only now do those who are done leave: so nobody's last updates are of fewer gradients
            # than the protocol says, unless the others wait for more.
            done = [learner for learner in waiting if learner.done]
            waiting = [learner for learner in waiting if not learner.done]
            if not done:
                raise RuntimeError(f"{len(waiting)} learners wait for each other for ever")
            for learner in done:
                for end in learner.ends:
                    end.shard.leave(learner.number)
            for shard in self._shards:
                self._answer(shard)
        for shard in self._shards:
            shard.finish()
            self._hold(shard.snapshot())

    def _plan(self, time: float, happen: Callable[[], None]) -> None:
        """Of events at the same time, the one that was planned first comes first."""
        self._planned += 1
        heapq.heappush(self._events, (time, self._planned, happen))

    # A learner ---------------------------------------------------------------------------------

    def _go_on(self, learner: _Learner) -> None:
        """Begin a mini-batch, if it has the weights it waits for and there is one."""
        if learner.busy or learner.done or not self._heard(learner):
            return
        learner.began = True
        batch = next(self._batches, None)
        if batch is None:
            learner.done = True
            self._push(learner)
        else:
            learner.busy = True
            self._plan(self._now + self._duration(learner), partial(self._end, learner, *batch))

    def _heard(self, learner: _Learner) -> bool:
        """Take in the oldest answers, until no more are open than may be."""
        may_be = self._way.prefetch if learner.began else 0
        for end in learner.ends:
            while end.asked > may_be and end.answers:
                end.asked -= 1
                self._take_in(end, end.answers.popleft())
        return all(end.asked <= may_be for end in learner.ends)

    def _take_in(self, end: _End, answer: _Answer) -> None:
        end.version = answer.version
        if self._way.n_fetch == 1:
            end.weights = answer.weights
            return
        if not end.own:
            end.own = {n: nn.Parameter(w.clone()) for n, w in answer.weights.items()}
            end.weights = {name: own.data for name, own in end.own.items()}
            end.optimizers = make_optimizers(self._settings.optimizer, list(end.own.items()))
        for name, weight in answer.weights.items():
            end.weights[name].copy_(weight)
        groups = [group for optimizer in end.optimizers for group in optimizer.param_groups]
        for group, rate in zip(groups, answer.rates, strict=True):
            group["lr"] = rate

    def _end(self, learner: _Learner, inputs: Tensor, targets: Tensor) -> None:
        """A mini-batch's time is up."""
        for end in learner.ends:
            self._hold(end.weights)
        loss = self._settings.loss_fn(self._model(inputs), targets)
        gradients = torch.autograd.grad(loss, list(self._parameters.values()))
        by_name = dict(zip(self._parameters, gradients, strict=True))
        learner.samples += len(inputs)
        for end in learner.ends:
            end.used.append(end.version)
            for name in end.shard.names:
                held, gradient = end.sums.get(name), by_name[name]
                end.sums[name] = gradient if held is None else held + gradient
            self._step(end, by_name)
        learner.updates += 1
        if learner.updates % self._way.n_push == 0:
            self._push(learner)
        if learner.updates % self._way.n_fetch == 0:
            self._fetch(learner)
        learner.busy = False
        self._go_on(learner)

    def _step(self, end: _End, gradients: dict[str, Tensor]) -> None:
        """Move the learner's own copy, where it has one."""
        for name, own in end.own.items():
            own.grad = gradients[name].clone()  # the optimizer may keep it; the other is pushed
        for optimizer in end.optimizers:
            optimizer.step()

    def _push(self, learner: _Learner) -> None:
        if not learner.samples:
            return
        for end in learner.ends:
            pushed = (learner.number, end.sums, learner.samples, end.used)
            self._send(end, partial(end.shard.take, *pushed))
            end.sums, end.used = {}, []
        learner.samples = 0

    def _fetch(self, learner: _Learner) -> None:
        for end in learner.ends:
            end.asked += 1
            self._send(end, partial(end.shard.fetch, learner.number))

    # Messages ----------------------------------------------------------------------------------

    def _send(self, end: _End, act: Callable[[], None]) -> None:
        def arrive() -> None:
            act()
            self._answer(end.shard)

        end.there = max(end.there, self._now + self._latency())
        self._plan(end.there, arrive)

    def _answer(self, shard: Shard) -> None:
        """Let a shard answer whom it may."""
        for number in shard.answers():
            answer = _Answer(shard.version, shard.give(number), shard.learning_rates)
            learner = self._learners[number]
            end = learner.ends[shard.stage]
            end.here = max(end.here, self._now + self._latency())
            self._plan(end.here, partial(self._arrive, learner, end, answer))

    def _arrive(self, learner: _Learner, end: _End, answer: _Answer) -> None:
        end.answers.append(answer)
        self._go_on(learner)

    def _latency(self) -> float:
        mean = self._times.latency
        return self._draws.expovariate(1 / mean) if mean else 0.0

    def _duration(self, learner: _Learner) -> float:
        times = self._times
        mean = times.paces[learner.number] if times.paces else 1.0
        if not times.spread:
            return mean
        shape = times.spread**-2
        return mean * self._draws.gammavariate(shape, 1 / shape)

    def _hold(self, weights: dict[str, Tensor]) -> None:
        """Let the model compute with these very tensors, which nobody changes meanwhile."""
        for name, weight in weights.items():
            self._parameters[name].data = weight
