"""Local losses: each stage learns from an auxiliary head of its own, and nothing flows back.

Greedy layer-wise learning, all stages at once: decoupled greedy learning (Belilovsky et al. 2020).
The last stage has the network's own output and loss.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from ..errors import InputError, first_line
from ..gradient import Gradient
from ..learning_rates import multiplied
from ..nest import describe, leaves
from ..random_state import RandomState
from ..report import Figures
from ..settings import OptimizerFactory, make_optimizers, make_schedulers
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
        optimizer: a function of the head's (name, Parameter) pairs; None is the stage's, with its
            scheduler. Either is clipped as the stage is.
        ahead: micro-batches that may be on their way to the last stage before a stage waits.

    Raises:
        ValueError: outputs or ahead below 1.
    """

    wants_gradients = False
    state = ("_head", "_optimizers", "_schedulers", "_random", "_gradient", "_loss")

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
        for what, factory in (("head", head), ("optimizer", optimizer)):
            if factory is not None and not callable(factory):
                raise TypeError(f"{what}={factory!r} cannot be called: give a class or a function")
        self._outputs, self._make, self._optimizer = outputs, head or Head, optimizer
        self.ahead: int | None = ahead
        self._head: nn.Module | None = None
        self._gradient, self._loss = Gradient(), Mean()
        self._saved: Mapping[str, Any] = {}

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
        try:
            if self._head is None:
                self._head = self._build(stage, h)
            loss = self._take_loss(stage, self._head, h, flight.target)
        except (InputError, TypeError, ValueError, RuntimeError, IndexError) as error:
            raise InputError(
                f"rule local on stage {stage.index}, with a head of {self._outputs} outputs for "
                f"{describe(outputs[0])} and the target {describe(flight.target)}: "
                f"{first_line(error)}; write another outputs=, or give a head= that fits"
            ) from error
        torch.autograd.backward(loss)
        value = float(loss.detach())
        self._loss.add(value)
        means = {n: p.grad for n, p in self._head.named_parameters() if p.grad is not None}
        self._head.zero_grad()
        self._gradient.add(means, flight.samples, [flight.version], math.isfinite(value))
        return [h.grad if outputs[0].requires_grad else None]

    def _build(self, stage: "Stage", h: Tensor) -> nn.Module:
        seed = stage.derive_seed(0)
        made = make_seeded(lambda: self._make(h.shape[1:], self._outputs), seed, h)
        factory = self._optimizer or stage.settings.optimizer
        self._optimizers = make_optimizers(factory, list(made.named_parameters()))
        scheduler = stage.settings.scheduler if self._optimizer is None else None
        self._schedulers = make_schedulers(scheduler, self._optimizers)
        self._random = RandomState.derive(seed, 1, stage.device)
        if self._saved:
            self._head = made
            super().load_state_dict(self._saved, stage.device)
        return made

    def state_dict(self) -> dict[str, Any]:
        return dict(self._saved) if self._head is None else super().state_dict()

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        # A head is made of the first output that it sees.
        self._saved = state
        if state and self._head is not None:
            super().load_state_dict(state, device)

    def _take_loss(self, stage: "Stage", head: nn.Module, h: Tensor, target: Any) -> Tensor:
        kind = next((p.dtype for p in head.parameters()), h.dtype)
        with self._random.in_force(), stage.autocasting():
            prediction = head(h if stage.autocast else h.to(kind))
            if isinstance(target, Tensor) and target.is_floating_point():
                prediction = prediction.to(target.dtype)
                if prediction.shape != target.shape:
                    raise ValueError(f"the head gives {describe(prediction)}")
        return stage.take_loss(prediction, target)

    def before_update(self, stage: "Stage") -> None:
        if self._head is None or not self._gradient.versions:
            return
        done, self._gradient = self._gradient, Gradient()
        mean = done.mean()
        if done.finite:
            for name, parameter in self._head.named_parameters():
                parameter.grad = mean.get(name)
            if stage.settings.clip_grad_norm is not None:
                clip_grad_norm_(self._head.parameters(), stage.settings.clip_grad_norm)
            # Its own optimizer's rate is the user's affair.
            factor = stage.batch_factor(done.samples) if self._optimizer is None else 1.0
            with multiplied(self._optimizers, factor):
                for optimizer in self._optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
        for scheduler in self._schedulers:
            scheduler.step()
