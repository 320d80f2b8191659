"""Emulated layers: they take a given time and almost no processor, so 8 stages fit 2 cores."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .checks import check_positive

__all__ = ["EmulatedLayer", "emulated"]


def emulated(
    layers: int = 4,
    forward_ms: float = 10.0,
    backward_ms: float = 20.0,
    width: int = 8,
    samples: int | None = None,
    slowed: int | None = None,
    pace: Sequence[float] = (),
) -> nn.Sequential:
    """`layers` equal `EmulatedLayer`s: (N, width) -> the same, and as long as the times say.

    For measuring a pipeline's schedule and transport apart from its arithmetic. For unequal
    layers, put `EmulatedLayer`s of different times into an `nn.Sequential`.

    Args:
        slowed: the layer, from 0, that goes at `pace`; the others keep theirs.

    Raises:
        ValueError: `layers`, `width` or `samples` below 1, a negative time, or no layer `slowed`.
    """
    check_positive(layers=layers)
    if slowed is not None and not 0 <= slowed < layers:
        raise ValueError(f"slowed={slowed!r}: give a layer from 0 to {layers - 1}")
    paces = [pace if k == slowed else () for k in range(layers)]
    return nn.Sequential(
        *(EmulatedLayer(forward_ms, backward_ms, width, samples, pace) for pace in paces)
    )


class EmulatedLayer(nn.Module):
    """x · weight, after `forward_ms` milliseconds of sleep; its backward sleeps `backward_ms`.

    (N, …, width) -> the same. `weight` has `width` numbers, 1 at first: something real to train.

    A sleep ends a little late. The next one of the same process is shorter by that, so that over
    many layers the times are as given; what the host does between two layers is not taken off.

    It sleeps on the host. With CUDA tensors too: the device stays idle meanwhile, and what the
    host would have queued ahead waits, so times measured there are those of a busy host, not of a
    busy device.

    Args:
        samples: how many the times are for; others take in proportion. None: any number takes as
            long.
        pace: factors of the times of its first forward in training, of the second, and so on over
            and over, with the backward that belongs to each: a device that is slow for a while.
    """

    def __init__(
        self,
        forward_ms: float,
        backward_ms: float,
        width: int,
        samples: int | None = None,
        pace: Sequence[float] = (),
    ) -> None:
        super().__init__()
        check_positive(width=width, **({} if samples is None else {"samples": samples}))
        for name, value in (("forward_ms", forward_ms), ("backward_ms", backward_ms)):
            if not 0.0 <= value < float("inf"):
                raise ValueError(f"{name}={value!r}: give milliseconds, 0 or more")
        self.forward_ms = forward_ms
        self.backward_ms = backward_ms
        self.samples = samples
        if any(not 0.0 <= factor < float("inf") for factor in pace):
            raise ValueError(f"pace={pace!r}: give factors, 0 or more")
        self.pace, self._count = tuple(pace), 0
        self.weight = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        share = 1.0 if self.samples is None else len(x) / self.samples
        if self.pace and self.training:
            share *= self.pace[self._count % len(self.pace)]
            self._count += 1
        _sleep(share * self.forward_ms / 1000)
        scaled = x * self.weight
        slept: Tensor = _SleepInBackward.apply(scaled, share * self.backward_ms / 1000)  # type: ignore[no-untyped-call]
        return slept

    def extra_repr(self) -> str:
        each = "" if self.samples is None else f", samples={self.samples}"
        return f"forward_ms={self.forward_ms}, backward_ms={self.backward_ms}{each}"


class _SleepInBackward(torch.autograd.Function):
    """The identity, whose gradient arrives after `seconds`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        _sleep(ctx.seconds)
        return gradient, None


_late = 0.0
"""Seconds by which this process's sleeps so far ended too late, altogether."""


def _sleep(seconds: float) -> None:
    global _late
    start = time.perf_counter()
    if seconds > _late:
        time.sleep(seconds - _late)
    _late += time.perf_counter() - start - seconds
