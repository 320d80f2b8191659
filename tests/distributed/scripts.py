"""Programs that end, or go wrong, outside of the pipeline's own calls."""

import sys
import time
from typing import Any

import torch
from torch import Tensor, nn

from headrace.pipeline import Pipeline

from ..pipeline.helpers import momentum
from .failing import batches, rank, ranks

__all__ = [
    "call_differently",
    "close_late",
    "end_in_function",
    "end_without_close",
    "swallow",
    "two_at_once",
    "two_in_turn",
    "use_closed",
]


def build(**options: Any) -> Pipeline:
    torch.manual_seed(1)
    layers = [part for _ in range(ranks()) for part in (nn.Linear(4, 4), nn.Tanh())]
    options = {"balance": [2] * ranks()} | options
    return Pipeline(nn.Sequential(*layers), nn.MSELoss(), momentum, **options)


def call_differently(calls: list[str]) -> None:
    """Each rank makes its own call."""
    pipe = build()
    pipe.train(batches(5))
    call = calls[rank()]
    if call in ("train", "evaluate", "predict"):
        getattr(pipe, call)(batches(5))
    elif call != "nothing":
        getattr(pipe, call)()
    pipe.close()


def end_without_close(code: int | None) -> None:
    """The last line of a script that has forgotten the pipeline."""
    pipe = build()
    pipe.train(batches(5))
    if code is not None:
        sys.exit(code)


def end_in_function() -> None:
    """The pipeline is out of scope before the end."""

    def use() -> float:
        return build().train(batches(5)).loss

    use()


def two_in_turn() -> list[dict[str, Tensor]]:
    """One closed, then another; the first by the with-block, the second by close()."""
    found = []
    with build() as pipe:
        pipe.train(batches(5))
        found.append(pipe.state_dict())
    pipe = build(balance="time")
    pipe.train(batches(5))
    found.append(pipe.state_dict())
    pipe.close()
    pipe.close()
    return found


def two_at_once() -> list[dict[str, Tensor]]:
    """A teacher and a student: both open, used by turns; the one opened first is closed first."""
    teacher, student = build(), build()
    for _ in range(3):
        targets = teacher.predict([x for x, _ in batches(5)])
        assert isinstance(targets, Tensor)
        pieces = torch.split(targets, 6)
        student.train([(x, t) for (x, _), t in zip(batches(5), pieces, strict=True)])
    teacher.close()
    student.train(batches(5))
    found = [student.state_dict()]
    student.close()
    return found


def use_closed() -> None:
    pipe = build()
    pipe.close()
    pipe.train(batches(5))


def swallow() -> None:
    """A script that catches whatever it can, and goes on."""
    pipe = build()
    while True:
        try:
            pipe.train(batches(5))
            pipe.evaluate([])
        except Exception:
            continue
        except BaseException:
            time.sleep(100)


def close_late(seconds: float, timeout: tuple[float, float]) -> None:
    """The last rank has something to do before it closes."""
    with build(timeout=timeout) as pipe:
        pipe.train(batches(5))
        if rank() == ranks() - 1:
            time.sleep(seconds)
