"""Sharpness: exact on quadratics, the solver's traps, and a network's own loss as the function."""

import itertools
import math
import sys
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headrace.models import mlp
from headrace.pipeline.objective import Objective
from headrace.pipeline.sharpness import (
    ALPHAS,
    Function,
    between,
    box,
    directions,
    lambda_max,
    phi,
)

pytest.importorskip("scipy")


def quadratic(curvature: Tensor, minimum: Tensor, c: float) -> Function:
    """c + ½ Σ l_i (x_i - minimum_i)²."""

    def f(x: Tensor) -> tuple[float, Tensor]:
        z = x - minimum
        return c + 0.5 * float(curvature @ z.square()), curvature * z

    return f


def case(n: int = 40, spread: float = 10.0) -> tuple[Function, Tensor, Tensor]:
    """A quadratic, its minimum, and its curvatures, from 1/spread to spread."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n, dtype=torch.float64, generator=generator)
    end = math.log10(spread)
    curvature = torch.logspace(-end, end, n, dtype=torch.float64)
    return quadratic(curvature, x, 0.02), x, curvature


@pytest.mark.parametrize("epsilon", [1e-3, 5e-4])
def test_phi_of_the_whole_space_is_exact_on_a_quadratic(epsilon: float) -> None:
    f, x, curvature = case(spread=5.0)
    b = epsilon * (x.abs() + 1)
    found = phi(f, x, epsilon)
    wanted = 100 * 0.5 * float(curvature @ b.square()) / 1.02
    assert found.phi == pytest.approx(wanted, rel=1e-12)
    assert torch.allclose(found.direction.abs(), b, rtol=1e-12)
    assert found.loss == pytest.approx(0.02 + 0.5 * float(curvature @ b.square()), rel=1e-12)


def test_of_many_weights_ten_iterations_find_nearly_all_of_it() -> None:
    """Of weights whose curvatures are far apart some are not in their corner yet."""
    f, x, curvature = case(1000, spread=100.0)
    wanted = 100 * 0.5 * float(curvature @ box(x, 1e-3).square()) / 1.02
    assert 0.99 * wanted < phi(f, x, 1e-3).phi < wanted


def test_from_0_the_solver_stays_in_a_minimum_and_from_a_random_start_it_does_not() -> None:
    """The trap: φ = 0 in an exact minimum, where the paper's start leads nowhere."""
    scipy = pytest.importorskip("scipy.optimize")
    f, x, _ = case()
    half = box(x, 1e-3).numpy()

    def negative(z: Any) -> tuple[float, Any]:
        loss, gradient = f(x + torch.from_numpy(z))
        return -loss, -gradient.numpy()

    stuck = scipy.minimize(
        negative, 0 * half, jac=True, method="L-BFGS-B", bounds=scipy.Bounds(-half, half),
        options={"maxiter": 10, "ftol": 0.0, "gtol": 0.0},
    )  # fmt: skip
    assert (stuck.nit, stuck.fun) == (0, -0.02)
    found = phi(f, x, 1e-3)
    assert found.start == "random" and 0 < found.iterations <= 10 and found.phi > 0


def test_near_a_minimum_a_tolerance_would_stop_the_solver() -> None:
    """scipy's own gtol of 1e-5 would end both starts at once; there are no tolerances here."""
    n = 30
    x = torch.zeros(n, dtype=torch.float64)
    curvature = torch.full((n,), 1e-3, dtype=torch.float64)
    f = quadratic(curvature, x + 1e-6, 1.5e-5)
    corner = 0.5 * 1e-3 * n * ((1e-3 + 1e-6) ** 2 - 1e-12)
    assert phi(f, x, 1e-3).phi == pytest.approx(100 * corner / (1 + 1.5e-5), rel=1e-6)


def test_phi_of_one_direction_is_exact() -> None:
    f, x, curvature = case()
    a = directions(len(x), 1, seed=5)
    b = 1e-3 * (abs(float(a[:, 0] @ x / (a[:, 0] @ a[:, 0]))) + 1)
    wanted = 100 * 0.5 * float(curvature @ a[:, 0].square()) * b * b / 1.02
    assert phi(f, x, 1e-3, a).phi == pytest.approx(wanted, rel=1e-12)


