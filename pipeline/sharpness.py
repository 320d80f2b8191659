"""How sharp a minimum is: Keskar's metric, the Hessian's largest eigenvalue, a line to another.

Pure mathematics over a function of all weights, one flat float64 vector x (n,), that gives the loss
and its gradient (n,); `Objective` is such a function. Float64 and no tolerances are not fussiness:
in a minimum the gradient is nearly 0, and a solver that may stop there has found nothing.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "ALPHAS",
    "Eigenvalue",
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


@dataclass(frozen=True)
class Eigenvalue:
    """What `lambda_max` found.

    Args:
        vector: (n,), of norm 1.
        products: of the Hessian and a vector.
        converged: whether they sufficed for the tolerance.
    """

    value: float
    vector: Tensor
    products: int
    converged: bool


def find_solver(part: str = "optimize") -> Any:
    """scipy's part of this name.

    Raises:
        ModuleNotFoundError: scipy is not installed; says how to install it.
    """
    try:
        return import_module(f"scipy.{part}")
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
    """The largest eigenvalue of f's Hessian at x, by restarted Lanczos iteration (ARPACK's).

    Away from a minimum others lie close to it, and negative ones are as large: power iteration
    creeps there, so that a value that hardly changes any more may be far from the largest.

    Args:
        x: (n,), float64.
        tolerance: how small |Hv - λv|, v of norm 1, must become beside |λ|; λ is then no
            farther from an eigenvalue, and mostly much nearer.
        products: of the Hessian and a vector, at most. Should they not do, the largest
            v·Hv among them is given, which the eigenvalue is not below.
        seed: of the first vector.

    Raises:
        ModuleNotFoundError: scipy is not installed.
    """
    solver = find_solver("sparse.linalg")
    n, made = len(x), 0
    best = (-math.inf, x)

    def product(v: Any) -> Any:
        nonlocal made, best
        if made == products:
            raise _EnoughError
        made += 1
        vector = torch.from_numpy(v).clone()  # of norm 1, as the start is
        w = _hessian_product(f, x, vector)
        best = max(best, (float(vector @ w), vector), key=itemgetter(0))
        return w.numpy()

    operator = solver.LinearOperator((n, n), product, dtype="float64")
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(n, dtype=torch.float64, generator=generator)
    start /= start.norm()
    try:
        first = product(start.numpy())
        if n == 1 or not first.any():  # ARPACK takes neither one row nor a Hessian of zeros
            return Eigenvalue(*best, made, True)
        values, vectors = solver.eigsh(
            operator, k=1, which="LA", v0=start.numpy(), tol=tolerance, maxiter=products,
            rng=seed,  # ranks that run it in step must all begin anew with the same vector
        )  # fmt: skip
    except _EnoughError:
        return Eigenvalue(*best, made, False)
    return Eigenvalue(float(values[0]), torch.from_numpy(vectors[:, 0]), made, True)


class _EnoughError(Exception):
    """As many products as were asked for."""


def _hessian_product(f: Function, x: Tensor, v: Tensor) -> Tensor:
    """Hv ≈ (∇f(x + hv) - ∇f(x - hv)) / 2h for |v| = 1.

    h is the cube root of float64's precision, times x's size: the error of rounding, as 1/h, and
    that of the third derivative, as h², are alike there.
    """
    h: float = torch.finfo(torch.float64).eps ** (1 / 3) * max(1.0, float(x.norm()))
    _, ahead = f(x + h * v)
    _, behind = f(x - h * v)
    return (ahead - behind) / (2 * h)


def between(x_s: Tensor, x_l: Tensor, alpha: float) -> Tensor:
    """The point α x_l + (1 - α) x_s of the line through two minima; exactly they at 0 and 1."""
    return alpha * x_l + (1 - alpha) * x_s
