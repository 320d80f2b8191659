"""The largest eigenvalue of a Hessian that is known by gradients alone."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Eigenvalue", "Gradient", "largest_eigenvalue"]

Gradient = Callable[[Tensor], Tensor]
"""From x (n,), float64, the function's gradient (n,) there."""

STEP = 1e-10
"""Of the differences that stand for a product with the Hessian, beside x's size.

A ReLU's gradient jumps, and a jump between the two points counts as a curvature of jump / step:
with 6e-6, which is best where a function is smooth, that made a network's largest eigenvalue ten
times too large. From 1e-9 to 1e-12 four digits are those of differentiating twice; and that cannot
always be done: fused attention has no second derivative, and autograd silently leaves out that of a
function marked `once_differentiable`.
"""

AGREE = 0.01
"""By how much, of the eigenvalue, a step of a fifth of that may change what was found."""

LEAST = 20
"""Products before an eigenvalue may count as found: the largest may show late."""


@dataclass(frozen=True)
class Eigenvalue:
    """What `largest_eigenvalue` found.

    Args:
        products: of the Hessian and a vector.
        converged: whether they sufficed for the tolerance, and steps of another size agree.
    """

    value: float
    products: int
    converged: bool


def largest_eigenvalue(
    gradient: Gradient, x: Tensor, tolerance: float, products: int, seed: int
) -> Eigenvalue:
    """The largest eigenvalue of the Hessian at x, by the Lanczos iteration.

    Away from a minimum others lie close to it, and negative ones are as large: power iteration
    creeps there, and a value that hardly changes any more may be far from the largest. Of the basis
    three vectors are kept. What rounding takes of its orthogonality brings back eigenvalues that
    were found already, and none that is larger (Paige 1980).

    Args:
        x: (n,), float64, on any device.
        tolerance: how small |Hv - λv|, v of norm 1, must become beside |λ|; λ is then no farther
            from an eigenvalue, and mostly much nearer.
        products: of the Hessian and a vector, at most. Should they not do, the eigenvalue is not
            below what is given.
        seed: of the first vector.
    """
    n = len(x)
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(n, dtype=torch.float64, generator=generator).to(x.device)
    v, before = v / v.norm(), torch.zeros_like(v)
    steepest, most = v, -torch.inf
    diagonal: list[float] = []
    beside: list[float] = []
    value, converged = 0.0, False
    while not converged and len(diagonal) < products:
        w = _product(gradient, x, v, STEP)
        diagonal.append(float(v @ w))
        if diagonal[-1] > most:
            steepest, most = v, diagonal[-1]
        w -= diagonal[-1] * v
        if beside:
            w -= beside[-1] * before
        left = float(w.norm())
        values, vectors = torch.linalg.eigh(_tridiagonal(diagonal, beside))
        value, residual = float(values[-1]), left * abs(float(vectors[-1, -1]))
        scale = float(values.abs().max())
        if left <= n * torch.finfo(torch.float64).eps * scale:  # the vectors span an eigenspace
            converged = True
        elif len(diagonal) >= min(LEAST, n):
            converged = residual <= tolerance * abs(value)
        beside.append(left)
        before, v = v, w / left if left else w
    if converged:
        nearer = float(steepest @ _product(gradient, x, steepest, STEP / 5))
        converged = abs(nearer - most) <= AGREE * abs(value)
    return Eigenvalue(value, len(diagonal), converged)


def _product(gradient: Gradient, x: Tensor, v: Tensor, step: float) -> Tensor:
    """Hv ≈ (∇f(x + hv) - ∇f(x - hv)) / 2h for |v| = 1, h = `step` times x's size."""
    h = step * max(1.0, float(x.norm()))
    return (gradient(x + h * v) - gradient(x - h * v)) / (2 * h)


def _tridiagonal(diagonal: list[float], beside: list[float]) -> Tensor:
    k = len(diagonal)
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    if k > 1:
        matrix += torch.diag(torch.tensor(beside[: k - 1], dtype=torch.float64), -1)
    return matrix  # of a symmetric one `eigh` reads the lower triangle
