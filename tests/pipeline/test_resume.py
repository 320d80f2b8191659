"""A run that is gone on with from a checkpoint is, bit for bit, the one that went on by itself."""

from pathlib import Path

import pytest

from ..distributed.training import CASES, SIZES
from .helpers import assert_same
from .resuming import run_all


@pytest.mark.parametrize("name", CASES)
def test_exactly(name: str, tmp_path: Path) -> None:
    count = 0
    for _, start, whole, again in run_all(tmp_path, SIZES[3], [name]):
        count += 1
        assert_same(again.weights, whole.weights)
        last = max(whole.reports)
        assert again.reports[last] == whole.reports[last], start.name
        assert again.statistics == whole.statistics
        assert again.evaluation == whole.evaluation
    assert count == 3, "after 4, 8 and 12 of 14 mini-batches"
