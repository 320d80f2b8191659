"""What a rank does: call a program, named 'module:function', in the job's folder."""

import importlib
import os
import pickle
import sys
from pathlib import Path

import torch

__all__ = ["play"]


def play(program: str) -> None:
    """Call it with the job's arguments, and leave what it returns."""
    torch.set_num_threads(1)
    module, name = program.split(":")
    args = pickle.loads(Path("arguments").read_bytes())
    result = getattr(importlib.import_module(module), name)(*args)
    if result is not None:
        torch.save(result, f"result{os.environ['RANK']}")


if __name__ == "__main__":
    play(sys.argv[1])
