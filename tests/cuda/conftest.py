"""A GPU, or none of these tests: CUDA_VISIBLE_DEVICES=0 python -m pytest tests/cuda"""

import os
from collections.abc import Iterator

import pytest
import torch

# Before CUDA is first used; the second leaves it untouched in a server that forks.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")


@pytest.fixture(scope="session", autouse=True)
def deterministic() -> Iterator[None]:
    """Skip without a GPU; with one, have it give the same bits every time."""
    if not os.environ["CUDA_VISIBLE_DEVICES"] or not torch.cuda.is_available():
        pytest.skip("no GPU was named: CUDA_VISIBLE_DEVICES=0 python -m pytest tests/cuda")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
