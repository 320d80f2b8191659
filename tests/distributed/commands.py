"""The commands as programs of a job's ranks, without torchrun's own start."""

import os
from pathlib import Path

from headrace.launch import serve, sharpness, throughput, train

__all__ = ["UNDER_TORCHRUN", "run_serve", "run_sharpness", "run_throughput", "run_train"]

UNDER_TORCHRUN = {"TORCHELASTIC_RUN_ID": "here"}
"""What a command knows torchrun by."""


def run_train(arguments: list[str], folder: Path = Path()) -> None:
    os.chdir(folder)
    train.main(arguments)


def run_serve(arguments: list[str], folder: Path = Path()) -> None:
    os.chdir(folder)
    serve.main(arguments)


def run_throughput(arguments: list[str], folder: Path = Path()) -> None:
    os.chdir(folder)
    throughput.main(arguments)


def run_sharpness(arguments: list[str], folder: Path = Path()) -> None:
    os.chdir(folder)
    sharpness.main(arguments)
