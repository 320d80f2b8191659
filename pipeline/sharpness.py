"""How sharp a minimum is: Keskar's metric, the Hessian's largest eigenvalue, a line to another.

Pure mathematics over a function of all weights, one flat float64 vector x (n,), that gives the loss
and its gradient (n,); `Objective` is such a function. Float64 and no tolerances are not fussiness:
in a minimum the gradient is nearly 0, and a solver that may stop there has found nothing.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .hessian import Eigenvalue, largest_eigenvalue

__all__ = [
    "ALPHAS",
    "Function",
    "Sharpness",
    "between",
    "box",
    "directions",
    "find_solver",
    "lambda_max",
    "phi",
]

Function = Callable[[Tensor], tuple[float, Tensor]]
"""From x (n,), float64, the loss and its gradient (n,)."""

ALPHAS = tuple(-1 + k / 8 for k in range(25))
"""The 25 points of the parametric line, from -1 to 2; 0 and 1 are among them."""

ITERATIONS = 10
"""Of L-BFGS-B, as in the paper."""


@dataclass(frozen=True)
class Sharpness:
    """What `phi` found.

    Args:
        phi: percent.
        loss: the largest that was found in the box.
        direction: y (n,): from x to where that is.
        start: "0" or "random": from which of the two starts.
        iterations: the solver's, from there.
    """

    phi: float
    loss: float
    direction: Tensor
    start: str
    iterations: int


def find_solver() -> Any:
    """scipy's `optimize`.

    Raises:
        ModuleNotFoundError: scipy is not installed; says how to install it.
    """
    try:
        return import_module("scipy.optimize")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "sharpness needs scipy, which is not installed: pip install 'headrace[sharpness]'",
            name=error.name,
        ) from error


def directions(n: int, p: int, seed: int) -> Tensor:
    """A (n, p): p random directions in the space of n weights, each element from N(0, 1).

    Raises:
        ValueError: p is not from 1 to n.
    """
    if not 1 <= p <= n:
        raise ValueError(f"p={p}: of {n} weights give from 1 to {n} directions")
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, p, dtype=torch.float64, generator=generator)


def box(x: Tensor, epsilon: float, a: Tensor | None = None) -> Tensor:
    """Half the box's sides: ε(|(A⁺x)_i| + 1), (p,); with A = I, the whole space, (n,).

    A⁺x solves the least squares Az ≈ x, by A = QR: nothing of n × n is made.

    Args:
        a: A (n, p), of full rank; None is I.

    Raises:
        ValueError: ε is not above 0.
    """
    if not 0 < epsilon < math.inf:
        raise ValueError(f"epsilon={epsilon!r}: give a number above 0, such as 1e-3")
    if a is None:
        return epsilon * (x.abs() + 1)
    q, r = torch.linalg.qr(a)
    z: Tensor = torch.linalg.solve_triangular(r, (q.T @ x).unsqueeze(1), upper=True).squeeze(1)
    return epsilon * (z.abs() + 1)


def phi(
    f: Function, x: Tensor, epsilon: float, a: Tensor | None = None, seed: int = 0
) -> Sharpness:
    """φ = 100 · (max_{z ∈ C} f(x + Az) - f(x)) / (1 + f(x)), C = {z: |z_i| <= `box`}.

    The maximum is what L-BFGS-B finds in 10 iterations with no tolerances, the better of two
    starts: 0, as in the paper, where an exact minimum would stop it at once, and a random point of
    the box. It is a lower bound of the true one. Source: Keskar et al. 2017, "On large-batch
    training for deep learning", metric 2.1.

    Args:
        x: (n,), float64.
        a: A (n, p), of full rank; None is I, the whole space.
        seed: of the random start.

    Raises:
        ModuleNotFoundError: scipy is not installed.
        ValueError: x is not float64, ε not above 0, or f(x) <= -1.
    """
    if x.dtype is not torch.float64:
        raise ValueError(f"x has dtype {x.dtype}: rounding hides a minimum's curvature, so give "
                         "float64, as in x.double()")  # fmt: skip
    solver, half = find_solver(), box(x, epsilon, a)
    centre, _ = f(x)
    if centre <= -1:
        raise ValueError(f"f(x)={centre:g}: φ divides by 1 + f(x), so give a loss above -1")

    def displace(z: Tensor) -> Tensor:
        return z if a is None else a @ z

    def negative(z: Any) -> tuple[float, Any]:
        loss, gradient = f(x + displace(torch.from_numpy(z)))
        return -loss, -(gradient if a is None else a.T @ gradient).numpy()

    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(len(half), dtype=torch.float64, generator=generator)
    best = Sharpness(0.0, centre, torch.zeros_like(x), "0", 0)
    for name, start in (("0", torch.zeros_like(half)), ("random", (2 * uniform - 1) * half)):
        found = solver.minimize(
            negative,
            start.numpy(),
            jac=True,
            method="L-BFGS-B",
            bounds=solver.Bounds(-half.numpy(), half.numpy()),
            options={"maxiter": ITERATIONS, "ftol": 0.0, "gtol": 0.0},
        )
        loss = -float(found.fun)
        if loss > best.loss:
            value = 100 * (loss - centre) / (1 + centre)
            y = displace(torch.from_numpy(found.x.copy()))
            best = Sharpness(value, loss, y, name, int(found.nit))
    return best


def lambda_max(
    f: Function, x: Tensor, tolerance: float = 1e-3, products: int = 300, seed: int = 0
) -> Eigenvalue:
    """The largest eigenvalue of f's Hessian at x (n,), float64; see `largest_eigenvalue`."""
    return largest_eigenvalue(lambda x: f(x)[1], x, tolerance, products, seed)


def between(x_s: Tensor, x_l: Tensor, alpha: float) -> Tensor:
    """The point α x_l + (1 - α) x_s of the line through two minima; exactly they at 0 and 1."""
    return alpha * x_l + (1 - alpha) * x_s
