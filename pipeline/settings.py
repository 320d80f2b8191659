"""What every stage of a pipeline is told alike, and what it makes of it."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .batch_size import Growth
from .corrections import Correction
from .errors import InputError, first_line
from .loss import Loss

__all__ = [
    "OptimizerFactory",
    "SchedulerFactory",
    "Settings",
    "autocasting",
    "compile_layers",
    "make_optimizers",
    "make_schedulers",
]

OptimizerFactory = Callable[[list[tuple[str, nn.Parameter]]], Optimizer | Sequence[Optimizer]]
"""From a stage's (name, Parameter) pairs, its optimizer, or several."""

SchedulerFactory = Callable[[Optimizer], LRScheduler]
"""From an optimizer, its learning-rate scheduler, stepped once an update."""


@dataclass(frozen=True)
class Settings:
    """What every stage is told alike; `Pipeline` says what each means.

    Args:
        compile: keywords of torch.compile; None runs the layers as they are.
        stops_on_nonfinite: raise at the first loss or gradient that is not finite, or skip.
        batch_size: how many samples an update has, in place of `update_every`.
    """

    loss_fn: Loss
    optimizer: OptimizerFactory
    scheduler: SchedulerFactory | None = None
    update_every: int = 1
    clip_grad_norm: float | None = None
    autocast: torch.dtype | None = None
    compile: dict[str, Any] | None = None
    stops_on_nonfinite: bool = True
    corrections: tuple[Correction, ...] = ()
    batch_size: Growth | None = None


def autocasting(dtype: torch.dtype | None, device: torch.device) -> AbstractContextManager[Any]:
    """Autocast to this dtype; None leaves every operation as it is."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def make_optimizers(
    factory: OptimizerFactory, parameters: list[tuple[str, nn.Parameter]]
) -> list[Optimizer]:
    """Call the user's factory, unless there is nothing to train.

    Raises:
        InputError: it raised.
        TypeError: it gave something else than optimizers.
        ValueError: an optimizer moves what it was not given.
    """
    if not parameters:
        return []
    try:
        made = factory(parameters)
    except Exception as error:
        more = len(parameters) - 1
        others = f"s {parameters[0][0]!r} and {more} other{'s' * (more > 1)}"
        raise InputError(
            f"optimizer= raised {type(error).__name__}: {first_line(error)}, for the "
            f"parameter{others if more else f' {parameters[0][0]!r}'}"
        ) from error
    optimizers = list(made) if isinstance(made, Sequence) else [made]
    for optimizer in optimizers:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"optimizer= gave a {type(optimizer).__name__}: it must be a function that takes "
                "a list of (name, Parameter) pairs and gives a torch.optim.Optimizer, or a list "
                "of them, as in optimizer=lambda params: torch.optim.SGD(params, lr=0.1)"
            )
        if isinstance(optimizer, torch.optim.LBFGS):
            raise TypeError(
                "optimizer= gave an LBFGS, which runs the model as often as it likes, and a stream "
                "does so once: write SGD, AdamW or another that steps on one gradient"
            )
        given = {id(parameter) for _, parameter in parameters}
        if any(id(p) not in given for group in optimizer.param_groups for p in group["params"]):
            raise ValueError(
                "optimizer= gave an optimizer of other parameters than it was called with: make "
                "it of its argument, as in optimizer=lambda params: torch.optim.SGD(params, lr=0.1)"
            )
    return optimizers


def make_schedulers(
    factory: SchedulerFactory | None, optimizers: list[Optimizer]
) -> list[LRScheduler]:
    """Call the user's factory for each optimizer, if there is one.

    Raises:
        InputError: it raised.
    """
    try:
        return [factory(optimizer) for optimizer in optimizers] if factory else []
    except Exception as error:
        raise InputError(
            f"scheduler= raised {type(error).__name__}: {first_line(error)}"
        ) from error


def compile_layers(call: Callable[..., Any], keywords: dict[str, Any] | None) -> Callable[..., Any]:
    """What runs a stage's layers, through torch.compile if it was asked for.

    Raises:
        InputError: torch.compile does not take the keywords.
    """
    if keywords is None:
        return call
    try:
        compiled: Callable[..., Any] = torch.compile(call, **keywords)
    except Exception as error:
        raise InputError(
            f"compile={keywords}: {type(error).__name__}: {first_line(error)}"
        ) from error
    return compiled
