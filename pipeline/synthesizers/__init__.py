"""Synthesizers: small networks that guess a gradient, or an input, before it is there.

A synthesizer is made by `factory(given, wanted, condition)`, from the shape of one sample of what
it is called with and of what it must give, and what it is told of the target; it is called with a
tensor (N, *given) and the target, or None. Dimension 0 is the samples'. One file a kind; anybody's
own is as good.
"""

from collections.abc import Callable

import torch
from torch import nn

from .condition import Condition
from .convolution import Convolution
from .linear import Linear
from .mlp import MLP
from .sequence import Sequence

__all__ = [
    "MLP",
    "Condition",
    "Convolution",
    "Factory",
    "Linear",
    "Sequence",
    "Synthesizer",
    "choose",
    "start_at_zero",
]

Synthesizer = nn.Module
"""Called with a tensor (N, *given) and the target, or None; gives a tensor (N, *wanted)."""

Factory = Callable[[torch.Size, torch.Size, Condition | None], Synthesizer]
"""From the shapes `given` and `wanted` of one sample, and the condition, a synthesizer."""


def choose(given: torch.Size, wanted: torch.Size, condition: Condition | None) -> Synthesizer:
    """The kind that fits: by shape, and for vectors linear where it is told the target.

    A linear one was enough once the target is known (cDNI, Jaderberg et al. 2017).
    """
    if len(wanted) >= 3 and len(given) == len(wanted):
        return Convolution(given, wanted, condition)
    if len(wanted) == 2 and given[:1] == wanted[:1]:
        return Sequence(given, wanted, condition)
    return (MLP if condition is None else Linear)(given, wanted, condition)


def start_at_zero(synthesizer: Synthesizer) -> None:
    """Zero the weights and biases of the last layer: its first guess is exactly zero.

    Headrace's own synthesizers call their last layer `last`; any other starts as it was made.
    """
    last = getattr(synthesizer, "last", None)
    if isinstance(last, nn.Sequential):  # the last one of these that has weights
        last = next((m for m in reversed(last) if [*m.parameters()]), None)
    if isinstance(last, nn.Module):
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
