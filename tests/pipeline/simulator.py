"""Delayed updates by index arithmetic, one micro-batch after another: the oracle of the stream.

Nothing is ever in flight here. What stage j sees of micro-batch k is a version number, and every
version of every stage's weights is kept, so micro-batch k runs forward through all stages with old
weights and backward at once. A version is always there when it is asked for: no forward sees more
than the updates of the micro-batches before it.

Letters: u(k) = updates closed by the micro-batches before k, k // K where every K-th closes one;
p = the first micro-batch after the last drain; d_j = micro-batches in flight behind a forward of
stage j. F(k) sees version u(max(p, k - d_j)); its gradient is in the update that makes version
u(k) + 1; so B(k) happens at version u(k), whatever the drains.
"""

import copy
import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

__all__ = ["Batch", "OptimizerFactory", "Simulation", "cut", "depths_of", "simulate"]

Batch = tuple[Tensor, Tensor]
Weights = dict[str, Tensor]
LossFunction = Callable[[Tensor, Tensor], Tensor]
OptimizerFactory = Callable[[list[tuple[str, nn.Parameter]]], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler]


def depths_of(n: int, slack: int | Sequence[int] = 0) -> list[int]:
    """d_j = d_{j+1} + 1 + s_j, and 0 at the last stage; `slack` is per hop or the same for all."""
    hops = [slack] * (n - 1) if isinstance(slack, int) else list(slack)
    depths = [0]
    for s in reversed(hops):
        depths.insert(0, depths[0] + 1 + s)
    return depths


def cut(model: nn.Sequential, sizes: Sequence[int]) -> list[nn.Sequential]:
    """Stages of so many layers each, copied, under the model's own layer names."""
    layers = list(copy.deepcopy(model).named_children())
    ends = [sum(sizes[: j + 1]) for j in range(len(sizes))]
    return [
        nn.Sequential(OrderedDict(layers[end - size : end]))
        for end, size in zip(ends, sizes, strict=True)
    ]


class _Stage:
    """One stage's layers, the history of its weights, and the sum its next update is made of."""

    def __init__(
        self,
        module: nn.Sequential,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | None,
        clip: float | None,
    ) -> None:
        self.module, self.clip = module, clip
        self.newest = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.optimizer = optimizer(list(self.newest.items())) if self.newest else None
        self.scheduler = scheduler(self.optimizer) if scheduler and self.optimizer else None
        self.history: list[Weights] = [self.snapshot()]
        self.sum: Weights = {n: torch.zeros_like(p) for n, p in self.newest.items()}
        self.samples = self.counted = 0
        self.squares = 0.0

    def snapshot(self) -> Weights:
        return {n: p.detach().clone() for n, p in self.newest.items()}

    def leaves(self, version: int, ahead: int = 0) -> Weights:
        """A version's weights as fresh autograd leaves, extrapolated `ahead` versions further."""
        w = self.history[version]
        if ahead and version:
            before = self.history[version - 1]
            w = {n: w[n] + ahead * (w[n] - before[n]) for n in w}
        return {n: v.detach().clone().requires_grad_() for n, v in w.items()}

    def again(self, leaves: Weights, x: Tensor) -> Tensor:
        """A second forward of the same input, which must not count twice in the buffers."""
        buffers = {n: b.clone() for n, b in self.module.named_buffers()}
        out: Tensor = functional_call(self.module, leaves | buffers, (x,))
        return out

    def accumulate(self, gradients: Weights, samples: int) -> None:
        for name, gradient in gradients.items():
            self.sum[name] += samples * gradient
            self.squares += samples * float(gradient.square().sum())
        self.samples += samples
        self.counted += 1

    def noise(self) -> tuple[float, float]:
        """The samples' variance by the micro-batches' means, and the mean's square."""
        mean = sum(float((total / self.samples).square().sum()) for total in self.sum.values())
        spread = self.squares - self.samples * mean
        return spread / (self.counted - 1) if self.counted > 1 else math.nan, mean

    def update(self, rate: Callable[[int], float]) -> None:
        for name, parameter in self.newest.items():
            parameter.grad = self.sum[name] / self.samples
            self.sum[name] = torch.zeros_like(parameter)
        factor, self.samples = rate(self.samples), 0
        self.squares, self.counted = 0.0, 0
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.newest.values(), self.clip)
        if self.optimizer:
            group = self.optimizer.param_groups[0]
            before, group["lr"] = group["lr"], group["lr"] * factor
            self.optimizer.step()
            group["lr"] = before
        if self.scheduler:
            self.scheduler.step()
        self.history.append(self.snapshot())

    def state(self, version: int) -> Weights:
        return self.module.state_dict() | self.history[version]


@dataclass
class Simulation:
    """What came out: `weights` before and `closed` after the partial update `close` applies."""

    weights: Weights
    closed: Weights
    staleness: list[list[int]] = field(default_factory=list)  # [stage][micro-batch], in updates
    losses: list[float] = field(default_factory=list)
    drained: list[Weights] = field(default_factory=list)  # the weights and buffers at each drain
    noise: list[tuple[float, float]] = field(default_factory=list)  # of each update, all stages'


