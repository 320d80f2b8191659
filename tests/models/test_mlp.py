"""The perceptron's layers, and its network of sigmoid layers that starts like one of tanh."""

import torch
from torch import nn

from headrace.models import mlp, speech_dnn


def kinds(model: nn.Sequential) -> list[str]:
    return [type(layer).__name__ for layer in model]


def test_every_part_is_a_layer_of_its_own() -> None:
    model = mlp([6, 4, 4, 2], activation="Tanh", norm="LayerNorm", dropout=0.5)
    hidden = ["Linear", "LayerNorm", "Tanh", "Dropout"]
    assert kinds(model) == ["Flatten", *hidden, *hidden, "Linear"]


def test_no_hidden_width_is_a_linear_classifier() -> None:
    assert kinds(mlp([6, 2])) == ["Flatten", "Linear"]


def test_activation_and_norm_are_names_paths_or_functions() -> None:
    by_path = mlp([6, 4, 2], activation="torch.nn.ELU", norm="torch.nn.BatchNorm1d")
    by_function = mlp([6, 4, 2], activation=nn.ELU, norm=nn.BatchNorm1d)
    assert kinds(by_path) == ["Flatten", "Linear", "BatchNorm1d", "ELU", "Linear"]
    assert kinds(by_function) == kinds(by_path)


def test_the_speech_network_starts_as_the_tanh_network_it_stands_for() -> None:
    torch.manual_seed(0)
    model = speech_dnn(30, 40, 3, 50).double()
    x = torch.randn(8, 30, dtype=torch.float64)

    linear = [layer for layer in model if isinstance(layer, nn.Linear)]
    hidden = x
    for layer, scale in zip(linear[:-1], (2, 4, 4), strict=True):
        bound = (6 / (layer.in_features + layer.out_features)) ** 0.5
        glorot = layer.weight / scale
        assert glorot.abs().max() <= bound
        hidden = torch.tanh(hidden @ glorot.T)

    expected = hidden @ (linear[-1].weight / 2).T
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-6)  # it started in float32


def test_the_speech_network_passes_gradients_to_its_first_layer() -> None:
    # With torch's own start the first layer's gradient is a millionth of the last one's.
    torch.manual_seed(0)
    model = speech_dnn(64, 128, 7, 100)
    loss = nn.functional.cross_entropy(model(torch.randn(32, 64)), torch.randint(100, (32,)))
    torch.autograd.backward(loss)
    norms = [layer.weight.grad.norm() for layer in model if isinstance(layer, nn.Linear)]  # type: ignore[union-attr]
    assert norms[0] > norms[-1] / 100
