"""Spike compensation: apply at once what a late gradient has missed (Kosson et al. 2021, SC)."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from ..errors import InputError
from ..learning_rates import multiplied
from .correction import Correction

if TYPE_CHECKING:
    from ..stage import Stage

__all__ = ["SpikeCompensation", "direction"]


def direction(v: Tensor, g: Tensor, m: float, staleness: float) -> Tensor:
    """a v + b g with a = m^τ, b = (1 - m^τ) / (1 - m): what SGD steps along.

    The steps that momentum would have made of g in the τ updates that it came too late for, at
    once. τ = 0 is v, plain momentum; τ = 1 is m v + g, Nesterov's.
    """
    a = m**staleness
    return torch.add(g * ((1 - a) / (1 - m)), v, alpha=a)


class SpikeCompensation(Correction):
    """Step along a v + b g instead of v, with SGD and its momentum, which is not Nesterov's.

    It sees the gradient after clipping, with the optimizer's weight decay.
    """

    at_servers = False

    def attach(self, stage: "Stage") -> None:
        for optimizer in stage.optimizers:
            groups = optimizer.param_groups
            if not isinstance(optimizer, SGD) or not all(g["momentum"] > 0 for g in groups):
                kind = type(optimizer).__name__
                raise InputError(
                    f"spike_compensation is defined for SGD with momentum, and this is {kind}"
                    f"{' without' if isinstance(optimizer, SGD) else ''}: write SGD with a "
                    "momentum above 0, or weight_prediction, which every optimizer can have"
                )
            if any(group["nesterov"] or group["dampening"] for group in groups):
                raise InputError(
                    "spike_compensation takes the place of Nesterov's look-ahead, and knows no "
                    "dampening: leave nesterov and dampening out of SGD's arguments"
                )

    def move(self, optimizer: Optimizer, staleness: float, step: Callable[[], None]) -> None:
        if staleness == 0:
            step()
            return
        gradients = [_gradients(group) for group in optimizer.param_groups]
        rates = [group["lr"] for group in optimizer.param_groups]
        with multiplied([optimizer], 0.0):
            step()  # the momentum moves, the weights do not
        with torch.no_grad():
            for group, rate, found in zip(optimizer.param_groups, rates, gradients, strict=True):
                m = float(group["momentum"])
                for parameter, gradient in found:
                    v = optimizer.state[parameter]["momentum_buffer"]
                    way = direction(v, gradient, m, staleness)
                    parameter.add_(way, alpha=-rate)


def _gradients(group: dict[str, object]) -> list[tuple[Tensor, Tensor]]:
    """The parameters that have one, and what SGD makes of it before momentum."""
    found: list[tuple[Tensor, Tensor]] = []
    parameters = group["params"]
    assert isinstance(parameters, list)
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None:
            continue
        gradient = -gradient if group["maximize"] else gradient
        decay = group["weight_decay"]
        assert isinstance(decay, int | float)
        if decay:
            gradient = gradient.add(parameter.detach(), alpha=decay)
        found.append((parameter, gradient))
    return found
