"""Synthetic gradients by plain autograd, one micro-batch after another: the oracle of `synthetic`.

Nothing is ever in flight here, and no message is sent. Stage j's weights have seen the updates of
all micro-batches before this one; its synthesizer has learned from those up to i - 1 - lag. So a
micro-batch runs through all stages, each going back on its own guess, and only then do the
synthesizers learn, from what was kept of micro-batch i - lag.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .simulator import Batch, LossFunction, OptimizerFactory

__all__ = ["Outcome", "simulate_dni"]

Module = Callable[[Tensor, Tensor], Tensor]
"""A synthesizer here: of a tensor and the target."""


@dataclass
class Outcome:
    """Weights by the model's names; each synthesizer's losses; the last stage's losses."""

    weights: dict[str, Tensor]
    losses: list[float] = field(default_factory=list)
    synthesizer_losses: list[list[float]] = field(default_factory=list)


@dataclass
class _Kept:
    """What one stage keeps of a micro-batch until its synthesizers learn from it."""

    h: Tensor
    target: Tensor
    source: Tensor
    real: Tensor
    arrived: Tensor | None = None


def simulate_dni(
    stages: list[nn.Sequential],
    loss_fn: LossFunction,
    optimizer: OptimizerFactory,
    batches: Sequence[Batch],
    synthesizers: Sequence[Any],
    synthesizer_optimizer: Callable[[Any], Optimizer],
    *,
    lag: int = 2,
    update_every: int = 1,
    draws: Sequence[torch.Generator] | None = None,
    p_update: float = 1.0,
    inputs: Sequence[Any] | None = None,
) -> Outcome:
    """Train; `stages` are changed, and so are the synthesizers (nn.Modules).

    `inputs`: of each stage but the first, what guesses its input from the network's.
    """
    last = len(stages) - 1
    movers = [optimizer(list(stage.named_parameters())) for stage in stages]
    teachers = [synthesizer_optimizer(m.parameters()) for m in synthesizers]
    readers = [synthesizer_optimizer(m.parameters()) for m in inputs or ()]
    sums = [{n: torch.zeros_like(p) for n, p in stage.named_parameters()} for stage in stages]
    weights = [0 for _ in stages]
    kept: list[list[_Kept]] = []
    out = Outcome({}, synthesizer_losses=[[] for _ in synthesizers])

    def learn(row: list[_Kept]) -> None:
        for j, m in enumerate(synthesizers):
            old = row[j]
            if old.arrived is not None:
                value = _teach(m, teachers[j], old.h, len(old.h) * old.arrived, old.target)
                out.synthesizer_losses[j].append(value)
        for j, m in enumerate(inputs or ()):
            _teach(m, readers[j], row[j + 1].source, row[j + 1].real, row[0].target)

    for i, (source, target) in enumerate(batches):
        row: list[_Kept] = []
        signal = source
        for j, stage in enumerate(stages):
            real = signal.detach()
            x = real.clone()
            if inputs is not None and j > 0:
                x = inputs[j - 1](source, target).detach()
            x.requires_grad_(j > 0)
            h = stage(x)
            loss = loss_fn(h, target) if j == last else None
            if loss is not None:
                out.losses.append(loss.item())
            row.append(_Kept(h.detach(), target, source, real))
            if draws is None or torch.rand((), generator=draws[j]) < p_update:
                parameters = list(stage.parameters())
                wanted = [x, *parameters] if j > 0 else parameters
                if loss is not None:
                    found = list(torch.autograd.grad(loss, wanted))
                else:
                    guess = synthesizers[j](h.detach(), target).detach() / len(h)
                    found = list(torch.autograd.grad(h, wanted, guess))
                if j > 0:
                    row[j - 1].arrived = found.pop(0)
                for name, gradient in zip(sums[j], found, strict=True):
                    sums[j][name] += len(h) * gradient
                weights[j] += len(h)
            if (i + 1) % update_every == 0 and weights[j]:
                for name, parameter in stage.named_parameters():
                    parameter.grad = sums[j][name] / weights[j]
                    sums[j][name] = torch.zeros_like(parameter)
                weights[j] = 0
                movers[j].step()
            signal = h
        kept.append(row)
        if i >= lag:
            learn(kept[i - lag])
    for row in kept[max(0, len(kept) - lag) :]:
        learn(row)
    for stage in stages:
        out.weights |= {n: v.detach().clone() for n, v in stage.state_dict().items()}
    return out


def _teach(m: Any, optimizer: Optimizer, x: Tensor, wanted: Tensor, target: Tensor) -> float:
    optimizer.zero_grad()
    error = (m(x, target) - wanted).pow(2).flatten(1).sum(dim=1).mean()
    error.backward()
    optimizer.step()
    return float(error.detach())
