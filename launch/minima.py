"""What is measured at minima: how sharp each is, and the loss on the line between two."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from headrace.pipeline.errors import InputError
from headrace.pipeline.hessian import Eigenvalue
from headrace.pipeline.objective import Objective
from headrace.pipeline.sharpness import (
    ALPHAS,
    Sharpness,
    directions,
    lambda_max,
    phi,
)

__all__ = ["STEPS", "Data", "Line", "Measured", "State", "measure", "measure_line"]

State = Mapping[str, Tensor]
"""Weights and buffers of a whole model, by its own names."""

STEPS = tuple(k / 10 for k in range(-10, 11))
"""Where the loss is taken along the worst direction, from -y to y."""


@dataclass(frozen=True)
class Data:
    """What a first stage reads; the other ranks know how much it is."""

    train: Iterable[Any]
    test: Iterable[Any] | None
    batches: int


@dataclass(frozen=True)
class Measured:
    """What was found at a checkpoint.

    Args:
        train, test: the loss and each metric; no test data gives none.
        full, subspace: φ by ε, in the whole space and in p random directions.
        worst: the loss along the worst direction that was found for the largest ε, at `STEPS`.
    """

    name: str
    train: dict[str, float]
    test: dict[str, float]
    full: dict[float, Sharpness]
    subspace: dict[float, Sharpness]
    curvature: Eigenvalue
    worst: list[float]


@dataclass(frozen=True)
class Line:
    """Loss and metrics at α x_l + (1 - α) x_s.

    Args:
        train, test: of each α; without test data, `test` is empty.
    """

    alphas: Sequence[float]
    train: Sequence[Mapping[str, float]]
    test: Sequence[Mapping[str, float]]


def measure(
    f: Objective,
    name: str,
    state: State,
    data: Data,
    metrics: Mapping[str, Any],
    epsilons: Sequence[float],
    p: int,
    seed: int,
) -> Measured:
    """All figures of one checkpoint; every rank takes part.

    Args:
        epsilons: of each φ, the largest first.
        p: how many random directions.
        seed: of them, of random starts and first vectors.

    Raises:
        InputError: the loss differs from pass to pass.
    """
    x = f.at(state)
    train = f.evaluate(x, data.train, metrics)
    test = f.evaluate(x, data.test, metrics) if data.test is not None else {}
    loss, _ = f(x)
    if loss != (again := f(x)[0]):
        raise InputError(
            f"the training loss is {loss:.10g}, and {again:.10g} on a second pass: the data must "
            "be the same in every pass, without random augmentation"
        )
    a = directions(len(x), p, seed)
    full = {e: phi(f, x, e, seed=seed) for e in epsilons}
    subspace = {e: phi(f, x, e, a, seed=seed) for e in epsilons}
    curvature = lambda_max(f, x, seed=seed)
    y = full[epsilons[0]].direction
    worst = [f.evaluate(x + t * y, data.train)["loss"] for t in STEPS]
    return Measured(name, train, test, full, subspace, curvature, worst)


def measure_line(
    f: Objective, states: Sequence[State], data: Data, metrics: Mapping[str, Any]
) -> Line:
    """Of loss and metrics over training and test data between two checkpoints and beyond."""
    train, test = [], []
    for alpha in ALPHAS:
        x = f.between(states[0], states[1], alpha)
        train.append(f.evaluate(x, data.train, metrics))
        if data.test is not None:
            test.append(f.evaluate(x, data.test, metrics))
    return Line(ALPHAS, train, test)
