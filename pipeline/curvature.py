"""The curvature of a loss on one mini-batch, on one device, before a pipeline is built."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from .hessian import largest_eigenvalue
from .layers import materialise, named_layers
from .loss import Loss, call_loss
from .nest import Nest, map_tensors, to_device, to_double

__all__ = ["estimate_curvature"]

TOLERANCE = 1e-3
"""Of the eigenvalue: a residual as small as that ends it before all iterations are made."""


def estimate_curvature(
    model: nn.Sequential,
    loss_fn: Loss,
    batch: tuple[Nest, Nest],
    iterations: int = 20,
    *,
    layers: Sequence[str] | None = None,
    device: torch.device | None = None,
    seed: int = 0,
) -> float:
    """The largest curvature h of the loss along the trainable weights, at their present values.

    It is that of one mini-batch, and of where the weights are: training often raises it. Few
    iterations give less than it is. The model and the random state stay as they were.

    Args:
        batch: input and target, (N, …).
        iterations: products of the Hessian with a vector, at most, each two runs forward and
            backward, in float64.
        layers: the names of those whose weights count, as a stage's; None: of all.
        device: where to take it, with room for the whole model; None is the CPU.
        seed: of the first direction, of dropout, and of layers on the meta device.

    Raises:
        ValueError: iterations below 1.
    """
    if iterations < 1:
        raise ValueError(f"iterations={iterations!r}: give a whole number >= 1")
    device = device or torch.device("cpu")

    def prepared(part: Nest) -> Nest:
        return map_tensors(to_double, to_device(map_tensors(torch.detach, part), device))

    x, target = map(prepared, batch)
    if isinstance(loss_fn, nn.Module):
        loss_fn = copy.deepcopy(loss_fn).to(device).double()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        model = copy.deepcopy(model)
        named = named_layers(model)
        for name, layer in named:
            materialise(name, layer, seed, device)
        model.to(device).double()
        counted = [layer for name, layer in named if layers is None or name in layers]
        found = {id(p): p for layer in counted for p in layer.parameters() if p.requires_grad}
        weights = list(found.values())
        if not weights:
            return 0.0

        def gradient(point: Tensor) -> Tensor:
            with torch.no_grad():
                vector_to_parameters(point, weights)
            torch.manual_seed(seed)
            loss = call_loss(loss_fn, model(map_tensors(torch.clone, x)), target)
            found = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
            return parameters_to_vector(found)

        here = parameters_to_vector(weights).detach().clone()
        return largest_eigenvalue(gradient, here, TOLERANCE, iterations, seed).value
