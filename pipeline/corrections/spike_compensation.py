"""Spike compensation: apply at once what a late gradient has missed (Kosson et al. 2021, SC)."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import SGD, Muon, Optimizer

from ..errors import InputError
from ..learning_rates import multiplied
from .correction import Correction

if TYPE_CHECKING:
    from ..stage import Stage

__all__ = ["SpikeCompensation", "direction", "direction_of_mean"]


def direction(v: Tensor, g: Tensor, m: float, staleness: float) -> Tensor:
    """a v + b g with a = m^τ, b = (1 - m^τ) / (1 - m): what SGD steps along.

    The steps that momentum would have made of g in the τ updates that it came too late for, at
    once. τ = 0 is v, plain momentum; τ = 1 is m v + g, Nesterov's.
    """
    a = m**staleness
    return torch.add(g * ((1 - a) / (1 - m)), v, alpha=a)


def direction_of_mean(mean: Tensor, g: Tensor, m: float, staleness: float) -> Tensor:
    """The same of a momentum that is an average, v = mean / (1 - m), at its scale.

    a mean + (1 - a) g, a = m^τ: g interpolated to its average. Of Muon, whose step orthogonalises
    it. τ = 1 is Nesterov's.
    """
    return torch.lerp(g, mean, m**staleness)


class SpikeCompensation(Correction):
    """Step along a v + b g instead of v, with SGD's momentum or Muon's.

    SGD's is to be plain momentum. Beside Muon, which it is for then, an SGD whose momentum is not,
    and any other optimizer, is let be. Muon's own step is Nesterov's, which is what it does for
    τ = 1: there it counts one more, a = m^(τ+1), where nothing is late a = m. It sees the gradient
    after clipping, with the optimizer's weight decay.
    """

    at_servers = False
    takes_momentum = True

    def attach(self, stage: "Stage") -> None:
        if not any(isinstance(optimizer, Muon) for optimizer in stage.optimizers):
            for optimizer in stage.optimizers:
                _check(optimizer)

    def move(self, optimizer: Optimizer, staleness: float, step: Callable[[], None]) -> None:
        if staleness == 0:
            step()
        elif isinstance(optimizer, Muon):
            _move_muon(optimizer, staleness, step)
        elif isinstance(optimizer, SGD) and _has_plain_momentum(optimizer):
            _move_sgd(optimizer, staleness, step)
        else:
            step()


def _check(optimizer: Optimizer) -> None:
    if not isinstance(optimizer, SGD):
        raise InputError(
            f"spike_compensation is defined for SGD with momentum, and Muon, and this is "
            f"{type(optimizer).__name__}: write one of them, or weight_prediction, which every "
            "optimizer can have"
        )
    if not all(group["momentum"] > 0 for group in optimizer.param_groups):
        raise InputError(
            "spike_compensation is about momentum, and this SGD has none: write a momentum above "
            "0, or leave the correction out"
        )
    if not _has_plain_momentum(optimizer):
        raise InputError(
            "spike_compensation takes the place of Nesterov's look-ahead, and knows no "
            "dampening: leave nesterov and dampening out of SGD's arguments"
        )


def _has_plain_momentum(optimizer: SGD) -> bool:
    return all(
        group["momentum"] > 0 and not group["nesterov"] and not group["dampening"]
        for group in optimizer.param_groups
    )


def _move_sgd(optimizer: SGD, staleness: float, step: Callable[[], None]) -> None:
    gradients = [_gradients(group) for group in optimizer.param_groups]
    rates = [group["lr"] for group in optimizer.param_groups]
    with multiplied([optimizer], 0.0):
        step()  # the momentum moves, the weights do not
    with torch.no_grad():
        for group, rate, found in zip(optimizer.param_groups, rates, gradients, strict=True):
            m = float(group["momentum"])
            for parameter, gradient in found:
                v = optimizer.state[parameter]["momentum_buffer"]
                parameter.add_(direction(v, gradient, m, staleness), alpha=-rate)


def _gradients(group: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """The parameters that have one, and what SGD makes of it before momentum."""
    found: list[tuple[Tensor, Tensor]] = []
    for parameter in group["params"]:
        gradient = parameter.grad
        if gradient is None:
            continue
        gradient = -gradient if group["maximize"] else gradient
        if group["weight_decay"]:
            gradient = gradient.add(parameter.detach(), alpha=group["weight_decay"])
        found.append((parameter, gradient))
    return found


def _move_muon(optimizer: Muon, staleness: float, step: Callable[[], None]) -> None:
    """Let it orthogonalise a gradient that has the momentum in it, and keep that ourselves."""
    kept: list[tuple[Tensor, Tensor]] = []
    own = [(group["momentum"], group["nesterov"]) for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        m = float(group["momentum"])
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = optimizer.state[parameter]
            mean = state.get("momentum_buffer")
            mean = torch.zeros_like(parameter.grad) if mean is None else mean
            mean.lerp_(parameter.grad, 1 - m)
            late = staleness + group["nesterov"]
            parameter.grad = direction_of_mean(mean, parameter.grad, m, late)
            state["momentum_buffer"] = torch.zeros_like(mean)
            kept.append((parameter, mean))
        group["momentum"], group["nesterov"] = 0.0, False
    step()
    for group, (momentum, nesterov) in zip(optimizer.param_groups, own, strict=True):
        group["momentum"], group["nesterov"] = momentum, nesterov
    for parameter, mean in kept:
        optimizer.state[parameter]["momentum_buffer"] = mean
