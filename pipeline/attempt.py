"""Which start of the processes this is: torchrun may start them again on the same store.

What an earlier start left in the store must not be taken for this one's. torchrun counts the starts
after failures, but not those after a change of hosts, so the ranks agree on a number themselves:
every rank says a word that nobody has said before, and the first one answers with the number.
"""

import os
import time
import uuid
from datetime import timedelta
from functools import cache
from typing import Any

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

__all__ = ["agree", "attempt", "connect"]

PATIENCE = 600.0
"""Seconds: hosts may be minutes apart in starting Python."""

REACH = timedelta(seconds=10)
"""torchrun's store is there before its ranks are: if it does not answer, torchrun has ended. torch
would try for five minutes, and ranks that nobody knows of would hold a host's memory for so long.
"""

KEY = "headrace/attempt"


@cache
def attempt() -> str:
    """The number of this start, the same on every rank; asked once a process.

    Raises:
        DistNetworkError: the store cannot be reached.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return "0"  # the store is a rank's own, and ends with it
    return agree(connect(), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))


def connect() -> TCPStore:
    """A client of torchrun's store.

    Raises:
        DistNetworkError: it is gone.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(host, port, is_master=False, timeout=REACH)


def agree(store: Any, rank: int, size: int) -> str:
    """Find a number that no earlier start has had.

    Raises:
        DistNetworkError: a rank does not come.
    """
    end = time.monotonic() + PATIENCE
    if rank == 0:
        number = str(store.add(KEY, 1))
        _welcome(store, number, size, end)
        return number
    word = uuid.uuid4().hex
    store.set(f"{KEY}/hello/{rank}", word)
    while not store.check([f"{KEY}/welcome/{word}"]):
        _pause(end, "the first rank")
    number = store.get(f"{KEY}/welcome/{word}").decode()
    store.set(f"{KEY}/{number}/{rank}", "")
    return str(number)


def _welcome(store: Any, number: str, size: int, end: float) -> None:
    """Answer all words that are there, those of earlier starts too, until all ranks are here."""
    answered = set()
    missing = set(range(1, size))
    while missing:
        for rank in sorted(missing):
            if store.check([f"{KEY}/hello/{rank}"]):
                word = store.get(f"{KEY}/hello/{rank}").decode()
                if word not in answered:
                    store.set(f"{KEY}/welcome/{word}", number)
                    answered.add(word)
            if store.check([f"{KEY}/{number}/{rank}"]):
                missing.discard(rank)
        _pause(end, f"rank {min(missing, default=0)}")


def _pause(end: float, who: str) -> None:
    if time.monotonic() > end:
        raise dist.DistNetworkError(f"{who} did not come within {PATIENCE:.0f} s")
    time.sleep(0.005)
