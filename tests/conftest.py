"""For every test: one thread and, but for those of `tests/cuda`, no GPU, so that numbers do not
depend on the machine.
"""

import os
from collections.abc import Iterator

import pytest
import torch

from .distributed.ranks import Launcher

# Before CUDA is first used. Whoever names GPUs wants them.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    """Starts ranks in milliseconds, where torchrun itself is not the point."""
    launcher = Launcher(tmp_path_factory.mktemp("jobs"))
    yield launcher
    launcher.close()


@pytest.fixture
def no_rank_is_left(launcher: Launcher) -> Iterator[None]:
    """Whatever became of a test, the ranks it started do not outlive it."""
    yield
    launcher.end_jobs()