def test_phi_of_a_few_directions_is_the_best_corner_of_the_box() -> None:
    """Of a convex function the maximum is in a corner: all 2⁴ of them tried."""
    f, x, _ = case()
    a = directions(len(x), 4, seed=5)
    half = box(x, 1e-3, a)
    z = torch.linalg.pinv(a) @ x
    assert torch.allclose(half, 1e-3 * (z.abs() + 1), rtol=1e-10)
    corners = [torch.tensor(s, dtype=torch.float64) for s in itertools.product((-1, 1), repeat=4)]
    best = max(f(x + a @ (corner * half))[0] for corner in corners)
    found = phi(f, x, 1e-3, a)
    assert found.loss == pytest.approx(best, rel=1e-12)
    assert torch.allclose(a @ (torch.linalg.pinv(a) @ found.direction), found.direction)


def test_directions_are_of_the_seed() -> None:
    a = directions(3000, 100, seed=1)
    assert a.shape == (3000, 100) and a.dtype is torch.float64
    assert torch.equal(a, directions(3000, 100, seed=1))
    assert abs(float(a.mean())) < 0.01 and float(a.std()) == pytest.approx(1, abs=0.01)


def test_lambda_max_of_a_known_hessian() -> None:
    f, x, _ = case()
    found = lambda_max(f, x + 0.1, tolerance=1e-5)
    assert found.converged
    assert found.value == pytest.approx(10, rel=1e-6)


def test_lambda_max_is_the_largest_even_where_the_most_negative_is_larger() -> None:
    curvature = torch.tensor([-5.0, 2.0, 1.0, -1.0], dtype=torch.float64)
    x = torch.zeros(4, dtype=torch.float64)
    found = lambda_max(quadratic(curvature, x, 1.0), x, tolerance=1e-5)
    assert found.value == pytest.approx(2, rel=1e-6)


def test_lambda_max_where_the_most_negative_is_as_large() -> None:
    """v·Hv of a mixture of both stays the same, near 0, and was taken for the largest once."""
    curvature = torch.tensor([-2.0, 2.0, 1.0, 0.1], dtype=torch.float64)
    x = torch.zeros(4, dtype=torch.float64)
    found = lambda_max(quadratic(curvature, x, 1.0), x)
    assert found.converged and found.value == pytest.approx(2, rel=5e-3)


def test_lambda_max_says_when_it_has_not_converged() -> None:
    f, x, _ = case()
    found = lambda_max(f, x, tolerance=1e-5, products=3)
    assert (found.converged, found.products) == (False, 3)
    assert 0 < found.value < 10, "v·Hv of a unit vector"


@pytest.mark.parametrize("curvature", [[0.0], [3.0], [-3.0], [0.0] * 30, [-1.0] * 30, [2.0, 2.0]])
def test_lambda_max_where_few_vectors_span_all(curvature: list[float]) -> None:
    """One weight, a Hessian of zeros, one that is the same in every direction."""
    h = torch.tensor(curvature, dtype=torch.float64)
    found = lambda_max(quadratic(h, 0 * h, 1.0), 0 * h)
    assert found.converged and found.value == pytest.approx(float(h.max()), abs=1e-9)
    assert lambda_max(quadratic(h, 0 * h, 1.0), 0 * h) == found, "ranks run it in step"


def test_lambda_max_among_many_that_are_close() -> None:
    """Power iteration said 9.94 to 9.96 here, and converged."""
    curvature = torch.cat(
        [torch.linspace(9, 10, 500).double(), torch.linspace(-9.9, 0, 500).double()]
    )
    f, x = quadratic(curvature, 0 * curvature, 1.0), 0 * curvature
    for seed in range(8):
        found = lambda_max(f, x, seed=seed)
        assert found.converged and found.value == pytest.approx(10, rel=1e-3)


def test_the_line_goes_through_both() -> None:
    a, b = torch.randn(2, 50, dtype=torch.float64)
    assert len(ALPHAS) == 25 and (ALPHAS[0], ALPHAS[8], ALPHAS[16], ALPHAS[24]) == (-1, 0, 1, 2)
    assert torch.equal(between(a, b, 0.0), a) and torch.equal(between(a, b, 1.0), b)
    assert torch.allclose(between(a, b, 2.0), 2 * b - a)


