"""Delay compensation: what the gradient would be at the weights of by now (Zheng et al. 2017)."""

import math

import torch
from torch import Tensor

from .correction import Correction

__all__ = ["DelayCompensation", "compensate"]


def compensate(gradient: Tensor, now: Tensor, then: Tensor, strength: float) -> Tensor:
    """g + λ g⊙g⊙(w_t+τ - w_t): a first-order step along the path the weights have gone since, with
    g⊙g, element by element, for the Hessian (DC-ASGD-c, eq. 10).
    """
    moved = now.detach() - then.detach()
    return torch.addcmul(gradient, gradient, gradient * moved, value=strength)


class DelayCompensation(Correction):
    """Correct a gradient for where the weights have gone since it was taken (DC-ASGD).

    On a stage it needs the weights of the forward, which `Delayed('stash')` keeps; a parameter
    server keeps what it sent while a replica may still use it: memory for a copy a version.

    Args:
        strength: λ; the paper's experiments have 0.04 to 2.

    Raises:
        ValueError: a strength that is negative.
    """

    needs_weights = True

    def __init__(self, strength: float = 0.04) -> None:
        if not isinstance(strength, int | float) or not 0 <= strength < math.inf:
            raise ValueError(f"strength={strength!r}: give a number, 0 or more")
        self.strength = float(strength)

    def change(self, gradient: Tensor, now: Tensor, then: Tensor) -> Tensor:
        if gradient.is_sparse:
            raise ValueError(
                "delay compensation needs dense gradients, and a layer gives sparse ones: write "
                "sparse=False there, or leave the correction out"
            )
        return compensate(gradient, now, then, self.strength)
