"""On ranks: what is saved there goes on there, bit for bit, in one process, and on other cuts."""

import os
from pathlib import Path

import pytest

from headrace.pipeline.checkpoints import Checkpoints, find_latest

from ..pipeline.helpers import assert_same
from ..pipeline.resuming import Ending, go_on
from .ranks import Launcher
from .training import SIZES

pytestmark = pytest.mark.timeout(120)

SOME = ["stash", "predict, slack 1, every 3, cut in 2", "synthetic, full unlock, p_update"]
SOME += ["local, head that draws", "1f1b, a batch that grows", "pipemare"]


def save_and_go_on(folder: str, names: list[str]) -> dict[str, list[Ending]]:
    """Train with checkpoints, then go on from the second one."""
    found = {}
    for name in names:
        place = Path(folder) / name.replace(" ", "-").replace(",", "")
        sizes = SIZES[int(os.environ["WORLD_SIZE"])]
        whole = go_on(name, sizes, Checkpoints(place / "saved", 4, keep=9))
        start = sorted((place / "saved").iterdir())[1]
        again = go_on(name, sizes, Checkpoints(place / "again", 4, keep=9), start, seed=8)
        found[name] = [whole, again]
    return found


def test_on_ranks_as_in_one_process(launcher: Launcher, tmp_path: Path) -> None:
    outcome = launcher.run(save_and_go_on, 2, str(tmp_path), SOME, seconds=100)
    outcome.expect(0, 0)
    for name in SOME:
        place = tmp_path / name.replace(" ", "-").replace(",", "")
        alone = go_on(name, SIZES[2], Checkpoints(place / "alone", 4, keep=9))
        for whole, again in (rank[name] for rank in outcome.results):
            assert_same(whole.weights, alone.weights)
            assert_same(again.weights, alone.weights)
            assert again.reports[1] == whole.reports[1] == alone.reports[1]
        # What ranks have saved, one process goes on with, and the other way round.
        start = sorted((place / "saved").iterdir())[1]
        crossed = go_on(name, SIZES[2], Checkpoints(place / "cross", 4, keep=9), start, seed=8)
        assert_same(crossed.weights, alone.weights)
        assert find_latest(place / "again")[0] is not None
