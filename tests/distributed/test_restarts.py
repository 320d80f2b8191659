"""SIGTERM saves and leaves with 0; what torchrun starts again goes on by itself."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from headrace.launch import train
from headrace.pipeline import Pipeline
from headrace.pipeline.checkpoints import Checkpoint, Checkpoints
from headrace.pipeline.replicas import Allreduce, Downpour, Replicas

from ..pipeline.helpers import assert_same, batches_of, momentum, tanh_net
from .commands import run_train
from .ranks import Launcher, free_port, torchrun

pytestmark = pytest.mark.timeout(180)

SIZES = {1: [16], 2: [9, 7], 3: [5, 6, 5]}
# Copies, as a DataLoader gives them: the last bits of MKL's products depend on where their operands
# begin in memory, and views of one tensor begin anywhere.
BATCHES = [(x.clone(), y.clone()) for x, y in batches_of(400, 5)]


class Slowly:
    """A loader that takes its time, and tells when it has given so many mini-batches."""

    def __init__(self, flag_at: int) -> None:
        self.flag_at = flag_at

    def __iter__(self) -> Any:
        for k, batch in enumerate(BATCHES):
            if k == self.flag_at:
                Path("under-way").touch()
            time.sleep(0.02)
            yield batch


def stoppable(
    stages: int, kind: Replicas | None, folder: str, start: str | None, slow: bool
) -> dict[str, torch.Tensor]:
    """Two passes, under a flush, where it matters to no number that the stream was stopped."""
    late = isinstance(kind, Downpour)
    flushes: dict[str, Any] = {} if late else {"schedule": "1f1b"}
    with Pipeline(
        tanh_net(),
        nn.MSELoss(),
        momentum,
        stages=stages,
        balance=SIZES[stages],
        replicas=kind,
        **flushes,
    ) as pipe:
        if start is not None:
            pipe.load(start)
        loader = Slowly(20) if slow else BATCHES
        while pipe.position.epochs < 2:
            report = pipe.train(loader, checkpoints=Checkpoints(folder, keep=9))
        numbers = [report.updates, report.samples, report.loss]
        return {**pipe.state_dict(), "report": torch.tensor(numbers)}


@pytest.mark.parametrize("stages", (1, 3))
def test_a_sigterm_saves(launcher: Launcher, tmp_path: Path, stages: int) -> None:
    """All ranks get it, as torchrun hands it on."""
    job = launcher.start(stoppable, stages, stages, None, str(tmp_path), None, True)
    job.wait_for("under-way")
    job.signal(signal.SIGTERM)
    outcome = job.wait(30)
    outcome.expect(*[0] * stages)
    (saved,) = tmp_path.iterdir()
    assert outcome.reports == [f"headrace: stopped by SIGTERM; {saved} goes on from here"]
    assert 20 < Checkpoint.open(saved).position.mini_batches < 80
    again = launcher.run(stoppable, stages, stages, None, str(tmp_path / "x"), str(saved), False)
    whole = launcher.run(stoppable, stages, stages, None, str(tmp_path / "y"), None, False)
    assert_same(again.results[0], whole.results[0])


@pytest.mark.parametrize("kind", (Allreduce(2), Downpour(2)), ids=lambda kind: type(kind).__name__)
def test_a_sigterm_to_one_rank_of_replicas(
    launcher: Launcher, tmp_path: Path, kind: Replicas
) -> None:
    """One host is to be given back, say: all save, and all leave. Replicas in step do it at one
    place, and the run comes to what an undisturbed one does.
    """
    late = isinstance(kind, Downpour)
    ranks = 6 if late else 4
    job = launcher.start(stoppable, ranks, 2, kind, str(tmp_path), None, True)
    job.wait_for("under-way")
    job.signal(signal.SIGTERM, [3 if late else 0])  # the others hear of it up to 0.5 s later
    job.wait(30).expect(*[0] * ranks)
    again = launcher.run(stoppable, ranks, 2, kind, str(tmp_path), str(tmp_path), False)
    again.expect(*[0] * ranks)
    assert Checkpoint.open(tmp_path).position.epochs == 2
    if not late:
        whole = launcher.run(stoppable, ranks, 2, kind, str(tmp_path / "whole"), None, False)
        for one, other in zip(again.results, whole.results, strict=True):
            assert_same(one, other)


def test_survivors_of_a_crash_do_not_save(launcher: Launcher, tmp_path: Path) -> None:
    """torchrun sends them a SIGTERM, too."""
    job = launcher.start(stoppable, 3, 3, None, str(tmp_path), None, True)
    job.wait_for("under-way")
    job.signal(signal.SIGKILL, [1])
    job.signal(signal.SIGTERM, [0, 2])
    job.wait(30).expect(1, -9, 1)
    assert not list(tmp_path.glob("step-*"))


def crash_once(folder: str) -> dict[str, torch.Tensor] | None:
    """The training command; in the first start stage 1 is killed half-way."""
    if not Path("killed").exists() and os.environ["RANK"] == "1":
        _after_updates(120, lambda: [Path("killed").touch(), os.kill(os.getpid(), signal.SIGKILL)])
    train.main(TRAINING)
    return None


def _after_updates(updates: int, act: Callable[[], Any]) -> None:
    real, count = torch.optim.SGD.step, [0]

    def step(self: Any, closure: Any = None) -> Any:
        count[0] += 1
        if count[0] == updates:
            act()
        return real(self, closure)

    torch.optim.SGD.step = step  # type: ignore[method-assign]


TRAINING = ["--config", "digits", "--epochs", "4", "--checkpoint.every", "30", "--name", "it"]
TRAINING += ["--pipeline.balance", "[6, 5]"]


def test_torchrun_brings_a_killed_stage_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--standalone", "--max-restarts", "2")
    job = torchrun(tmp_path, crash_once, 2, "", options=options)
    out, err = job.communicate(timeout=120)
    assert job.returncode == 0, err
    assert (tmp_path / "killed").exists()
    assert "goes on in epoch" in out, out
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["it"], "in the same folder"
    whole = tmp_path / "whole"
    whole.mkdir()
    monkeypatch.chdir(whole)
    train.main([*TRAINING, "--stages", "2"])  # in one process: the same numbers
    found = [torch.load(each / "runs/it/weights.pt") for each in (tmp_path, whole)]
    assert_same(*found)
    lines = [
        (each / "runs/it/metrics.jsonl").read_text().splitlines() for each in (tmp_path, whole)
    ]
    steps = [[json.loads(line)["step"] for line in each] for each in lines]
    assert steps[0] == sorted(steps[0]) and steps[0][-1] == steps[1][-1]


def crash_before_saving(folder: str) -> None:
    """The training command, from a checkpoint; in the first start stage 1 is killed early."""
    if not Path("killed").exists() and os.environ["RANK"] == "1":
        _after_updates(10, lambda: [Path("killed").touch(), os.kill(os.getpid(), signal.SIGKILL)])
    train.main(FROM_OLD)


FROM_OLD = ["--config", "digits", "--epochs", "2", "--checkpoint.every", "1000", "--name", "it"]
FROM_OLD += ["--pipeline.balance", "[6, 5]", "--checkpoint.resume", "runs/old"]


def test_a_stage_killed_before_the_first_checkpoint_goes_on_from_the_given_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    old = ["--epochs", "1", "--name", "old", "--checkpoint.resume", "null", "--stages", "2"]
    train.main([*FROM_OLD, *old])
    options = ("--standalone", "--max-restarts", "2")
    job = torchrun(tmp_path, crash_before_saving, 2, "", options=options)
    out, err = job.communicate(timeout=120)
    assert job.returncode == 0, err
    assert Path("killed").exists() and out.count("goes on in epoch 2") == 2, out
    assert sorted(p.name for p in Path("runs").iterdir()) == ["it", "old"], "in the same folder"
    train.main([*FROM_OLD, "--stages", "2"])  # in one process: the same numbers
    assert_same(*(torch.load(f"runs/{run}/weights.pt") for run in ("it", "it-2")))


def test_the_stages_that_are_left_go_on(tmp_path: Path) -> None:
    """Of two machines one is lost, with torchrun: the other meets with itself.

    The last call is long enough for both to be there at the start: a torchrun that comes later
    than that waits in vain, and so does the other, for a fault of torch's.
    """
    settings = "join_timeout=60,last_call_timeout=8,keep_alive_interval=1,keep_alive_max_attempt=2"
    options = ["--nnodes", "1:2", "--max-restarts", "2", "--rdzv-backend", "c10d"]
    options += ["--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--local-addr", "127.0.0.1"]
    agents = [
        torchrun(tmp_path, lose_a_machine, 1, "", options=[*options, "--rdzv-conf", each])
        for each in (f"{settings},is_host=true", f"{settings},is_host=false")
    ]
    try:
        out, err = agents[0].communicate(timeout=150)
    finally:
        for agent in agents:
            agent.kill()
    assert agents[0].returncode == 0, err
    assert "has 2 stages, this pipeline 1: weights, optimizers, learning rates and the place" in out
    assert "goes on in epoch" in out
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["it"]


def lose_a_machine(folder: str) -> None:
    """The training command; the second of two stages dies half-way, and its torchrun with it."""
    if os.environ["WORLD_SIZE"] == "2" and os.environ["RANK"] == "1":
        _after_updates(
            60, lambda: [os.kill(p, signal.SIGKILL) for p in (os.getppid(), os.getpid())]
        )
    own = ["--name", "it", "--stages", "null", "--pipeline.balance", "parameters"]
    train.main(["--config", "digits", "--epochs", "3", "--checkpoint.every", "20", *own])


# Replicas and servers ------------------------------------------------------------------------

REPLICATED = ["--config", "digits", "--epochs", "2", "--checkpoint.every", "epoch", "--name", "it"]
REPLICATED += ["--pipeline.balance", "[6, 5]", "--stages", "2"]


def crash_of(rank: int, kind: str) -> None:
    """The training command; in the first start a rank is killed in the second of two passes."""
    if not Path("killed").exists() and os.environ["RANK"] == str(rank):
        updates = 60 if kind == "downpour" else 30
        _after_updates(
            updates, lambda: [Path("killed").touch(), os.kill(os.getpid(), signal.SIGKILL)]
        )
    train.main([*REPLICATED, "--pipeline.replicas.class_path", kind])


def test_torchrun_brings_a_killed_replica_back(launcher: Launcher, tmp_path: Path) -> None:
    """Replicas in step: the weights are those of a run to which nothing happened."""
    options = ("--standalone", "--max-restarts", "2")
    job = torchrun(tmp_path, crash_of, 4, 3, "allreduce", options=options)
    out, err = job.communicate(timeout=150)
    assert job.returncode == 0 and "goes on in epoch 2" in out, err
    arguments = [*REPLICATED, "--pipeline.replicas.class_path", "allreduce"]
    environment = {"TORCHELASTIC_RUN_ID": "here"}
    whole = launcher.run(run_train, 4, arguments, environment=environment, seconds=100)
    whole.expect(0, 0, 0, 0)
    (folder,) = launcher.folder.glob("*/runs/it")
    runs = (folder, tmp_path / "runs/it")
    assert_same(*(torch.load(each / "weights.pt") for each in runs))
    # The epoch that a checkpoint was made at the end of is in the account that it keeps.
    ends = [json.loads((each / "summary.json").read_text()) for each in runs]
    assert ends[0]["samples"] == ends[1]["samples"]
    told = [_epochs(each / "metrics.jsonl") for each in runs]
    assert told[0] == told[1] and len(told[0]) == 2


def _epochs(metrics: Path) -> list[tuple[int, int]]:
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [(line["epoch"], line["step"]) for line in lines if line["event"] == "epoch"]


def test_torchrun_brings_a_killed_server_back(tmp_path: Path) -> None:
    """What it had applied when it was saved is counted, and what came later is not, twice."""
    options = ("--standalone", "--max-restarts", "2")
    job = torchrun(tmp_path, crash_of, 6, 4, "downpour", options=options)
    out, err = job.communicate(timeout=170)
    assert job.returncode == 0 and "goes on in epoch 2" in out, err
    assert "the server of stage 0 (rank 4)" in err, "who was gone"
    summary = json.loads((tmp_path / "runs/it/summary.json").read_text())
    assert [server["updates"] for server in summary["servers"]] == [90, 90], "45 of each pass"
    assert summary["test"]["accuracy"] > 0.8
