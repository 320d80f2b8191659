"""Simulations side by side, in processes that end with this one, however it ends."""

import os
import signal
import threading
from collections.abc import Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import active_children, get_context, parent_process

from ..config import Config
from .run import Outcome, simulate

__all__ = ["outcomes"]


def outcomes(configs: Sequence[Config], processes: int) -> Generator[Outcome, None, None]:
    """Simulate all, so many at a time; in their order.

    Raises:
        BrokenProcessPool: one of the processes was ended from outside.
    """
    if processes == 1:
        yield from map(simulate, configs)
        return
    others = set(active_children())
    with ProcessPoolExecutor(processes, get_context("spawn"), initializer=_follow) as pool:
        try:
            # What the terminal sends is for this process: the others inherit that they do not
            # hear it.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                futures = [pool.submit(simulate, config) for config in configs]
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            for future in futures:
                yield future.result()
        except BaseException:  # GeneratorExit, too: nobody wants the others any more
            for process in set(active_children()) - others:
                process.terminate()
            raise


def _follow() -> None:
    """In a process of the pool: end as the one that started it ends."""
    threading.Thread(target=_end_with_parent, name="headrace-follow", daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)
