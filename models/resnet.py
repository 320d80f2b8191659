"""Residual networks: a stem, residual blocks (one layer each), a linear head."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional

from .checks import check_positive
from .layers import ConvUnit, HeConv2d

__all__ = ["PaddedShortcut", "ResidualBlock", "resnet", "resnet_cifar"]


class ResidualBlock(nn.Module):
    """ReLU(residual(x) + shortcut(x)); a pipeline cannot cut it, for the shortcut spans it.

    `residual` and `shortcut` map (N, C, H, W) to one and the same shape.
    """

    def __init__(self, residual: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.residual = residual
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        summed: Tensor = self.residual(x) + self.shortcut(x)
        return functional.relu(summed)


class PaddedShortcut(nn.Module):
    """He et al.'s option A: every `stride`-th pixel, new channels zero, no parameters.

    (N, C, H, W) -> (N, C + extra, ⌈H / stride⌉, ⌈W / stride⌉).
    """

    def __init__(self, extra: int, stride: int) -> None:
        super().__init__()
        self.extra = extra
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))


def resnet(depth: int = 50, classes: int = 1000) -> nn.Sequential:
    """The ImageNet form: (N, 3, H, W) images (224x224 in the paper) -> (N, classes) logits.

    He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition", 2016, table 1 and
    section 4.1: shortcuts change shape by projection (option B), depths from 50 use bottlenecks.
    A bottleneck's stride is in its 3x3 convolution, as in most implementations, not in its first
    1x1, as in the paper; the parameters are the same. Depth 18: 11,689,512; 50: 25,557,032.

    Raises:
        ValueError: a depth other than 18, 34, 50, 101, 152, or `classes` below 1.
    """
    check_positive(classes=classes)
    if depth not in _IMAGENET:
        known = ", ".join(map(str, _IMAGENET))
        raise ValueError(f"depth={depth!r}: ImageNet ResNets come in {known}")
    residual, expansion, repeats = _IMAGENET[depth]
    layers: list[nn.Module] = [
        ConvUnit(3, 64, kernel=7, stride=2),
        nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
    ]
    inputs = 64
    for group, blocks in enumerate(repeats):
        width = 64 * 2**group
        for block in range(blocks):
            stride = 2 if group > 0 and block == 0 else 1
            outputs = width * expansion
            shortcut = _projection(inputs, outputs, stride)
            layers.append(ResidualBlock(residual(inputs, width, stride), shortcut))
            inputs = outputs
    return nn.Sequential(*layers, *_head(inputs, classes))


def resnet_cifar(depth: int = 20, classes: int = 10) -> nn.Sequential:
    """The CIFAR form: (N, 3, 32, 32) images -> (N, classes) logits.

    The same paper's section 4.2: depth = 6n + 2 (20, 32, 44, 56, 110, …), three groups of n basic
    blocks with 16, 32, 64 channels, shortcuts without parameters (option A). Depth 20: 269,722
    parameters; 110: 1,727,962.

    Raises:
        ValueError: a depth that is not 6n + 2 with n of at least 1, or `classes` below 1.
    """
    check_positive(depth=depth, classes=classes)
    blocks, rest = divmod(depth - 2, 6)
    if rest != 0 or blocks < 1:
        raise ValueError(f"depth={depth!r}: CIFAR ResNets have depth 6n + 2, such as 20, 56 or 110")
    layers: list[nn.Module] = [ConvUnit(3, 16, kernel=3)]
    inputs = 16
    for width in (16, 32, 64):
        for _ in range(blocks):
            stride = width // inputs
            shortcut = PaddedShortcut(width - inputs, stride) if stride > 1 else nn.Identity()
            layers.append(ResidualBlock(_basic(inputs, width, stride), shortcut))
            inputs = width
    return nn.Sequential(*layers, *_head(inputs, classes))


def _basic(inputs: int, width: int, stride: int) -> nn.Module:
    return nn.Sequential(
        ConvUnit(inputs, width, kernel=3, stride=stride),
        HeConv2d(width, width, kernel=3),
        nn.BatchNorm2d(width),
    )


def _bottleneck(inputs: int, width: int, stride: int) -> nn.Module:
    return nn.Sequential(
        ConvUnit(inputs, width, kernel=1),
        ConvUnit(width, width, kernel=3, stride=stride),
        HeConv2d(width, 4 * width, kernel=1),
        nn.BatchNorm2d(4 * width),
    )


def _projection(inputs: int, outputs: int, stride: int) -> nn.Module:
    if inputs == outputs and stride == 1:
        return nn.Identity()
    projection = HeConv2d(inputs, outputs, kernel=1, stride=stride)
    return nn.Sequential(projection, nn.BatchNorm2d(outputs))


def _head(inputs: int, classes: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)]


# Depth: the residual of a block, how many times wider its output is, blocks in each group.
_IMAGENET: dict[int, tuple[Callable[[int, int, int], nn.Module], int, tuple[int, ...]]] = {
    18: (_basic, 1, (2, 2, 2, 2)),
    34: (_basic, 1, (3, 4, 6, 3)),
    50: (_bottleneck, 4, (3, 4, 6, 3)),
    101: (_bottleneck, 4, (3, 4, 23, 3)),
    152: (_bottleneck, 4, (3, 8, 36, 3)),
}
