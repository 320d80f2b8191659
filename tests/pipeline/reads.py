"""Count the moments at which the host reads a number out of a tensor, and so waits for it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch import Tensor

from headrace.pipeline.gradient import all_finite

__all__ = ["count_reads"]

READERS = ("item", "tolist", "numpy", "__float__", "__int__")


@contextmanager
def count_reads() -> Iterator[list[str]]:
    """Give a list to which every such read in the block adds its name.

    Left out are those of the check for finite gradients, which reads once a micro-batch.
    """
    reads: list[str] = []

    def counting(name: str) -> Any:
        original = getattr(Tensor, name)

        def read(self: Tensor, *args: Any) -> Any:
            if sys._getframe(1).f_code is not all_finite.__code__:
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
