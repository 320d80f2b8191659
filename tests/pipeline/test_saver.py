"""How a checkpoint is put together when something else happens in the meantime."""

import os
import shutil
import tempfile
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from headrace.pipeline import Pipeline
from headrace.pipeline.checkpoints import Checkpoint, Checkpoints, find_latest, saver
from headrace.pipeline.checkpoints.checkpoint import is_remains
from headrace.pipeline.checkpoints.position import Position
from headrace.pipeline.checkpoints.saver import Part, Saver

from .helpers import batches_of, momentum, tanh_net


class Told:
    """What ranks hear of each other, without a store."""

    def __init__(self, told: dict[str, str]) -> None:
        self.told = told
        self.failure: str | None = None

    def share(self, key: str, text: str) -> None:
        self.told[key] = text

    def peek(self, key: str) -> str | None:
        return self.told.get(key)

    def forget(self, key: str) -> None:
        self.told.pop(key, None)


def test_a_rank_that_ends_does_not_take_what_it_wrote_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It hears of a failure while the first one gives the folder its name: that was emptied then,
    and the one before removed.
    """
    told: dict[str, str] = {}
    ears = [Told(told), Told(told)]
    savers = [Saver(rank, 2, ear) for rank, ear in enumerate(ears)]  # type: ignore[arg-type]

    def save(number: int) -> None:
        final = tmp_path / f"step-{number:08d}"
        head = Checkpoint(final, Position(total=number), [["0"], ["1"]], 1, [1, 0])
        for rank, each in enumerate(savers):
            part = Part.of(f"stage-{rank}", rank, {f"{rank}.w": torch.ones(3)}, {"a": 1})
            each.start(final, [part], None if rank else head, 1)
        for each in savers:
            assert each._thread is not None
            each._thread.join(30)

    finish = saver._finish

    def finish_late(partial: Path, checkpoint: Checkpoint) -> None:
        ears[1].failure = "stage 0 is gone"
        assert savers[1]._thread is not None
        savers[1]._thread.join(30)
        finish(partial, checkpoint)

    save(1)
    monkeypatch.setattr(saver, "_finish", finish_late)
    save(2)
    found, faults = find_latest(tmp_path)
    assert found is not None and found.folder.name == "step-00000002" and not faults
    assert [each.name for each in tmp_path.iterdir()] == ["step-00000002"]


def pipeline() -> Pipeline:
    return Pipeline(tanh_net(0), nn.MSELoss(), momentum, stages=2, balance=[9, 7])


def test_a_clock_that_goes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest is the one that was made last, whatever the clock of its host says."""
    now = time.time
    with pipeline() as pipe:
        for hours in range(4):
            monkeypatch.setattr(time, "time", lambda hours=hours: now() - 3600 * hours)
            pipe.train(batches_of(70, 10), checkpoints=Checkpoints(tmp_path))
    assert sorted(each.name for each in tmp_path.iterdir()) == ["step-00000021", "step-00000028"]
    found, _ = find_latest(tmp_path)
    assert found is not None and found.position.total == 28


def test_nothing_is_removed_that_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "resnet" / "weights").mkdir(parents=True)
    (tmp_path / "resnet" / "weights" / "best.pt").write_text("mine")
    with pipeline() as pipe:
        pipe.train(batches_of(70, 10), checkpoints=Checkpoints(tmp_path))
        pipe.save(tmp_path / "bert")
        (tmp_path / "bert" / "checkpoint.json").unlink()
        (tmp_path / "step-00000007" / "checkpoint.json").unlink()
        with pytest.raises(FileExistsError, match="something else of this name"):
            pipe.save(tmp_path / "resnet")
        pipe.train(batches_of(70, 10), checkpoints=Checkpoints(tmp_path))
    assert sorted(each.name for each in tmp_path.iterdir()) == ["bert", "resnet", "step-00000014"]
    assert (tmp_path / "resnet" / "weights" / "best.pt").read_text() == "mine"


def test_what_is_the_users_own_stays_and_does_not_count(tmp_path: Path) -> None:
    """A copy of another name, and links, whatever they lead to."""
    folder, plan = tmp_path / "run", Checkpoints(tmp_path / "run", keep=2)
    with pipeline() as pipe:
        pipe.train(batches_of(70, 10), checkpoints=plan)
        first = folder / "step-00000007"
        shutil.copytree(first, folder / "best")
        shutil.copytree(first, tmp_path / "moved")
        shutil.rmtree(first)
        first.symlink_to("../moved")
        (folder / "zlatest").symlink_to("step-00000007")
        for _ in range(3):
            pipe.train(batches_of(70, 10), checkpoints=plan)
        kept = ["best", "step-00000007", "step-00000021", "step-00000028", "zlatest"]
        assert sorted(each.name for each in folder.iterdir()) == kept
        pipe.save(folder / "zlatest", keep=1)
        assert sorted(each.name for each in folder.iterdir()) == kept
    for each in (folder / "best", tmp_path / "moved"):
        assert Checkpoint.open(each).position.total == 7
    assert Checkpoint.open(folder / "zlatest").position.total == 28
    assert not (folder / "zlatest").is_symlink() and first.is_symlink()


def test_a_folder_that_nobody_may_look_into() -> None:
    """As the root of a disk has one, lost+found."""
    with tempfile.TemporaryDirectory() as name:
        folder, user = Path(name), os.geteuid()
        os.chmod(folder, 0o777)
        (folder / "lost+found").mkdir(mode=0)
        if user == 0:
            os.seteuid(65534)
        try:
            assert not is_remains(folder / "lost+found")
            with pipeline() as pipe:
                pipe.train(batches_of(70, 10), checkpoints=Checkpoints(folder))
                pipe.load(folder)
        finally:
            os.seteuid(user)
        os.chmod(folder / "lost+found", 0o700)
