"""The real torchrun, which takes seconds: a few whole runs."""

import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from ..pipeline.helpers import assert_same
from .failing import FLAG, Plan, misfortune, while_connecting
from .ranks import torchrun
from .training import CASES, SIZES, run_case, run_one

pytestmark = pytest.mark.timeout(120)


@contextmanager
def running(folder: Path, *args: Any) -> "Iterator[subprocess.Popen[str]]":
    """A torchrun at work; it and its ranks are ended in any case."""
    process = torchrun(folder, *args)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()  # torchrun ends its ranks
            process.communicate(timeout=60)


def wait_for_flag(folder: Path, process: "subprocess.Popen[str]") -> float:
    while not (folder / FLAG).exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    return (folder / FLAG).stat().st_mtime


def reports(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("headrace: ")]


def test_the_same_numbers(tmp_path: Path) -> None:
    name = "stash, slack 1, every 3, clip"
    with running(tmp_path, run_one, 2, name) as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    alone = run_case(CASES[name], 2, SIZES[2])
    for rank in range(2):
        account = torch.load(tmp_path / f"result{rank}", weights_only=False)
        assert_same(account.weights, alone.weights)
        assert account.reports == alone.reports


def test_a_killed_worker(tmp_path: Path) -> None:
    with running(tmp_path, misfortune, 3, Plan("kill", 1, "forward", 50)) as process:
        start = wait_for_flag(tmp_path, process)
        out, err = process.communicate(timeout=60)
    assert time.time() - start < 45
    assert process.returncode == 1
    (line,) = reports(out + err)
    assert line.startswith("headrace: stage 1 of 3 (rank 1) is gone")
    assert (out + err).index(line) < (out + err).index("Traceback"), "torchrun's own comes after"


def test_a_worker_killed_at_the_start(tmp_path: Path) -> None:
    """The others wait inside the backend, deaf to torchrun's SIGTERM."""
    with running(tmp_path, while_connecting, 2, Plan("kill", 1, count=0)) as process:
        start = wait_for_flag(tmp_path, process)
        out, err = process.communicate(timeout=60)
    assert time.time() - start < 45
    assert process.returncode == 1
    (line,) = reports(out + err)
    assert line.startswith("headrace: stage 1 of 2 (rank 1) is gone")


def test_interrupted(tmp_path: Path) -> None:
    with running(tmp_path, misfortune, 2, Plan("nothing", 1, "forward", 50), 10_000) as process:
        wait_for_flag(tmp_path, process)
        start = time.time()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert time.time() - start < 30
    assert process.returncode != 0
    assert reports(out + err) == ["headrace: stopped by SIGINT"]
