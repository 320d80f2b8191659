"""Programs in which something goes wrong, on one stage, at a moment of one's choice."""

import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headrace.pipeline import Pipeline, Progress

from ..pipeline.helpers import momentum

__all__ = ["FLAG", "Plan", "Trap", "batches", "do", "misfortune", "network", "rank"]

Batches = list[tuple[Tensor, Tensor]]

FLAG = "now"
"""The file that a rank makes when it is about to do its deed."""


@dataclass(frozen=True)
class Plan:
    """What is done, where, and when.

    Args:
        deed: see `do`.
        moment: 'start', 'forward', 'backward', 'evaluation', 'loader' or 'between'.
        count: of the forward, the backward or the mini-batch at which it is done, from 0.
        options: the Pipeline's.
    """

    deed: str
    stage: int
    moment: str
    count: int = 0
    options: tuple[tuple[str, Any], ...] = ()


def rank() -> int:
    return int(os.environ["RANK"])


def do(deed: str) -> None:
    """Do it: kill or stop this process, raise, exit, or take long."""
    Path(FLAG).touch()
    if deed == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif deed == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif deed == "raise":
        raise ArithmeticError("a fuse blew")
    elif deed == "exit":
        sys.exit(3)
    elif deed == "vanish":
        os._exit(0)
    elif deed == "sleep":
        time.sleep(3.5)
    elif deed == "sleep long":
        time.sleep(100)
    elif deed == "compute":  # without the interpreter's lock, and deaf to signals
        hashlib.pbkdf2_hmac("sha256", b"", b"", 500_000_000)
    else:
        assert deed == "nothing", deed


class Trap(nn.Module):
    """A layer that does a deed, in its forward, its backward, or when it evaluates."""

    def __init__(self, plan: Plan, stage: int) -> None:
        super().__init__()
        self.plan = plan
        self.armed = stage == plan.stage
        self.forwards = self.backwards = 0

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            if self.armed and self.plan.moment == "evaluation":
                do(self.plan.deed)
            return x
        self.forwards += 1
        if self._is_time("forward", self.forwards):
            do(self.plan.deed)
        result: Tensor = _Backward.apply(x, self.fire_backward)  # type: ignore[no-untyped-call]
        return result

    def fire_backward(self) -> None:
        self.backwards += 1
        if self._is_time("backward", self.backwards):
            do(self.plan.deed)

    def _is_time(self, moment: str, times: int) -> bool:
        return self.armed and self.plan.moment == moment and times == self.plan.count + 1


class _Backward(torch.autograd.Function):
    """The identity; calls a function in its backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[], None]) -> Tensor:
        ctx.function = function
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        ctx.function()
        return gradients[0], None


def network(plan: Plan, stages: int) -> nn.Sequential:
    """Three layers a stage, the second a trap: stage j's is layer 3j+1."""
    torch.manual_seed(1)
    layers: list[nn.Module] = []
    for stage in range(stages):
        layers += [nn.Linear(4, 4), Trap(plan, stage), nn.Tanh()]
    return nn.Sequential(*layers)


def batches(count: int) -> Batches:
    generator = torch.Generator().manual_seed(2)
    return [
        (torch.randn(6, 4, generator=generator), torch.randn(6, 4, generator=generator))
        for _ in range(count)
    ]


def loader(plan: Plan, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    for number, batch in enumerate(batches(count)):
        if plan.moment == "loader" and number == plan.count:
            do(plan.deed)
        yield batch


def misfortune(plan: Plan, epochs: int = 200) -> None:
    """Train, evaluate and train on; a deed that ends nothing lets it come to its end."""
    stages = int(os.environ["WORLD_SIZE"])
    here = rank() == plan.stage
    options = {"balance": [3] * stages, **dict(plan.options)}
    pipe = Pipeline(network(plan, stages), nn.MSELoss(), momentum, **options)
    if here and plan.moment == "start":
        do(plan.deed)
    pipe.train(loader(plan, 20))
    pipe.evaluate(batches(3))
    if here and plan.moment == "between":
        do(plan.deed)
    for _ in range(epochs):
        pipe.train(batches(20))
    pipe.close()


def at_rest(plan: Plan) -> None:
    """After some training, the stage does its deed while all others are in user code."""
    stages = int(os.environ["WORLD_SIZE"])
    pipe = Pipeline(network(plan, stages), nn.MSELoss(), momentum, balance=[3] * stages)
    pipe.train(batches(20))
    pipe.drain()
    if rank() == plan.stage:
        do(plan.deed)
    time.sleep(100)


def journal(plan: Plan) -> None:
    """Train on and on, and write a line for each micro-batch."""
    stages = int(os.environ["WORLD_SIZE"])
    with (
        open(f"journal{rank()}", "w") as file,
        Pipeline(network(plan, stages), nn.MSELoss(), momentum, balance=[3] * stages) as pipe,
    ):

        def write(progress: Progress) -> None:
            file.write(json.dumps({"loss": progress.loss, "pad": "x" * 300}) + "\n")
            if progress.micro_batch > 50:
                Path(FLAG).touch()

        while True:
            pipe.train(batches(20), log=write, log_every=1)


def with_workers(plan: Plan) -> None:
    """The loader has worker processes of its own."""
    stages = int(os.environ["WORLD_SIZE"])
    x, y = (torch.cat(column) for column in zip(*batches(50), strict=True))
    data = torch.utils.data.TensorDataset(x, y)
    loader = torch.utils.data.DataLoader(data, batch_size=4, num_workers=2)
    with Pipeline(network(plan, stages), nn.MSELoss(), momentum, balance=[3] * stages) as pipe:
        while True:
            pipe.train(loader)


def while_connecting(plan: Plan) -> None:
    """The deed is done between two of the connections that are made in the beginning."""
    stages = int(os.environ["WORLD_SIZE"])
    new_group, made = torch.distributed.new_group, 0

    def connect(*args: Any, **keywords: Any) -> Any:
        nonlocal made
        made += 1
        if rank() == plan.stage and made == plan.count + 1:
            do(plan.deed)
        return new_group(*args, **keywords)

    torch.distributed.new_group = connect  # type: ignore[assignment]
    pipe = Pipeline(
        network(plan, stages), nn.MSELoss(), momentum, balance=[3] * stages, **dict(plan.options)
    )
    pipe.train(batches(20))
    pipe.close()


def busy_then_dead(plan: Plan, busy: int) -> None:
    """Stage `busy` is long in its forward 9, with its inboxes full; then the plan's stage dies."""
    stages = int(os.environ["WORLD_SIZE"])
    long = Plan("sleep long", busy, "forward", 9)
    with Pipeline(
        network(long, stages), nn.MSELoss(), momentum, balance=[3] * stages, slack=2
    ) as pipe:
        if rank() == plan.stage:
            threading.Thread(target=_die_after_flag, args=[plan], daemon=True).start()
        pipe.train(batches(200))


def _die_after_flag(plan: Plan) -> None:
    while not Path(FLAG).exists():
        time.sleep(0.01)
    time.sleep(0.5)  # the others go on until they wait for the busy one
    Path("dead").touch()
    do(plan.deed)
