"""Metrics by short name: functions (output, target) -> mean over the samples."""

import math

from torch import Tensor
from torch.nn import functional

__all__ = ["accuracy", "bits"]


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """The share of right answers: logits (N, …, C) and class numbers (N, …) -> a scalar."""
    return (output.argmax(dim=-1) == target).float().mean()


def bits(output: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy in bits per answer (for characters, bits per character), same shapes."""
    return functional.cross_entropy(output.flatten(0, -2), target.flatten()) / math.log(2.0)
