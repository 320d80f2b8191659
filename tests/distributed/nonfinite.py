"""Programs in which something is not finite: a weight, the data, an output, a loss, a gradient."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim import Optimizer

from headrace.pipeline import Pipeline, StageStatistics

__all__ = [
    "AT",
    "COUNT",
    "EPOCHS",
    "FLUSH",
    "FOUND",
    "SKIPPED",
    "Poison",
    "Result",
    "train_plainly",
    "train_poisoned",
]

COUNT = 12
"""Mini-batches of six samples."""

EPOCHS = 3

AT = 5
"""The one that is large: what is fragile breaks on it."""

LARGE = 50.0


@dataclass(frozen=True)
class Poison:
    """What is not finite, and what is made of it.

    Args:
        what: 'weight' (from the start), 'input', 'target', 'loss', 'output', 'gradient' (of a
            layer's input) or 'nothing'.
        layer: of nine, three a stage: a Linear, a `Fragile`, an Identity.
        frozen: the layers before this one do not learn.
        options: the Pipeline's.
    """

    what: str
    layer: int = 0
    value: float = math.nan
    frozen: int = 0
    options: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Result:
    """What came of it, where it was skipped."""

    losses: list[float]
    statistics: list[StageStatistics]
    weights: dict[str, Tensor]


class Fragile(nn.Module):
    """The identity, until something large comes."""

    def __init__(self, forward: float, backward: float) -> None:
        super().__init__()
        self.factors = forward, backward

    def forward(self, x: Tensor) -> Tensor:
        factors = self.factors if _is_large(x) else (1.0, 1.0)
        result: Tensor = _Multiply.apply(x, *factors)  # type: ignore[no-untyped-call]
        return result


class _Multiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: float, backward: float) -> Tensor:
        ctx.factor = backward
        return x * forward

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:
        return gradients[0] * ctx.factor, None, None


def loss_fn(output: Tensor, target: Tensor) -> Tensor:
    return mse_loss(output, target)


def fragile_loss(output: Tensor, target: Tensor) -> Tensor:
    return mse_loss(output, target) * (math.nan if _is_large(output) else 1.0)


def _is_large(x: Tensor) -> bool:
    return bool(x.detach().abs().nan_to_num(0.0).max() > LARGE / 2)


def sgd(params: list[tuple[str, nn.Parameter]]) -> Optimizer:
    """Its effective learning rate is 0.002 / (1 - 0.5) = 0.004."""
    return torch.optim.SGD(params, lr=0.002, momentum=0.5)


def build(poison: Poison) -> nn.Sequential:
    torch.manual_seed(1)
    layers: list[nn.Module] = []
    for k in range(0, 9, 3):
        linear = nn.Linear(4, 4)
        with torch.no_grad():
            linear.weight.copy_(torch.eye(4) + 0.01 * torch.randn(4, 4))
        output = poison.value if (poison.what, poison.layer) == ("output", k + 1) else 1.0
        gradient = poison.value if (poison.what, poison.layer) == ("gradient", k + 1) else 1.0
        layers += [linear, Fragile(output, gradient), nn.Identity()]
    if poison.what == "weight":
        weight = layers[poison.layer].weight
        assert isinstance(weight, Tensor)
        weight.data[1, 2] = poison.value
    for layer in layers[: poison.frozen]:
        layer.requires_grad_(False)
    return nn.Sequential(*layers)


def data(poison: Poison) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    batches = []
    for k in range(COUNT):
        x = torch.randn(6, 4, generator=generator)
        y = x + 0.1 * torch.randn(6, 4, generator=generator)
        if k == AT and poison.what in ("output", "gradient", "loss"):
            x[2, 0] = LARGE
        if k == AT and poison.what in ("input", "target"):
            (x if poison.what == "input" else y)[2, 0] = poison.value
        batches.append((x, y))
    return batches


def train_poisoned(poison: Poison, alone: bool = False) -> Result:
    """Train through the data, three times."""
    options: dict[str, Any] = {"balance": [3, 3, 3], **dict(poison.options)}
    with Pipeline(
        build(poison),
        fragile_loss if poison.what == "loss" else loss_fn,
        sgd,
        stages=3 if alone else None,
        **options,
    ) as pipe:
        losses = [pipe.train(data(poison)).loss for _ in range(EPOCHS)]
        return Result(losses, pipe.statistics(), pipe.state_dict())


def train_plainly(poison: Poison) -> dict[str, Tensor]:
    """The same on one device, without the mini-batch that is skipped."""
    model = build(poison)
    optimizer = sgd(list(model.named_parameters()))
    for _ in range(EPOCHS):
        for k, (x, y) in enumerate(data(poison)):
            if k != AT:
                optimizer.zero_grad()
                torch.autograd.backward(mse_loss(model(x), y))
                optimizer.step()
    return model.state_dict()


FLUSH = (("schedule", "1f1b"),)
SKIP = (("on_nonfinite", "skip"),)

FOUND = {
    # The poison, the stage that is to be named, the micro-batch, and what is said.
    "a weight of the first stage": (Poison("weight", 0), 0, 0, "output of layer '0' (Linear)"),
    "a weight of the second": (Poison("weight", 3), 1, 0, "output of layer '3' (Linear)"),
    "a weight of the last": (Poison("weight", 6), 2, 0, "output of layer '6' (Linear)"),
    "an input": (Poison("input"), 0, AT, "its input is not finite: look at the data"),
    "an infinite input": (Poison("input", value=math.inf), 0, AT, "its input is not finite"),
    "a target": (Poison("target"), 2, AT, "the loss is not finite, the model's output is"),
    "a loss": (Poison("loss"), 2, AT, "the loss is not finite, the model's output is"),
    "an output of the first stage": (Poison("output", 1), 0, AT, "output of layer '1' (Fragile)"),
    "an output of the second": (
        Poison("output", 4, math.inf), 1, AT, "output of layer '4' (Fragile)"
    ),
    "a gradient of the first stage": (
        Poison("gradient", 1), 0, AT, "gradient in layer '1' (Fragile)"
    ),
    "a gradient of the last": (
        Poison("gradient", 7, -math.inf), 2, AT, "gradient in layer '7' (Fragile)"
    ),
    "an input of a stage that does not learn": (
        Poison("input", frozen=3), 0, AT, "its input is not finite"
    ),
    "an output of a stage that does not learn": (
        Poison("output", 1, frozen=6), 0, AT, "output of layer '1' (Fragile)"
    ),
    "an output, under a flush": (
        Poison("output", 4, options=FLUSH), 1, AT, "output of layer '4' (Fragile)"
    ),
    "a gradient that leaves its stage": (
        Poison("gradient", 4, options=(("balance", [4, 3, 2]),)),
        1, AT, "gradient in layer '4' (Fragile)",
    ),
}  # fmt: skip


SKIPPED = {
    # The poison, and how many updates each stage skips in three epochs.
    "an output": (Poison("output", 4, options=SKIP), [3, 3, 3]),
    "a gradient": (Poison("gradient", 4, options=SKIP), [3, 3, 0]),
    "a target": (Poison("target", options=SKIP), [3, 3, 3]),
    "a gradient, under a flush": (Poison("gradient", 4, options=(*SKIP, *FLUSH)), [3, 3, 3]),
    "a gradient, of three": (
        Poison("gradient", 4, options=(*SKIP, ("update_every", 3))), [3, 3, 0]
    ),
}  # fmt: skip
