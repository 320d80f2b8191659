"""Parameter counts against the published ones."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from headrace.models import gpt, resnet, resnet_cifar, speech_dnn, vgg, vgg_cifar


@pytest.mark.parametrize(
    ("make", "parameters"),
    [
        (lambda: resnet(18), 11_689_512),
        (lambda: resnet(34), 21_797_672),
        (lambda: resnet(50), 25_557_032),
        (lambda: resnet(101), 44_549_160),
        (lambda: resnet(152), 60_192_808),
        (lambda: resnet_cifar(20), 269_722),  # the paper's table 6: 0.27M …
        (lambda: resnet_cifar(32), 464_154),  # 0.46M
        (lambda: resnet_cifar(44), 658_586),  # 0.66M
        (lambda: resnet_cifar(56), 853_018),  # 0.85M
        (lambda: resnet_cifar(110), 1_727_962),  # 1.7M
        (lambda: vgg(11), 132_863_336),  # the paper's table 2: 133M, 133M, 138M, 144M
        (lambda: vgg(13), 133_047_848),
        (lambda: vgg(16), 138_357_544),
        (lambda: vgg(19), 143_667_240),
        (lambda: vgg_cifar(16), 14_724_042),
        (
            speech_dnn,  # input layer, six hidden layers, output layer
            (429 * 2048 + 2048) + 6 * (2048 * 2048 + 2048) + (2048 * 9304 + 9304),
        ),
        (lambda: gpt(50257, 1024, 12, 768, 12), 124_439_808 + 50257 * 768),  # GPT-2 and a head
    ],
)
def test_parameters_are_as_many_as_published(
    make: Callable[[], nn.Sequential], parameters: int
) -> None:
    with torch.device("meta"):
        model = make()
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_vgg_and_resnet_take_images_of_the_papers_size() -> None:
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        features = vgg(11)[:15](image)  # up to Flatten; the classifier's 120M weights are slow
        assert features.shape == (1, 25088)
        assert resnet(50).eval()(image).shape == (1, 1000)


def test_the_speech_network_has_seven_sigmoid_layers_and_a_large_output() -> None:
    with torch.device("meta"):
        model = speech_dnn()
    widths = [layer.out_features for layer in model if isinstance(layer, nn.Linear)]
    assert widths == [2048] * 7 + [9304]
    assert sum(isinstance(layer, nn.Sigmoid) for layer in model) == 7
