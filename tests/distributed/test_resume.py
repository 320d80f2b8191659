"""On ranks: what is saved there goes on there, bit for bit, in one process, and on other cuts."""

import os
import random
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from headrace.pipeline import Link, Pipeline
from headrace.pipeline.attempt import connect
from headrace.pipeline.checkpoints import (
    Checkpoint,
    Checkpoints,
    files,
    find_latest,
    load_weights,
)
from headrace.pipeline.replicas import Allreduce, Downpour, Elastic, Hogwild, Replicas
from headrace.pipeline.rules import Delayed

from ..pipeline.helpers import assert_close, assert_same, tanh_net
from ..pipeline.resuming import Ending, go_on, make_loader
from .ranks import Launcher
from .training import SIZES, network

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


def measured(folder: str, start: str | None, stages: int | None = None) -> dict[str, Any]:
    """Two passes under a flush, with a cut by time, which changes no number."""
    torch.manual_seed(8 if start else 3)
    random.seed(1)
    optimizer = partial(torch.optim.SGD, lr=0.02, momentum=0.9)
    with Pipeline(
        tanh_net(8 if start else 3, torch.float32),
        nn.MSELoss(),
        optimizer,
        schedule="1f1b",
        stages=stages,
    ) as pipe:
        if start is not None:
            pipe.load(start)
        while pipe.position.epochs < 2:
            pipe.train(make_loader(3), checkpoints=Checkpoints(folder, 5, keep=9))
        return {"weights": pipe.state_dict(), "position": pipe.position}


def test_other_ranks_with_a_cut_that_is_yet_to_be_measured(
    launcher: Launcher, tmp_path: Path
) -> None:
    """The first stage knows the place before any has its layers: no mini-batch goes in twice."""
    whole = measured(str(tmp_path / "saved"), None, 3)
    start = tmp_path / "saved/step-00000005"
    outcome = launcher.run(measured, 2, str(tmp_path / "again"), str(start))
    outcome.expect(0, 0)
    assert outcome.results[0]["position"] == whole["position"]
    for rank in outcome.results:
        assert rank["position"].epochs == 2
        assert_close(rank["weights"], whole["weights"], 1e-6)


def count_keys(folder: str) -> list[int]:
    """How many keys the store has after each of six calls, with three checkpoints each."""
    store, found = connect(), []
    with Pipeline(
        network(),
        nn.MSELoss(),
        partial(torch.optim.SGD, lr=0.02),
        balance=SIZES[2],
    ) as pipe:
        for _ in range(6):
            pipe.train(make_loader(3, 72), checkpoints=Checkpoints(folder, 4))
            pipe.save(Path(folder) / "last")  # until all that is being written is there
            found.append(store.num_keys())
    return found


def test_the_store_does_not_grow_with_the_checkpoints(launcher: Launcher, tmp_path: Path) -> None:
    """It is in torchrun's memory, for as long as the job lasts."""
    outcome = launcher.run(count_keys, 2, str(tmp_path))
    outcome.expect(0, 0)
    for found in outcome.results:
        assert found[1:] == found[1:2] * 5


# Replicas ------------------------------------------------------------------------------------


def save_slowly(folder: str) -> None:
    """Train with more checkpoints than a disk has time for."""
    files.sync = slow(files.sync)  # type: ignore[assignment]
    with Pipeline(
        network(),
        nn.MSELoss(),
        partial(torch.optim.SGD, lr=0.02),
        balance=SIZES[2],
        timeout=(60, 4),
    ) as pipe:
        pipe.train(make_loader(3, 72), checkpoints=Checkpoints(folder, 8))


def slow(sync: Callable[[Path], None]) -> Callable[[Path], None]:
    def slowly(path: Path) -> None:
        time.sleep(1.5)
        sync(path)

    return slowly


def test_a_slow_disk_is_no_silence(launcher: Launcher, tmp_path: Path) -> None:
    """The next checkpoint waits for it, and so does training."""
    outcome = launcher.run(save_slowly, 2, str(tmp_path), seconds=100)
    outcome.expect(0, 0)
    assert find_latest(tmp_path)[0] is not None


def replicated(
    kind: Replicas,
    plan: Checkpoints | None,
    start: str | None,
    epochs: int = 2,
    samples: int = 72,
    flushes: bool = False,
) -> dict[str, Any]:
    """Train with replicas to the end of so many epochs."""
    torch.manual_seed(8 if start else 3)
    random.seed(1)
    loader = make_loader(8 if start else 3, samples)
    with Pipeline(
        network(),
        nn.MSELoss(),
        partial(torch.optim.SGD, lr=0.02, momentum=0.9),
        rule=None if flushes else Delayed("current"),
        schedule="1f1b" if flushes else "stream",
        balance=SIZES[2],
        stages=2,
        replicas=kind,
        seed=29,
    ) as pipe:
        if start is not None:
            pipe.load(start)
        before = pipe.state_dict()
        reports = []
        while pipe.position.epochs < epochs:
            reports.append(replace(pipe.train(loader, checkpoints=plan), seconds=0.0))
        shards = [shard.updates for shard in pipe.shard_statistics()]
        weights = {"before": before, "after": pipe.state_dict()}
        return {**weights, "shards": shards, "reports": reports, "position": pipe.position}


KINDS = {
    "allreduce": (4, lambda: Allreduce(2)),
    "hogwild": (4, lambda: Hogwild(2)),
    "downpour": (6, lambda: Downpour(2)),
    "downpour beside": (4, lambda: Downpour(2, beside=True)),
    "elastic": (6, lambda: Elastic(2, every=2)),
}