def simulate(
    stages: list[nn.Sequential],
    loss_fn: LossFunction,
    optimizer: OptimizerFactory,
    batches: Sequence[Batch],
    *,
    depths: Sequence[int],
    policy: str = "stash",
    update_every: int = 1,
    closes: Sequence[bool] | None = None,
    rate: Callable[[int], float] = lambda samples: 1.0,
    drains: Sequence[int] = (),
    scheduler: SchedulerFactory | None = None,
    clip: float | None = None,
) -> Simulation:
    """Train on micro-batches `batches` under weight policy `policy`; `stages` are changed.

    `policy`: 'current', 'stash', 'replay', 'predict', or 'nohist', which is no policy of Headrace:
    section 1's ablation, where the backward finds the input of the newest micro-batch its stage
    has run forward, k + d_j, in place of its own. `drains`: the micro-batches that are the first
    after a drain. `closes`: which micro-batches close an update, in place of every K-th. `rate`:
    what the learning rate of an update of so many samples is multiplied by.
    """
    marks = closes or [(k + 1) % update_every == 0 for k in range(len(batches))]
    u = [0, *itertools.accumulate(marks)]
    parts = [_Stage(s, optimizer, scheduler, clip) for s in stages]
    result = Simulation({}, {}, [[] for _ in parts])
    for k in range(len(batches)):
        if k in drains:
            result.drained.append(_state(parts, u[k]))
        p = max((drain for drain in drains if drain <= k), default=0)
        seen = [u[max(p, k - d)] for d in depths]
        newest = _newest_inputs(parts, batches, k, depths) if policy == "nohist" else []
        now = u[k]
        loss = _one_micro_batch(parts, loss_fn, batches[k], policy, now, seen, newest)
        result.losses.append(loss)
        for stage, version in zip(result.staleness, seen, strict=True):
            stage.append(now - version)
        if marks[k]:
            result.noise.append(tuple(map(sum, zip(*(p.noise() for p in parts), strict=True))))
            for part in parts:
                part.update(rate)
    result.weights = _state(parts, u[-1])
    if not marks[-1]:
        for part in parts:
            part.update(rate)
    result.closed = _state(parts, -1)
    return result


def _one_micro_batch(
    parts: list[_Stage],
    loss_fn: LossFunction,
    batch: Batch,
    policy: str,
    now: int,
    seen: list[int],
    newest: list[Tensor],
) -> float:
    signal, target = batch
    kept: list[tuple[Tensor, Weights, Tensor]] = []
    for part, version in zip(parts, seen, strict=True):
        x = signal.detach().clone().requires_grad_(part is not parts[0])
        leaves = part.leaves(version, now - version if policy == "predict" else 0)
        kept.append((x, leaves, functional_call(part.module, leaves, (x,))))
        signal = kept[-1][2]
    output = signal.detach().requires_grad_()
    loss = loss_fn(output, target)
    (delta,) = torch.autograd.grad(loss, output)
    for j in reversed(range(len(parts))):
        part, (x, leaves, out) = parts[j], kept[j]
        if policy == "current":  # trap R3: autograd does not see a change made through .data
            for name, leaf in leaves.items():
                leaf.data.copy_(part.history[now][name])
        elif policy == "replay":
            leaves = part.leaves(now)
            out = part.again(leaves, x)
        elif policy == "nohist":
            x = newest[j].requires_grad_(j > 0)
            leaves = part.leaves(now)
            out = part.again(leaves, x)
        wanted = {**leaves, "": x} if x.requires_grad else leaves
        got: Weights = {}
        if out.requires_grad:  # not so in a frozen first stage
            found = torch.autograd.grad(out, list(wanted.values()), delta)
            got = dict(zip(wanted, found, strict=True))
        delta = got.pop("", delta)
        part.accumulate(got, len(target))
    return loss.item()


def _newest_inputs(
    parts: list[_Stage], batches: Sequence[Batch], k: int, depths: Sequence[int]
) -> list[Tensor]:
    """nohist, an update per micro-batch: each stage's input of its newest forward, i = k + d_j.

    Its way there: stage h ran it with version i - d_h, known since d_h >= d_j for h < j.
    """
    inputs: list[Tensor] = []
    for j, depth in enumerate(depths):
        i = min(k + depth, len(batches) - 1)
        signal = batches[i][0]
        for h in range(j):
            with torch.no_grad():
                signal = parts[h].again(parts[h].leaves(max(0, i - depths[h])), signal)
        inputs.append(signal.detach().clone())
    return inputs


def _state(parts: list[_Stage], version: int) -> Weights:
    """The whole model's weights and buffers, by its own layer names."""
    state: Weights = {}
    for part in parts:
        state |= {n: v.detach().clone() for n, v in part.state(version).items()}
    return state
