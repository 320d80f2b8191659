"""Residual blocks: what a shortcut does, and where the stride is."""

import torch
from torch import nn

from headrace.models import resnet, resnet_cifar
from headrace.models.resnet import PaddedShortcut, ResidualBlock


def test_a_block_adds_its_shortcut() -> None:
    block = ResidualBlock(nn.Identity(), nn.Identity())
    assert torch.equal(block(torch.tensor([-1.0, 2.0])), torch.tensor([0.0, 4.0]))


def test_the_padded_shortcut_takes_every_second_pixel_and_adds_zero_channels() -> None:
    x = torch.arange(16.0).view(1, 1, 4, 4)
    padded = PaddedShortcut(extra=1, stride=2)(x)
    assert padded.tolist() == [[[[0, 2], [8, 10]], [[0, 0], [0, 0]]]]


def test_each_residual_block_is_one_layer() -> None:
    def blocks(model: nn.Sequential) -> int:
        return sum(isinstance(layer, ResidualBlock) for layer in model)

    with torch.device("meta"):
        assert blocks(resnet(50)) == 3 + 4 + 6 + 3
        assert blocks(resnet_cifar(56)) == 27


def test_shapes_halve_as_in_the_papers_table() -> None:
    with torch.device("meta"):
        model, x = resnet(50), torch.empty(1, 3, 224, 224)
    shapes = []
    for layer in list(model)[:-3]:
        x = layer(x)
        shapes.append((x.shape[1], x.shape[2]))
    assert list(dict.fromkeys(shapes)) == [
        (64, 112),
        (64, 56),
        (256, 56),
        (512, 28),
        (1024, 14),
        (2048, 7),
    ]