def test_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    f, x, _ = case()
    with pytest.raises(ValueError, match=r"^epsilon=0: give a number above 0, such as 1e-3$"):
        phi(f, x, 0)
    with pytest.raises(ValueError, match=r"^x has dtype torch.float32: .*x\.double\(\)$"):
        phi(f, x.float(), 1e-3)
    with pytest.raises(ValueError, match=r"^f\(x\)=-2: φ divides by 1 \+ f\(x\)"):
        phi(quadratic(x, x, -2.0), x, 1e-3)
    with pytest.raises(ValueError, match=r"^p=41: of 40 weights give from 1 to 40 directions$"):
        directions(40, 41, 0)
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'headrace\[sharpness\]'$"):
        phi(f, x, 1e-3)


# A network's loss ---------------------------------------------------------------------------


def data(samples: int = 30, size: int = 5) -> list[tuple[Tensor, Tensor]]:
    """Mini-batches of unequal sizes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, size, generator=generator)
    y = torch.randint(0, 3, (samples,), generator=generator)
    return list(zip(x.split(8), y.split(8), strict=True))


def network(norm: str | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    return mlp([5, 6, 6, 3], norm=norm)


def plain(model: nn.Sequential, batches: list[tuple[Tensor, Tensor]]) -> tuple[float, Tensor]:
    """The same by autograd, on everything at once."""
    model = model.double().eval()
    x, y = (torch.cat(each) for each in zip(*batches, strict=True))
    loss = nn.functional.cross_entropy(model(x.double()), y)
    gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    return loss.item(), torch.cat([g.flatten() for g in gradients])


@pytest.mark.parametrize("stages", [1, 3])
def test_the_loss_and_its_gradient_are_autograd_s(stages: int) -> None:
    batches = data()
    state = network().state_dict()
    loss, gradient = plain(network(), batches)
    with Objective(
        network(), nn.CrossEntropyLoss(), batches, len(batches), stages=stages, micro_batches=2
    ) as f:
        x = f.at(state)
        for _ in range(2):  # and again: nothing is left over
            found = f(x)
            assert found[0] == pytest.approx(loss, rel=1e-13)
            assert torch.allclose(found[1], gradient, rtol=1e-11, atol=1e-15)


def test_batch_norm_is_in_evaluation_mode() -> None:
    model = network("BatchNorm1d")
    for x, _ in data():
        model(x)  # statistics of its own
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batches = data()
    loss, gradient = plain(model, batches)
    fresh = network("BatchNorm1d")
    with Objective(fresh, nn.CrossEntropyLoss(), batches, len(batches), stages=2) as f:
        x = f.at(state)
        found = f(x)
        scores = f.evaluate(x, batches)
        after = f.pipeline.state_dict()
    assert found[0] == pytest.approx(loss, rel=1e-12) == scores["loss"]
    assert torch.allclose(found[1], gradient, rtol=1e-10, atol=1e-14)
    for name, tensor in state.items():
        if "running" in name or "tracked" in name:
            assert torch.equal(after[name], tensor.double() if "running" in name else tensor)


def test_frozen_and_unused_and_tied_weights() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(5, 5), nn.Linear(2, 2)
            self.tied = self.used

        def forward(self, x: Tensor) -> Tensor:
            return self.tied(self.used(x).tanh())  # type: ignore[no-any-return]

    def make() -> nn.Sequential:
        torch.manual_seed(1)
        model = nn.Sequential(Odd(), nn.Linear(5, 3))
        model[1].bias.requires_grad_(False)
        return model

    batches = data()
    model = make().double()
    xs, ys = (torch.cat(each) for each in zip(*batches, strict=True))
    nn.functional.cross_entropy(model(xs.double()), ys).backward()
    wanted = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    wanted.pop()
    with Objective(make(), nn.CrossEntropyLoss(), batches, len(batches)) as f:
        _, gradient = f(f.at(make().state_dict()))
    assert torch.allclose(gradient, torch.cat([g.flatten() for g in wanted]), rtol=1e-10)


def test_lambda_max_of_a_network_is_that_of_its_hessian() -> None:
    batches = data()
    torch.manual_seed(0)
    model = mlp([5, 4, 3], activation="Tanh")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    xs, ys = (torch.cat(each) for each in zip(*batches, strict=True))
    model = model.double()
    names, sizes = zip(*[(n, p.shape) for n, p in model.named_parameters()], strict=True)

    def loss(flat: Tensor) -> Tensor:
        pieces = flat.split([s.numel() for s in sizes])
        weights = {n: p.view(s) for n, p, s in zip(names, pieces, sizes, strict=True)}
        return nn.functional.cross_entropy(
            torch.func.functional_call(model, weights, (xs.double(),)), ys
        )

    with Objective(mlp([5, 4, 3], activation="Tanh"), nn.CrossEntropyLoss(), batches, 4) as f:
        x = f.at(state)
        hessian = torch.autograd.functional.hessian(loss, x)
        assert isinstance(hessian, Tensor)
        found = lambda_max(f, x, tolerance=1e-6)
    assert found.converged and found.value == pytest.approx(
        float(torch.linalg.eigvalsh(hessian)[-1]), rel=1e-5
    )


@pytest.mark.parametrize("seed", range(3))
def test_lambda_max_of_relus_is_of_the_hessian_and_not_of_their_kinks(seed: int) -> None:
    """A step across a kink takes the jump of the gradient for a curvature, ten times too large."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2000, 8, generator=generator)
    y = torch.randint(0, 3, (2000,), generator=generator)
    torch.manual_seed(seed)
    model = mlp([8, 64, 64, 3])
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model = model.double()
    weights = list(model.parameters())
    loss = nn.functional.cross_entropy(model(x.double()), y)
    gradient = torch.cat(
        [g.flatten() for g in torch.autograd.grad(loss, weights, create_graph=True)]
    )

    def product(v: Any) -> Any:
        along = gradient @ torch.from_numpy(v.copy())
        pieces = torch.autograd.grad(along, weights, retain_graph=True)
        return torch.cat([piece.flatten() for piece in pieces]).numpy()

    sparse = import_module("scipy.sparse.linalg")
    n = len(gradient)
    hessian = sparse.LinearOperator((n, n), product, dtype="float64")
    (wanted,) = sparse.eigsh(hessian, 1, which="LA", return_eigenvectors=False, rng=0)
    with Objective(mlp([8, 64, 64, 3]), nn.CrossEntropyLoss(), [(x, y)], 1) as f:
        found = lambda_max(f, f.at(state), seed=seed)
    assert found.converged and found.value == pytest.approx(wanted, rel=1e-4)


