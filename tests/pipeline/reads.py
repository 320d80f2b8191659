"""Count the moments at which the host reads a number out of a tensor, and so waits for it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch import Tensor

__all__ = ["count_reads"]

READERS = ("item", "tolist", "numpy", "__float__", "__int__")


@contextmanager
def count_reads() -> Iterator[list[str]]:
    """Give a list to which every such read in the block adds its name.

    `bool(tensor)` is left out: the check for finite gradients reads that once a micro-batch.
    """
    reads: list[str] = []

    def counting(name: str) -> Any:
        original = getattr(Tensor, name)

        def read(self: Tensor, *args: Any) -> Any:
            reads.append(name)
            return original(self, *args)

        return patch.object(Tensor, name, read)

    patches = [counting(name) for name in READERS]
    for each in patches:
        each.start()
    try:
        yield reads
    finally:
        for each in patches:
            each.stop()
