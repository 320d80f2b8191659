"""The loss: a mean over dimension 0; its first call is looked at closely."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .errors import InputError, first_line
from .nest import Nest, describe

__all__ = ["Loss", "call_loss", "check_loss", "name_of"]

Loss = Callable[[Any, Any], Tensor]
"""From an output and its target (nests), a mean over dimension 0: a floating 0-d tensor."""


def name_of(function: object) -> str:
    """A function's or an object's name, for messages."""
    return getattr(function, "__qualname__", type(function).__name__)


def call_loss(loss_fn: Loss, output: Nest, target: Nest) -> Tensor:
    """Call the loss; an error's traceback finds this frame (`layers.layer_at_fault`)."""
    return loss_fn(output, target)


def check_loss(loss_fn: Loss, output: Nest, target: Nest) -> Tensor:
    """Call the loss and look at what it takes and gives.

    Raises:
        InputError: it raises on this output and target, or gives no floating scalar.
    """
    try:
        loss = loss_fn(output, target)
    except Exception as error:
        raise InputError(
            f"loss_fn {name_of(loss_fn)} cannot take the output {describe(output)} with the "
            f"target {describe(target)}: {first_line(error)}; give a loss and "
            "targets (their dtype and shape) that fit the model's output"
        ) from error
    if not isinstance(loss, Tensor) or loss.dim() or not loss.is_floating_point():
        got = describe(loss) if isinstance(loss, Tensor) else type(loss).__name__
        raise InputError(
            f"loss_fn {name_of(loss_fn)} gave {got}: it must give one floating number, the mean "
            "over the samples (reduction='mean')"
        )
    return loss
