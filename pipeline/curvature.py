"""The curvature of a loss: the largest eigenvalue of its Hessian, by power iterations."""

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .layers import materialise, named_layers
from .loss import Loss, call_loss
from .nest import Nest, map_tensors, to_device

__all__ = ["estimate_curvature"]

Vector = list[Tensor]
"""A direction among weights: one tensor for each, of its shape."""


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
    iterations give a little less than it is. The model and the random state stay as they were.

    Args:
        batch: input and target, (N, …).
        iterations: products of the Hessian with a vector, each two runs forward and backward; as
            many again where the curvature that is largest in size is negative.
        layers: the names of those whose weights count, as a stage's; None: of all.
        device: where to take it, with room for the whole model; None is the CPU.
        seed: of the first direction, of dropout, and of layers on the meta device.

    Raises:
        ValueError: iterations below 1.
    """
    if iterations < 1:
        raise ValueError(f"iterations={iterations!r}: give a whole number >= 1")
    device = device or torch.device("cpu")
    x, target = (to_device(map_tensors(torch.detach, part), device) for part in batch)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        model = copy.deepcopy(model)
        named = named_layers(model)
        for name, layer in named:
            materialise(name, layer, seed, device)
        model.to(device)
        counted = [layer for name, layer in named if layers is None or name in layers]
        found = {id(p): p for layer in counted for p in layer.parameters() if p.requires_grad}
        weights: Vector = list(found.values())
        if not weights:
            return 0.0

        def loss() -> Tensor:
            torch.manual_seed(seed)
            return call_loss(loss_fn, model(map_tensors(torch.clone, x)), target)

        return _largest(_by_differences(loss, weights), weights, iterations, seed)


def _by_differences(loss: Callable[[], Tensor], weights: Vector) -> Callable[[Vector], Vector]:
    """Hessian times unit vector, from the gradients a little ahead and a little behind.

    Differentiating twice would not do: fused attention has no second derivative, and autograd
    silently leaves out that of a function marked `once_differentiable`.
    """
    here = [weight.detach().clone() for weight in weights]
    step = math.sqrt(torch.finfo(weights[0].dtype).eps) * (1 + _norm(here))

    def gradient(vector: Vector, step: float) -> tuple[Tensor, ...]:
        with torch.no_grad():
            for weight, middle, along in zip(weights, here, vector, strict=True):
                weight.copy_(middle + step * along)
        return torch.autograd.grad(loss(), weights, allow_unused=True, materialize_grads=True)

    def product(vector: Vector) -> Vector:
        both = zip(gradient(vector, step), gradient(vector, -step), strict=True)
        return [(ahead - behind) / (2 * step) for ahead, behind in both]

    return product


def _largest(
    product: Callable[[Vector], Vector], weights: Vector, iterations: int, seed: int
) -> float:
    """The largest eigenvalue; the one that is largest in size may be negative."""
    found = _iterate(product, weights, iterations, seed, 0.0)
    return found if found >= 0 else _iterate(product, weights, iterations, seed, -found)


def _iterate(
    product: Callable[[Vector], Vector], weights: Vector, iterations: int, seed: int, shift: float
) -> float:
    """Power iterations on H + shift·1; gives H's eigenvalue."""
    generator = torch.Generator().manual_seed(seed)
    vector = [torch.randn(w.shape, generator=generator).to(w) for w in weights]
    value = 0.0
    for _ in range(iterations):
        norm = _norm(vector)
        if norm == 0:
            return -shift
        vector = [v / norm for v in vector]
        after = [p + shift * v for p, v in zip(product(vector), vector, strict=True)]
        value = sum(torch.sum(a * v).item() for a, v in zip(after, vector, strict=True)) - shift
        vector = after
    return value


def _norm(vector: Vector) -> float:
    return math.sqrt(sum(torch.sum(v.double() ** 2).item() for v in vector))
