"""From bytes to the float pixels that networks train on."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["normalize"]


def normalize(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 (C, H, W) -> float32 of the same shape: (pixels / 255 - mean) / std, per channel."""
    center = torch.tensor(mean).view(-1, 1, 1)
    scale = torch.tensor(std).view(-1, 1, 1)
    return (pixels / 255 - center) / scale
