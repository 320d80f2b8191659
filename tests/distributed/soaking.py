"""The soak as a program of a job's ranks, as it is, and with a leak in every stage."""

import os
from typing import Any

from torch.nn.modules.module import register_module_forward_hook

from headrace.launch.studies import soak

from .failing import rank

__all__ = ["LEAKS", "run_leaking_soak", "run_soak"]

LEAKS = ("resident bytes", "objects", "open files")
"""What the leaking soak lets grow, stage by stage."""


def run_soak(arguments: list[str]) -> None:
    soak.main(arguments)


def run_leaking_soak(arguments: list[str]) -> None:
    """Every forward of a layer leaves something behind; a file, only every hundredth."""
    kept: list[Any] = []
    forwards = 0

    def leak(*ignored: Any) -> None:
        nonlocal forwards
        forwards += 1
        if rank() == 0:
            kept.append(b"x" * (16_384 + forwards % 2))
        elif rank() == 1:
            kept.append([])
        elif forwards % 100 == 0:
            kept.append(os.dup(0))

    register_module_forward_hook(leak)
    soak.main(arguments)
