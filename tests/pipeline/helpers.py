"""Models, data, optimizers and comparisons that the engine's tests share."""

import itertools
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .simulator import Batch, OptimizerFactory

__all__ = [
    "OPTIMIZERS",
    "SIZES",
    "adamw",
    "assert_close",
    "assert_same",
    "batches_of",
    "clone",
    "halve_slowly",
    "momentum",
    "normed",
    "plain",
    "tanh_net",
]

WIDTHS = (5, 9, 7, 11, 6, 8, 10, 6, 3)
# Layers per stage. Every stage is at least two layers deep and holds a nonlinearity: a single
# Linear as a stage hides what goes wrong between a forward and its backward.
SIZES = {1: [16], 2: [9, 7], 3: [5, 6, 5], 4: [4, 5, 4, 3]}


def tanh_net(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """16 layers, Linear and Tanh in turn, each of its own width."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(WIDTHS):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers).to(dtype)


def normed(seed: int = 0) -> nn.Sequential:
    """16 layers with a BatchNorm or a LayerNorm in every stage of four.

    No bias is followed by nothing but linear layers up to a BatchNorm: its gradient would be
    rounding noise, which AdamW's quotient blows up past any tolerance.
    """
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for j, (a, b) in enumerate(((5, 9), (9, 7), (7, 11), (11, 3))):
        norm = nn.BatchNorm1d(b) if j % 2 == 0 else nn.LayerNorm(b)
        layers += [nn.Linear(a, b, bias=j % 2 == 1), norm, nn.Linear(b, b), nn.Tanh()]
    return nn.Sequential(*layers).double()


def batches_of(
    samples: int, size: int, seed: int = 1, dtype: torch.dtype = torch.float64
) -> list[Batch]:
    """Regression data for WIDTHS in mini-batches of `size`, the last one smaller if it must be."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, WIDTHS[0], generator=generator, dtype=dtype)
    y = torch.randn(samples, WIDTHS[-1], generator=generator, dtype=dtype)
    return [(x[a : a + size], y[a : a + size]) for a in range(0, samples, size)]


def momentum(params: Iterable[tuple[str, nn.Parameter]]) -> Optimizer:
    return torch.optim.SGD(params, lr=0.05, momentum=0.9)


def adamw(params: Iterable[tuple[str, nn.Parameter]]) -> Optimizer:
    return torch.optim.AdamW(params, lr=3e-3, weight_decay=0.1)


OPTIMIZERS: dict[str, OptimizerFactory] = {"momentum": momentum, "adamw": adamw}


def halve_slowly(optimizer: Optimizer) -> LRScheduler:
    """A scheduler that shows whether it is stepped exactly once per update."""
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)


def plain(
    model: nn.Sequential,
    loss_fn: nn.Module,
    optimizer: OptimizerFactory,
    batches: Sequence[Batch],
    clip: float | None = None,
) -> tuple[float, list[float]]:
    """What a torch user would write for one device; gives the samples' mean loss and the norms."""
    opt, norms, total = optimizer(list(model.named_parameters())), [], 0.0
    model.train()
    for x, y in batches:
        opt.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        if clip is not None:
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), clip)))
        opt.step()
        total += loss.item() * len(x)
    return total / sum(len(x) for x, _ in batches), norms


def clone(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in state.items()}


def assert_close(
    got: Mapping[str, Tensor], wanted: Mapping[str, Tensor], tolerance: float = 1e-10
) -> None:
    """Every tensor of `wanted` is in `got`, no other is, and none differs by more."""
    assert set(got) == set(wanted)
    worst = {n: (got[n].double() - wanted[n].double()).abs().max().item() for n in wanted}
    name = max(worst, key=lambda n: worst[n])
    assert worst[name] <= tolerance, f"{name} differs by {worst[name]:.3g}; all: {worst}"
    assert all(torch.isfinite(v).all() for v in got.values())


def assert_same(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Bitwise the same."""
    assert set(got) == set(wanted)
    different = [n for n in wanted if not torch.equal(got[n], wanted[n])]
    assert not different, f"not bitwise the same: {different}"