def test_lambda_max_across_a_kink_is_not_called_converged() -> None:
    """|x| has no curvature, and at 0 its gradient jumps."""
    x = torch.tensor([0.0, 1.0], dtype=torch.float64)
    found = lambda_max(lambda x: (float(x.abs().sum()), x.sign()), x)
    assert not found.converged


def test_running_variances_stay_positive_on_the_line() -> None:
    batches = data()
    small, large = network("BatchNorm1d"), network("BatchNorm1d")
    for x, _ in batches:
        large(9 * x)
    a = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    b = {name: tensor.clone() for name, tensor in large.state_dict().items()}
    with Objective(network("BatchNorm1d"), nn.CrossEntropyLoss(), batches, len(batches)) as f:
        ends = [f.evaluate(f.at(state), batches)["loss"] for state in (a, b)]
        line = {
            alpha: f.evaluate(f.between(a, b, alpha), batches)["loss"] for alpha in (-1.0, 0, 1, 2)
        }
    assert (line[0], line[1]) == tuple(ends)
    assert all(value == value for value in line.values())


def test_what_an_objective_refuses() -> None:
    batches = data()
    loss = nn.CrossEntropyLoss()
    frozen = network().requires_grad_(False)
    with pytest.raises(ValueError, match=r"^the model has no weight that requires a gradient"):
        Objective(frozen, loss, batches, 4)
    with Objective(network(), loss, batches, 4) as f:
        with pytest.raises(
            ValueError, match=r"do not fit the model: 1.weight \(6, 5\), given \(7, 5\)"
        ):
            f.at({**network().state_dict(), "1.weight": torch.zeros(7, 5)})
        with pytest.raises(ValueError, match=r"x is unknown, given \(1,\)"):
            f.at({**network().state_dict(), "x": torch.zeros(1)})
    for wrong in (3, 5):
        with Objective(network(), loss, batches, wrong) as f:
            x = f.at(network().state_dict())
            with pytest.raises(ValueError, match=f"^batches={wrong}, and the loader gave 4: "):
                f(x)
