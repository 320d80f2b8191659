"""For every test: one thread and, but for those of `tests/cuda`, no GPU, so that numbers do not
depend on the machine.
"""

import os
from collections.abc import Iterator

import pytest
import torch

# Before CUDA is first used. Whoever names GPUs wants them.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
