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
from torch.utils.data import DataLoader, TensorDataset

from headrace.pipeline import Pipeline, Progress
from headrace.pipeline.checkpoints import Checkpoints
from headrace.pipeline.rules import Synthetic

from ..pipeline.helpers import momentum

__all__ = [
    "FLAG",
    "Plan",
    "at_rest",
    "batches",
    "busy_then_dead",
    "do",
    "journal",
    "misfortune",
    "misfortune_unlocked",
    "rank",
    "ranks",
    "two_pipelines",
    "while_connecting",
    "with_workers",
]

FLAG = "now"
"""The file that a rank makes when it is about to do its deed."""

NAP = 3.5
"""Seconds of a sleep that must kill nobody."""


@dataclass(frozen=True)
class Plan:
    """What is done, where, and when.

    Args:
        deed: see `do`.
        moment: 'start', 'forward', 'backward', 'evaluation', 'loader', 'between' or 'log'.
        count: of the forward, the backward or the mini-batch at which it is done, from 0.
        timeout: the Pipeline's.
    """

    deed: str
    stage: int = 0
    moment: str = "forward"
    count: int = 0
    timeout: tuple[float, float] = (300.0, 60.0)


def rank() -> int:
    return int(os.environ["RANK"])


def ranks() -> int:
    return int(os.environ["WORLD_SIZE"])


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
    elif deed == "nap":
        time.sleep(NAP)
    elif deed == "sleep":
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
        self._fire("forward", self.forwards)
        result: Tensor = _Backward.apply(x, self.fire_backward)  # type: ignore[no-untyped-call]
        return result

    def fire_backward(self) -> None:
        self.backwards += 1
        self._fire("backward", self.backwards)

    def _fire(self, moment: str, times: int) -> None:
        if self.armed and self.plan.moment == moment and times == self.plan.count + 1:
            do(self.plan.deed)


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


def build(plan: Plan, **options: Any) -> Pipeline:
    """A pipeline of three layers a stage, the second a trap: stage j's is layer 3j+1."""
    torch.manual_seed(1)
    layers: list[nn.Module] = []
    for stage in range(ranks()):
        layers += [nn.Linear(4, 4), Trap(plan, stage), nn.Tanh()]
    return Pipeline(
        nn.Sequential(*layers),
        nn.MSELoss(),
        momentum,
        balance=[3] * ranks(),
        timeout=plan.timeout,
        **options,
    )


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
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
    here = rank() == plan.stage
    pipe = build(plan)
    if here and plan.moment == "start":
        do(plan.deed)
    if here and plan.moment == "log":
        pipe.train(batches(20), log=lambda progress: do(plan.deed), log_every=15)
    else:  # checkpoints are not to change what happens after it
        saved = Checkpoints("saved", every=15) if plan.moment == "evaluation" else None
        pipe.train(loader(plan, 20), checkpoints=saved)
    pipe.evaluate(batches(3))
    if here and plan.moment == "between":
        do(plan.deed)
    for _ in range(epochs):
        pipe.train(batches(20))
    pipe.close()


def steady_training(plan: Plan) -> None:
    """The same, until it is ended: others may be long in coming to their deeds."""
    misfortune(plan, epochs=1_000_000)


def misfortune_unlocked(plan: Plan) -> None:
    """The same where every stage is connected with the first."""
    with build(plan, rule=Synthetic(inputs="synthetic", lag="free")) as pipe:
        for _ in range(100):
            pipe.train(loader(plan, 20))
            pipe.evaluate(batches(3))


def at_rest(plan: Plan) -> None:
    """After some training, the stage does its deed while all others are in user code."""
    pipe = build(plan)
    pipe.train(batches(20))
    pipe.drain()
    if rank() == plan.stage:
        do(plan.deed)
    time.sleep(100)


def two_pipelines(plan: Plan) -> None:
    """One after the other; in between, the stage does its deed."""
    with build(plan) as pipe:
        pipe.train(batches(20))
    if rank() == plan.stage:
        do(plan.deed)
    threading.Thread(target=_mark_watching, daemon=True).start()
    with build(plan) as pipe:
        pipe.train(batches(20))


def _mark_watching() -> None:
    while signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        time.sleep(0.01)
    Path(f"again{rank()}").touch()


def while_connecting(plan: Plan) -> None:
    """The deed is done before the connection number `count` of those made in the beginning.

    All ranks have met by then: until they have, nobody watches.
    """
    new_group, made = torch.distributed.new_group, 0

    def connect(*args: Any, **keywords: Any) -> Any:
        nonlocal made
        made += 1
        Path(f"met{rank()}").touch()
        if rank() == plan.stage and made == plan.count + 1:
            while len(list(Path.cwd().glob("met*"))) < ranks():
                time.sleep(0.01)
            do(plan.deed)
        return new_group(*args, **keywords)

    torch.distributed.new_group = connect
    pipe = build(plan)
    pipe.train(batches(20))
    pipe.close()


def busy_then_dead(plan: Plan, busy: int) -> None:
    """Stage `busy` is long in its forward 9, its inboxes fill; then the plan's stage dies."""
    with build(Plan("sleep", busy, "forward", 9, plan.timeout), slack=2) as pipe:
        if rank() == plan.stage:
            threading.Thread(target=_do_after_flag, args=[plan], daemon=True).start()
        pipe.train(batches(200))


def _do_after_flag(plan: Plan) -> None:
    while not Path(FLAG).exists():
        time.sleep(0.01)
    time.sleep(0.5)  # the others go on until they wait for the busy one
    do(plan.deed)


def journal(plan: Plan) -> None:
    """Train on and on, and write a line for each micro-batch."""
    with open("journal", "a") as file, build(plan) as pipe:

        def write(progress: Progress) -> None:
            file.write(json.dumps({"loss": progress.loss, "padding": "x" * 300}) + "\n")

        while True:
            pipe.train(batches(20), log=write, log_every=1)


def with_workers(plan: Plan) -> None:
    """The loader has worker processes of its own."""
    data = TensorDataset(torch.randn(200_000, 4), torch.randn(200_000, 4))
    loader = DataLoader(data, batch_size=4, num_workers=2)
    with build(plan) as pipe:
        pipe.train(loader)
