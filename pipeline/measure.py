"""Measure what each layer costs: forward, backward and update, on copies of the layers."""

import copy
import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import nn

from .errors import InputError, first_line
from .layers import materialise, named_layers
from .loss import check_loss
from .nest import Nest, describe, leaves, map_tensors, to_device, total_bytes
from .partition import LayerCost
from .settings import Settings, autocasting, make_optimizers

__all__ = ["measure"]

ROUNDS = 7
"""Runs of each layer."""


def measure(
    model: nn.Sequential,
    x: Nest,
    target: Nest,
    settings: Settings,
    device: torch.device,
    seed: int = 0,
    rounds: int = ROUNDS,
    choose: Callable[[Sequence[float]], float] = min,
) -> list[LayerCost]:
    """Time every layer on one micro-batch, one after the other; the loss belongs to the last.

    The model's weights, buffers and the random state stay as they are. The first layer needs no
    gradient of its input, and is measured without.

    Args:
        x: (samples, …), the model's input.
        target: what the loss takes with its output; None leaves the loss out.
        seed: for layers on the meta device.
        choose: one of a layer's times. The quickest is what it takes by itself, since what else the
            machine did only ever adds; the median is what it takes among all that.

    Raises:
        InputError: a layer or the loss cannot take what comes to it.
    """
    costs: list[LayerCost] = []
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        x = to_device(map_tensors(torch.detach, x), device)
        target = to_device(target, device)
        layers = named_layers(model)
        for name, original in layers:
            layer = _copy(name, original)
            materialise(name, layer, seed, device)
            loss_target = (target,) if name == layers[-1][0] and target is not None else ()
            probe = _Probe(name, layer.to(device), x, loss_target, settings, device)
            x = probe.try_out()
            for _ in range(rounds):
                probe.time()
            costs.append(probe.cost(choose))
    return costs


def _copy(name: str, layer: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(layer)
    except Exception as error:
        raise InputError(
            f"layer {name!r} ({type(layer).__name__}) cannot be copied, as balance='time' measures "
            f"copies: {first_line(error)}; write balance='parameters', or each stage's layers"
        ) from error


class _Probe:
    """A copy of one layer, what it takes, and its times in seconds."""

    def __init__(
        self,
        name: str,
        layer: nn.Module,
        x: Nest,
        loss_target: tuple[Nest, ...],
        settings: Settings,
        device: torch.device,
    ) -> None:
        self.name, self.layer, self.x, self.loss_target = name, layer, x, loss_target
        self.settings, self.device = settings, device
        named = [(f"{name}.{n}", p) for n, p in layer.named_parameters() if p.requires_grad]
        self.optimizers = make_optimizers(settings.optimizer, named)
        self.works_in_place = True
        self.bytes = 0
        self.times: list[tuple[float, float, float]] = []

    def try_out(self) -> Nest:
        """Run the layer once; gives what the next one takes."""
        handed = map_tensors(torch.clone, self.x)
        try:
            with autocasting(self.settings.autocast, self.device):
                output: Nest = self.layer(handed)
        except Exception as error:
            raise InputError(
                f"layer {self.name!r} ({type(self.layer).__name__}) cannot take "
                f"{describe(self.x)}: {type(error).__name__}: {first_line(error)}"
            ) from error
        for target in self.loss_target:
            with autocasting(self.settings.autocast, self.device):
                check_loss(self.settings.loss_fn, output, target)
        self.works_in_place = any(t._version for t in leaves(handed))
        try:
            self.bytes = total_bytes(output)
        except TypeError as error:
            kind = type(self.layer).__name__
            raise InputError(f"after layer {self.name!r} ({kind}): {error}") from error
        return map_tensors(lambda t: t.detach().requires_grad_(t.requires_grad), output)

    def time(self) -> None:
        """Run forward, backward and update once, and note how long each took."""
        clock = [self._now()]
        with autocasting(self.settings.autocast, self.device):
            output = self.layer(map_tensors(torch.clone, self.x) if self.works_in_place else self.x)
            for target in self.loss_target:
                output = self.settings.loss_fn(output, target)
        clock.append(self._now())
        tops = [t for t in leaves(output) if t.requires_grad]
        if tops:
            torch.autograd.backward(tops, [torch.ones_like(t) for t in tops])
        clock.append(self._now())
        for optimizer in self.optimizers:
            optimizer.step()
        clock.append(self._now())
        for tensor in (*leaves(self.x), *self.layer.parameters()):
            tensor.grad = None
        forward, backward, update = (b - a for a, b in pairwise(clock))
        self.times.append((forward, backward, update))

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def cost(self, choose: Callable[[Sequence[float]], float]) -> LayerCost:
        """What the runs say of the layer."""
        forward, backward, update = (choose(column) for column in zip(*self.times, strict=True))
        parameters = sum(p.numel() for p in self.layer.parameters())
        kind = type(self.layer).__name__
        return LayerCost(self.name, kind, parameters, self.bytes, forward, backward, update)
