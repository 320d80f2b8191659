"""Layers that start as their papers say.

Each starts its weights in `reset_parameters`, so that a layer made on the meta device and
materialised later starts from the same distribution as one made at once.
"""

import torch
from torch import nn

__all__ = ["ConvUnit", "GlorotLinear", "HeConv2d", "NormalEmbedding", "NormalLinear"]


class HeConv2d(nn.Conv2d):
    """A convolution that starts from N(0, 2 / fan-out), bias 0 (He et al. 2015, section 2.2).

    (N, inputs, H, W) -> (N, outputs, ⌈H / stride⌉, ⌈W / stride⌉) for an odd `kernel`.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, bias: bool = False
    ) -> None:
        super().__init__(inputs, outputs, kernel, stride, padding=kernel // 2, bias=bias)

    def reset_parameters(self) -> None:
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class ConvUnit(nn.Sequential):
    """Convolution, batch normalisation (or, without it, a bias), ReLU: shapes as `HeConv2d`.

    The ReLU works in place: what it overwrites is made inside the unit and needed by no backward.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, batch_norm: bool = True
    ) -> None:
        layers: list[nn.Module] = [HeConv2d(inputs, outputs, kernel, stride, bias=not batch_norm)]
        if batch_norm:
            layers.append(nn.BatchNorm2d(outputs))
        super().__init__(*layers, nn.ReLU(inplace=True))


class NormalLinear(nn.Linear):
    """A linear layer that starts from N(0, std²), bias 0."""

    def __init__(self, inputs: int, outputs: int, std: float, bias: bool = True) -> None:
        self.std = std  # before nn.Linear, whose constructor calls reset_parameters
        super().__init__(inputs, outputs, bias=bias)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class NormalEmbedding(nn.Embedding):
    """A table of vectors that starts from N(0, std²)."""

    def __init__(self, entries: int, width: int, std: float) -> None:
        self.std = std
        super().__init__(entries, width)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)


class GlorotLinear(nn.Linear):
    """A linear layer that starts from gain · U(±√(6 / (fan-in + fan-out))) (Glorot & Bengio 2010).

    The bias starts so that inputs whose mean is `input_mean` give outputs whose mean is 0.
    """

    def __init__(self, inputs: int, outputs: int, gain: float, input_mean: float) -> None:
        self.gain = gain
        self.input_mean = input_mean
        super().__init__(inputs, outputs)

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight, self.gain)
        with torch.no_grad():
            self.bias.copy_(-self.input_mean * self.weight.sum(dim=1))
