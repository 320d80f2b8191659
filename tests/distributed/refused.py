"""Programs that cannot work, each for a reason of its own."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from headrace.pipeline import Pipeline, between_hosts
from headrace.pipeline.door import Door
from headrace.pipeline.rules import Delayed, Exact

from ..pipeline.helpers import momentum
from .failing import batches

__all__ = ["REFUSED", "behind_a_firewall", "refuse"]


def network(layers: int = 6) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers)))


def build(**options: Any) -> Pipeline:
    usual: dict[str, Any] = {"loss_fn": nn.MSELoss(), "optimizer": momentum, "balance": [3, 3]}
    alone = {} if "RANK" in os.environ else {"stages": 2}
    return Pipeline(**{"model": network(), **alone, **usual, **options})


def breaks_at(number: int) -> Iterator[tuple[Tensor, Tensor]]:
    for k, batch in enumerate(batches(10)):
        if k == number:
            raise OSError("the disk is on fire")
        yield batch


def tied() -> nn.Sequential:
    model = network()
    model[5].weight = model[0].weight
    return model


class Splits(nn.Module):
    """Gives something that is no tensor."""

    def forward(self, x: Tensor) -> Any:
        return {"x": x, "length": 3}


class Sparse(nn.Module):
    """Gives a tensor that cannot travel."""

    def forward(self, x: Tensor) -> Tensor:
        return x.to_sparse()


def train(loader: Any, **options: Any) -> Callable[[], None]:
    def program() -> None:
        with build(**options) as pipe:
            pipe.train(loader() if callable(loader) else loader)

    return program


def new(**options: Any) -> Callable[[], None]:
    return lambda: build(**options).close()


def classes() -> list[tuple[Tensor, Tensor]]:
    return [(x, torch.zeros(6, dtype=torch.int32)) for x, _ in batches(3)]


def uneven() -> list[tuple[Tensor, Tensor]]:
    return [(x, y[:-1]) for x, y in batches(3)]


REFUSED: dict[str, tuple[Callable[[], None], str]] = {
    "no mini-batch": (train([]), "the loader gave no mini-batch"),
    "a loader raises at 0": (
        train(lambda: breaks_at(0)),
        r"the loader raised OSError: the disk is on fire while making mini-batch 0 \(.*breaks_at\)",
    ),
    "a loader raises at 5": (
        train(lambda: breaks_at(5)),
        r"the loader raised OSError: the disk is on fire while making mini-batch 5 \(.*breaks_at\)",
    ),
    "a loader raises at 0, cut by time": (
        train(lambda: breaks_at(0), balance="time"),
        "the loader raised OSError: the disk is on fire while making mini-batch 0",
    ),
    "no loader": (train(lambda: 7), "the loader raised TypeError: 'int' object is not iterable"),
    "a dtype the loss cannot take": (
        train(classes, loss_fn=nn.CrossEntropyLoss()),
        r"loss_fn CrossEntropyLoss cannot take the output float32\[6, 4\] with the target int32",
    ),
    "a dtype the loss cannot take, cut by time": (
        train(classes, loss_fn=nn.CrossEntropyLoss(), balance="time"),
        r"loss_fn CrossEntropyLoss cannot take the output float32\[6, 4\] with the target int32",
    ),
    "a loss for each sample": (
        train(lambda: batches(3), loss_fn=nn.MSELoss(reduction="none")),
        r"loss_fn MSELoss gave float32\[6, 4\]: it must give one floating number",
    ),
    "inputs alone": (
        train(lambda: [x for x, _ in batches(3)]),
        r"mini-batch 0 is a Tensor: a loader must give pairs \(input, target\)",
    ),
    "triples": (
        train(lambda: [(x, y, x) for x, y in batches(3)]),
        r"mini-batch 0 is a tuple of 3: a loader must give pairs \(input, target\)",
    ),
    "a list among tensors": (
        train(lambda: [(x, {"y": y, "names": ["a"] * 6}) for x, y in batches(3)]),
        r"mini-batch 0: found a str \('a'\) where a tensor was expected",
    ),
    "unlike numbers of samples": (
        train(uneven),
        r"a mini-batch's tensors must all have the samples in dimension 0, got "
        r"\(float32\[6, 4\], float32\[5, 4\]\)",
    ),
    "more stages than ranks": (new(stages=3), "stages=3 but torchrun started 2 ranks"),
    "fewer stages than ranks": (new(stages=1), "stages=1 but torchrun started 2 ranks"),
    "fewer layers than stages": (new(model=network(1)), "1 layer cannot make 2 stages"),
    "an unknown layer": (
        new(balance=["0", "head"]),
        "balance names the layer 'head'; the layers are",
    ),
    "numbers that do not add up": (new(balance=[3, 4]), r"balance=\[3, 4\] has 7 layers"),
    "an optimizer": (
        new(optimizer=torch.optim.SGD(network().parameters(), lr=0.1)),
        "optimizer is a SGD: give a function",
    ),
    "a factory that makes none": (
        new(optimizer=lambda parameters: "SGD"),
        "optimizer= gave a str: it must be a function",
    ),
    "no Sequential": (new(model=nn.Linear(4, 4)), "model is a Linear"),
    "exact under stream": (new(rule=Exact()), "rule exact under schedule 'stream'"),
    "delayed under gpipe": (
        new(schedule="gpipe", rule=Delayed("stash")),
        "rule delayed under schedule 'gpipe'",
    ),
    "an unknown schedule": (new(schedule="zb"), "schedule='zb': write one of gpipe, 1f1b, stream"),
    "slack auto under a flush": (new(schedule="1f1b", slack="auto"), "slack='auto'"),
    "tied weights": (new(model=tied()), r"'0\.weight' \(stage 0\) and '5\.weight' \(stage 1\)"),
}


def refuse(name: str) -> None:
    REFUSED[name][0]()


class Unreachable(Door):
    """It is shut before anybody has knocked: as a firewall would have it."""

    def __init__(self, *how: Any) -> None:
        super().__init__(*how)
        self.close()


def behind_a_firewall() -> None:
    """What connects to the second rank is refused."""
    if os.environ["RANK"] == "1":
        between_hosts.Door = Unreachable  # type: ignore[misc]
    build().close()