@pytest.mark.parametrize("name", KINDS)
def test_replicas_go_on(launcher: Launcher, tmp_path: Path, name: str) -> None:
    ranks, make = KINDS[name]
    plan = Checkpoints(tmp_path, keep=9)
    whole = launcher.run(replicated, ranks, make(), plan, None)
    whole.expect(*[0] * ranks)
    first, second = sorted(tmp_path.glob("step-*"))
    again = launcher.run(replicated, ranks, make(), None, str(first))
    again.expect(*[0] * ranks)
    one, two = whole.results[0], again.results[0]
    assert_same(two["before"], load_weights(first))
    assert_same(one["after"], load_weights(second))
    if name == "allreduce":
        assert_same(two["after"], one["after"])
    assert two["shards"] == one["shards"], "servers count on from what they had"
    if "downpour" in name:
        assert one["shards"] == [16, 16], "8 mini-batches a replica, of both epochs"
    assert Checkpoint.open(first).has("server-1") == (ranks == 6 or "beside" in name)


@pytest.mark.parametrize("name", KINDS)
def test_replicas_go_on_from_the_middle_of_a_pass(
    launcher: Launcher, tmp_path: Path, name: str
) -> None:
    """The first replica has five mini-batches in a pass, the second four: the second saves at the
    end of its data, and waits there.
    """
    ranks, make = KINDS[name]
    plan = Checkpoints(tmp_path, 2, keep=9)
    whole = launcher.run(replicated, ranks, make(), plan, None, 2, 81)
    whole.expect(*[0] * ranks)
    one = whole.results[0]
    assert one["position"].total == 10 and one["reports"][0].samples <= 45
    saved = sorted(tmp_path.glob("step-*"))
    assert [int(each.name.removeprefix("step-")) for each in saved] == [2, 4, 7, 9]
    for start in (saved[1], saved[2]):
        plan = Checkpoints(tmp_path / "again", 2, keep=9)
        again = launcher.run(replicated, ranks, make(), plan, str(start), 2, 81)
        again.expect(*[0] * ranks)
        two = again.results[0]
        assert_same(two["before"], load_weights(start))
        assert two["position"] == one["position"]
        assert two["shards"] == one["shards"], "servers count on from what they had"
        if name == "allreduce":
            assert_same(two["after"], one["after"])
            pairs = zip(again.results, whole.results, strict=True)
            assert all(new["reports"][-1] == old["reports"][-1] for new, old in pairs)
    if "downpour" in name:
        assert one["shards"] == [18, 18], "9 mini-batches in a pass"


def test_passes_shorter_than_what_lies_between_two_checkpoints(
    launcher: Launcher, tmp_path: Path
) -> None:
    """Of five and four mini-batches: one is due at the end of the second, for the first replica."""
    plan = Checkpoints(tmp_path, 9, keep=9)
    launcher.run(replicated, 4, Allreduce(2), plan, None, 3, 81).expect(0, 0, 0, 0)
    (saved,) = tmp_path.glob("step-*")
    position = Checkpoint.open(saved).position
    assert (position.epochs, position.mini_batches, position.total) == (1, 5, 10)
    again = launcher.run(replicated, 4, Allreduce(2), plan, str(saved), 3, 81)
    again.expect(0, 0, 0, 0)
    assert again.results[0]["position"].total == 15


def test_replicas_are_not_disturbed_by_saves(launcher: Launcher, tmp_path: Path) -> None:
    """Under a flush, where nothing is in flight between two mini-batches."""
    none, some = (
        launcher.run(replicated, 4, Allreduce(2), plan, None, 2, 81, True)
        for plan in (None, Checkpoints(tmp_path, 1))
    )
    for outcome in (none, some):
        outcome.expect(0, 0, 0, 0)
    assert_same(none.results[0]["after"], some.results[0]["after"])
    assert none.results[0]["reports"] == some.results[0]["reports"]


def test_fewer_replicas_and_stages(launcher: Launcher, tmp_path: Path) -> None:
    launcher.run(replicated, 4, Allreduce(2), Checkpoints(tmp_path), None, 1).expect(0, 0, 0, 0)
    outcome = launcher.run(replicated, 2, Allreduce(1), None, str(tmp_path))
    outcome.expect(0, 0)
    assert_same(outcome.results[0]["before"], load_weights(tmp_path))


def tuned(folder: str, start: str | None) -> tuple[int, ...]:
    """Two passes with a slack that is measured; the depths that it led to."""
    torch.manual_seed(3)
    link = Link(latency=0.02) if start is None else None
    with Pipeline(
        network(),
        nn.MSELoss(),
        partial(torch.optim.SGD, lr=0.02),
        balance=SIZES[2],
        slack="auto",
        emulated_link=link,
    ) as pipe:
        if start is not None:
            pipe.load(start)
        while pipe.position.epochs < 2:
            pipe.train(make_loader(3, 200), checkpoints=Checkpoints(folder, 20))
        return pipe.depths


def test_a_measured_slack_is_kept(launcher: Launcher, tmp_path: Path) -> None:
    first = launcher.run(tuned, 2, str(tmp_path / "a"), None)
    first.expect(0, 0)
    assert first.results[0][0] > 1 and "slack" in first.out[0]
    again = launcher.run(tuned, 2, str(tmp_path / "b"), str(tmp_path / "a"))
    again.expect(0, 0)
    assert again.results == first.results and "slack" not in again.out[0], "it is not measured anew"
