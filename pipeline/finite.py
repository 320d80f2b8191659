"""Say where something that is not finite came from: run the micro-batch again, layer by layer."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .layers import named_layers
from .nest import Nest, is_differentiable, leaves, map_tensors
from .stage import Flight, Stage

__all__ = ["explain"]


def explain(stage: Stage, flight: Flight, gradients: Sequence[Tensor | None] | None) -> str | None:
    """Name the first layer at fault of a micro-batch whose loss or gradient is not finite.

    Args:
        gradients: what came from the stage after, as in `Stage.backward`; None: a guess.

    Returns:
        One sentence; None where the input was at fault already, so that a stage before this one
        will say it better.
    """
    if not _finite(flight.x):
        return None if not stage.is_first else "its input is not finite: look at the data"
    inputs: list[Nest] = []
    x = flight.x
    with torch.no_grad(), stage.autocasting():
        for name, layer in named_layers(stage.layers):
            inputs.append(map_tensors(torch.detach, x))
            x = _call(stage, flight, layer, map_tensors(torch.clone, x))
            if not _finite(x):
                return f"the output of {_title(name, layer)} is not finite, its input is"
    if stage.is_last and not _finite(stage.take_loss(x, flight.target)):
        return "the loss is not finite, the model's output is: look at the loss and the targets"
    if gradients is None:
        gradients = flight.guess or []
        if not _finite([*gradients]):
            return (
                "the gradient that the stage's own rule gave is not finite: lower the learning "
                "rate of its synthesizer or head"
            )
    if not _finite([*gradients]):
        return "the gradient from the next stage is not finite"
    return _explain_backward(stage, flight, inputs, gradients)


def _explain_backward(
    stage: Stage, flight: Flight, inputs: list[Nest], gradients: Sequence[Tensor | None]
) -> str:
    layers = named_layers(stage.layers)
    upstream: list[Any] = [*gradients]
    for (name, layer), x in zip(reversed(layers), reversed(inputs), strict=True):
        x = map_tensors(lambda t: t.requires_grad_(is_differentiable(t)), x)
        handed = map_tensors(torch.clone, x)
        with stage.autocasting():
            output = _call(stage, flight, layer, handed)
            last = stage.is_last and layer is layers[-1][1]
            tops = [stage.take_loss(output, flight.target)] if last else leaves(output)
        tops_and = zip(tops, [None] if last else upstream, strict=False)
        pairs = [(t, g) for t, g in tops_and if t.requires_grad and (last or g is not None)]
        weights = [w for w in _weights(stage, flight, name) if w.requires_grad]
        targets = [t for t in leaves(x) if t.requires_grad]
        if not pairs or not (weights or targets):
            break
        found = torch.autograd.grad(
            [t for t, _ in pairs], [*targets, *weights], [g for _, g in pairs], allow_unused=True
        )
        if not _finite(list(found)):
            return f"the gradient in {_title(name, layer)} is not finite, what it came from is"
        gradients_of = dict(zip(map(id, targets), found, strict=False))
        upstream = [gradients_of.get(id(t)) for t in leaves(x)]
    return "a gradient is not finite (no layer alone shows it when run again)"


def _weights(stage: Stage, flight: Flight, name: str) -> list[Tensor]:
    source = flight.weights.leaves if flight.weights else stage.trainable
    return [source[each] for each in stage.places.names(name) if each in source]


def _call(stage: Stage, flight: Flight, layer: nn.Module, x: Nest) -> Nest:
    with stage.places.holding(flight.weights.leaves if flight.weights else {}):
        result: Nest = layer(x)
    return result


def _finite(nest: Nest) -> bool:
    return all(t.isfinite().all() for t in leaves(nest) if is_differentiable(t))


def _title(name: str, layer: nn.Module) -> str:
    return f"layer '{name}' ({type(layer).__name__})"
