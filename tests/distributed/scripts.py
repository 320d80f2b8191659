"""Programs that end, or go wrong, outside of the pipeline's own calls."""

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from headrace.pipeline import Pipeline

from ..pipeline.helpers import momentum
from .failing import batches, rank

__all__ = ["call_differently", "end_without_close", "two_in_turn", "two_with", "two_at_once"]


def build(**options: Any) -> Pipeline:
    torch.manual_seed(1)
    stages = int(os.environ["WORLD_SIZE"])
    layers = [part for _ in range(stages) for part in (nn.Linear(4, 4), nn.Tanh())]
    options = {"balance": [2] * stages} | options
    return Pipeline(nn.Sequential(*layers), nn.MSELoss(), momentum, **options)


def call_differently(calls: list[str], **options: Any) -> None:
    """Each rank makes its own call."""
    pipe = build(**options)
    pipe.train(batches(5))
    call = calls[rank()]
    if call in ("train", "evaluate", "predict"):
        getattr(pipe, call)(batches(5))
    elif call != "none":
        getattr(pipe, call)()
    pipe.close()


def end_without_close(how: str) -> None:
    """The last line of a script that has forgotten the pipeline."""
    pipe = build()
    pipe.train(batches(5))
    if how == "exit 0":
        sys.exit(0)
    if how == "exit 5":
        sys.exit(5)


def end_in_function() -> None:
    """The pipeline is out of scope long before the end."""

    def use() -> float:
        pipe = build()
        return pipe.train(batches(5)).loss

    use()
    import gc

    gc.collect()


def two_in_turn() -> list[Any]:
    found = []
    for _ in range(2):
        pipe = build()
        pipe.train(batches(5))
        pipe.close()
        found.append(pipe.state_dict() if False else pipe.partition)
    return found


def two_with() -> list[dict[str, torch.Tensor]]:
    found = []
    for balance in ("time", "parameters"):
        with build(balance=balance) as pipe:
            pipe.train(batches(5))
            found.append(pipe.state_dict())
    return found


def two_at_once() -> list[dict[str, torch.Tensor]]:
    """A teacher and a student: both open, used by turns, the first one closed first."""
    teacher, student = build(), build()
    for _ in range(3):
        targets = teacher.predict([x for x, _ in batches(5)])
        assert isinstance(targets, torch.Tensor)
        student.train([(x, t) for (x, _), t in zip(batches(5), targets.split(6), strict=True)])
    found = [teacher.state_dict(), student.state_dict()]
    teacher.close()
    student.train(batches(5))
    student.close()
    return found


def use_after_close() -> None:
    pipe = build()
    pipe.train(batches(5))
    pipe.close()
    pipe.close()
    pipe.train(batches(5))


def swallow() -> None:
    """A script that catches whatever it can."""
    pipe = build()
    for k in range(1000):
        try:
            pipe.train(batches(5))
            if rank() == 1 and k == 3:
                raise ArithmeticError("caught")
            if rank() == 0 and k == 3:
                pipe.evaluate([])
        except Exception:
            continue
        except BaseException:
            time.sleep(100)


def slow_end(seconds: float) -> None:
    """The last rank has something to do before it closes, the others have left by then."""
    with build() as pipe:
        pipe.train(batches(5))
        if rank() == int(os.environ["WORLD_SIZE"]) - 1:
            time.sleep(seconds)
    time.sleep(0.0)
    Path(f"done{rank()}").touch()
