"""A multi-layer perceptron, every linear layer, norm and activation a layer of its own."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pkgutil import resolve_name
from typing import Any

from torch import nn

from .checks import check_positive

__all__ = ["mlp"]


def mlp(
    widths: Sequence[int],
    *,
    activation: str | Callable[[], nn.Module] = "ReLU",
    norm: str | Callable[[int], nn.Module] | None = None,
    dropout: float = 0.0,
    he: bool = False,
) -> nn.Sequential:
    """Flatten, then Linear, norm, activation, dropout for each hidden width, then Linear.

    Input: (N, …) with widths[0] numbers a sample. Output: (N, widths[-1]). Weights start as
    torch's own `nn.Linear` does, which is too small for many layers of ReLU; see `he`.

    Args:
        widths: numbers of units, the input's first and the output's last: [64, 128, 10].
        activation: a function that makes a module, or its name: of a class in `torch.nn`
            ("Tanh"), or an import path ("my.module.Swish").
        norm: the same, called with the width: "LayerNorm", "BatchNorm1d". None: no norm.
        dropout: the share of hidden units dropped in training, in [0, 1).
        he: start from N(0, 2 / inputs) and biases of 0 (He et al. 2015), for deep ones.

    Raises:
        ValueError: fewer than two widths, a width below 1, `dropout` out of range, no such name.
    """
    if isinstance(widths, str) or len(widths) < 2:
        raise ValueError(
            f"widths={widths!r}: give at least the input's and the output's, such as [64, 10]"
        )
    for position, width in enumerate(widths):
        check_positive(**{f"widths[{position}]": width})
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout={dropout!r}: give a share in [0, 1)")
    make_activation = _maker("activation", activation)
    make_norm = None if norm is None else _maker("norm", norm)

    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(widths[:-1]):
        layers.append(nn.Linear(inputs, outputs))
        if make_norm is not None:
            layers.append(make_norm(outputs))
        layers.append(make_activation())
        if dropout > 0.0:
            layers.append(nn.Dropout(dropout))
    layers.append(nn.Linear(widths[-2], widths[-1]))
    for layer in layers:
        if he and isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


def _maker(argument: str, named: str | Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    if not isinstance(named, str):
        return named
    path = named if "." in named else f"torch.nn.{named}"
    try:
        found: Any = resolve_name(path)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"{argument}={named!r}: there is no {path}; give the name of a class in torch.nn,"
            " or an import path"
        ) from error
    if not callable(found):
        raise ValueError(f"{argument}={named!r}: {path} is not a class or function of modules")
    maker: Callable[..., nn.Module] = found
    return maker
