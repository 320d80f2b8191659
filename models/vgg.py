"""VGG networks: 3x3 convolutions, halved five times by pooling."""

from torch import nn

from .checks import check_positive
from .layers import ConvUnit, NormalLinear

__all__ = ["vgg", "vgg_cifar"]

# Simonyan and Zisserman 2015, table 1, columns A, B, D, E: convolutions in each of the five groups.
_GROUPS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
_CHANNELS = (64, 128, 256, 512, 512)


def vgg(
    depth: int = 16, classes: int = 1000, *, batch_norm: bool = False, dropout: float = 0.5
) -> nn.Sequential:
    """The ImageNet form: (N, 3, H, W) images -> (N, classes) logits; H and W at least 32.

    Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition",
    2015, section 2.1 and table 1. Each convolution with its ReLU is one layer, each pooling one,
    and so is each part of the three-layer classifier. Sizes other than the paper's 224x224 are
    averaged to 7x7 before the classifier. Depth 16 with 1000 classes: 138,357,544 parameters.
    With `batch_norm` the convolutions have no bias, which the norm would cancel.

    Raises:
        ValueError: a depth other than 11, 13, 16, 19, or `classes` below 1.
    """
    check_positive(classes=classes)
    return nn.Sequential(
        *_features(depth, batch_norm),
        nn.AdaptiveAvgPool2d(7),
        nn.Flatten(),
        NormalLinear(512 * 7 * 7, 4096, std=0.01),
        nn.ReLU(),
        nn.Dropout(dropout),
        NormalLinear(4096, 4096, std=0.01),
        nn.ReLU(),
        nn.Dropout(dropout),
        NormalLinear(4096, classes, std=0.01),
    )


def vgg_cifar(depth: int = 16, classes: int = 10, *, batch_norm: bool = True) -> nn.Sequential:
    """The CIFAR form: (N, 3, 32, 32) images -> (N, classes) logits.

    The same convolutions, which leave 512 numbers of a 32x32 image, and one linear layer. The
    paper has no such form; it is the one in common use. Depth 16: 14,724,042 parameters.

    Raises:
        ValueError: a depth other than 11, 13, 16, 19, or `classes` below 1.
    """
    check_positive(classes=classes)
    return nn.Sequential(
        *_features(depth, batch_norm), nn.Flatten(), NormalLinear(512, classes, std=0.01)
    )


def _features(depth: int, batch_norm: bool) -> list[nn.Module]:
    if depth not in _GROUPS:
        raise ValueError(f"depth={depth!r}: VGG comes in {', '.join(map(str, _GROUPS))}")
    layers: list[nn.Module] = []
    inputs = 3
    for channels, convolutions in zip(_CHANNELS, _GROUPS[depth], strict=True):
        for _ in range(convolutions):
            layers.append(ConvUnit(inputs, channels, kernel=3, batch_norm=batch_norm))
            inputs = channels
        layers.append(nn.MaxPool2d(2))
    return layers
