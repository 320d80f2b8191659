"""One network on scikit-learn's digits under any rule, all stages in one process."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import MultiStepLR

from headrace.models import mlp
from headrace.pipeline import Pipeline
from headrace.pipeline.rules import Rule

from ..data import Digits
from ..metrics import accuracy

__all__ = ["network", "train_digits"]

BATCH, WIDTH = 64, 64


def network(hidden: int) -> nn.Sequential:
    """64 pixels, `hidden` times Linear-BatchNorm-ReLU of 64 units, 10 classes."""
    return mlp([64, *[WIDTH] * hidden, 10], norm="BatchNorm1d")


def _batches(data: Digits, iterations: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Full mini-batches, a new order in every epoch."""

    def forever() -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(data), generator=generator)
            for rows in order[: len(data) // BATCH * BATCH].view(-1, BATCH):
                yield data.inputs[rows], data.targets[rows]

    return islice(forever(), iterations)


def train_digits(
    hidden: int,
    iterations: int,
    seed: int,
    rule: Callable[[], Rule] | None,
    only_top: bool = False,
    model: nn.Sequential | None = None,
) -> float:
    """Train, a stage a hidden layer, and give the accuracy on the test images.

    Adam at 1e-3, times .3 after 60% and 80% of the iterations.

    Args:
        rule: of all stages; None is back-propagation, on one stage.
        only_top: train the output layer only, on the features that the others start with ("cut").
        model: one to train, rather than a new one of this seed.
    """
    torch.manual_seed(seed)
    model = model or network(hidden)
    if only_top:
        for layer in list(model)[:-1]:
            layer.requires_grad_(False)
    train, test = Digits("train"), Digits("test")
    miles = [iterations * 6 // 10, iterations * 8 // 10]
    sizes = [4, *[3] * (hidden - 1), 1] if rule else [len(model)]
    with Pipeline(
        model,
        nn.CrossEntropyLoss(),
        partial(torch.optim.Adam, lr=1e-3),
        scheduler=lambda o: MultiStepLR(o, miles, gamma=0.3),
        rule=rule() if rule else None,
        stages=len(sizes),
        balance=sizes,
        seed=seed,
    ) as pipe:
        pipe.train(_batches(train, iterations, seed))
        scores = pipe.evaluate([(test.inputs, test.targets)], {"accuracy": accuracy})
    return scores["accuracy"]
