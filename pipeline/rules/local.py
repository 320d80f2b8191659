"""Local losses: each stage learns from an auxiliary head of its own, and nothing flows back.

Greedy layer-wise learning, all stages at once: decoupled greedy learning (Belilovsky et al. 2020).
The last stage has the network's own output and loss.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..gradient import Gradient
from ..nest import describe, leaves
from ..report import Figures
from ..settings import OptimizerFactory, make_optimizers
from ..teachable import Mean, make_seeded
from .rule import Rule

if TYPE_CHECKING:
    from ..stage import Flight, Stage

__all__ = ["Head", "Local"]

HeadFactory = Callable[[torch.Size, int], nn.Module]


class Head(nn.Module):
    """A linear auxiliary head: maps are averaged over their places, sequences keep positions.

    (N, features) -> (N, outputs); (N, T, features) -> (N, T, outputs);
    (N, channels, places …) -> (N, outputs).
    """

    def __init__(self, shape: torch.Size, outputs: int) -> None:
        super().__init__()
        self.pools = len(shape) >= 3
        self.last = nn.Linear(shape[0] if self.pools else shape[-1], outputs)

    def forward(self, h: Tensor) -> Tensor:
        y: Tensor = self.last(h.flatten(2).mean(2) if self.pools else h)
        return y


class Local(Rule):
    """Update on the gradient of a stage's own loss, at once.

    Args:
        outputs: of each head: the classes, the vocabulary, or the numbers of a target.
        head: makes a head from the shape of one sample of the stage's output, and `outputs`; None
            is `Head`. The pipeline's own loss is taken of what it gives.
        optimizer: a function of the head's (name, Parameter) pairs; None is the stage's.
        ahead: micro-batches that may be on their way to the last stage before a stage waits.

    Raises:
        ValueError: outputs or ahead below 1.
    """

    wants_gradients = False

    def __init__(
        self,
        outputs: int,
        *,
        head: HeadFactory | None = None,
        optimizer: OptimizerFactory | None = None,
        ahead: int = 2,
    ) -> None:
        for name, value in (("outputs", outputs), ("ahead", ahead)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: give a whole number >= 1")
        if head is not None and not callable(head):
            raise TypeError(f"head={head!r} cannot be called: give a class or a function")
        self._outputs, self._make, self._optimizer = outputs, head or Head, optimizer
        self.ahead: int | None = ahead
        self._head: nn.Module | None = None
        self._gradient, self._loss = Gradient(), Mean()

    @property
    def figures(self) -> Figures:
        return Figures(local_loss=self._loss.value)

    def guess(self, stage: "Stage", flight: "Flight") -> Sequence[Tensor | None]:
        outputs = leaves(flight.output)
        if len(outputs) != 1 or not outputs[0].is_floating_point():
            raise InputError(
                f"rule local needs one tensor of numbers between stages, not "
                f"{describe(flight.output)}: cut elsewhere"
            )
        h = outputs[0].detach().requires_grad_()
        if self._head is None:
            self._head = self._build(stage, h)
        with stage.autocasting():
            prediction = self._head(h)
        loss = stage.take_loss(prediction, flight.target)
        torch.autograd.backward(loss)
        value = float(loss.detach())
        self._loss.add(value)
        means = {n: p.grad for n, p in self._head.named_parameters() if p.grad is not None}
        self._head.zero_grad()
        self._gradient.add(means, flight.samples, flight.version, math.isfinite(value))
        return [h.grad if outputs[0].requires_grad else None]

    def _build(self, stage: "Stage", h: Tensor) -> nn.Module:
        seed = (stage.seed + 1) * 1_000_003 + 10_007 * (stage.index + 1)
        try:
            made = make_seeded(lambda: self._make(h.shape[1:], self._outputs), seed, h)
        except (TypeError, ValueError) as error:
            raise InputError(f"rule local on stage {stage.index}: head: {error}") from error
        factory = self._optimizer or stage.settings.optimizer
        self._optimizers = make_optimizers(factory, list(made.named_parameters()))
        return made

    def before_update(self, stage: "Stage") -> None:
        if self._head is None or not self._gradient.versions:
            return
        done, self._gradient = self._gradient, Gradient()
        mean = done.mean()
        if done.finite:
            for name, parameter in self._head.named_parameters():
                parameter.grad = mean.get(name)
            for optimizer in self._optimizers:
                optimizer.step()
                optimizer.zero_grad()
