"""Replicas from a configuration, by the commands of the README."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace.launch.assemble import make_corrections, make_pipeline, make_replicas
from headrace.launch.config import parse
from headrace.launch.display import bars
from headrace.launch.run_files import RunFiles, new_folder
from headrace.pipeline.corrections import DelayCompensation, LearningRate
from headrace.pipeline.corrections.learning_rate import inverse_sqrt
from headrace.pipeline.replicas import Allreduce, Downpour, Elastic, Hogwild

from ..distributed.commands import UNDER_TORCHRUN, run_serve, run_train
from ..distributed.ranks import Job, Launcher, free_port

CONFIG = """\
stages: 2
epochs: 2
threads: 1
log_every: 2
model: {class_path: mlp, init_args: {widths: [6, 8, 8, 3]}}
loss: CrossEntropyLoss
optimizer: {class_path: SGD, init_args: {lr: 0.1}}
scheduler: cosine_with_warmup
metrics: [accuracy]
data:
  train: {class_path: Generated, init_args: {shape: [6], classes: 3, samples: 80}}
  test: {class_path: Generated, init_args: {shape: [6], classes: 3, samples: 40}}
  batch_size: 4
pipeline:
  balance: parameters
  rule: {class_path: delayed, init_args: {weights: current}}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(CONFIG)
    yield tmp_path


def start(program: str, ranks: int, *overrides: str) -> "subprocess.Popen[str]":
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    run += ["--nproc-per-node", str(ranks), "-m", f"headrace.launch.{program}"]
    return subprocess.Popen(
        [*run, "--config", "small.yaml", *overrides],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: "subprocess.Popen[str]", code: int = 0) -> tuple[str, str]:
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == code, f"{out}\n{err}"
    return out, err


def summary(run: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(f"runs/{run}/summary.json").read_text())
    return found


def test_servers_and_replicas_as_jobs_of_their_own(
    launcher: Launcher, no_rank_is_left: None, folder: Path
) -> None:
    def begin(program: Any, *overrides: str) -> Job:
        arguments = ["--config", "small.yaml", "--pipeline.replicas", "downpour", *with_port]
        given = [*arguments, *overrides]
        return launcher.start(program, 2, given, folder, environment=UNDER_TORCHRUN)

    with_port = ["--pipeline.replicas.init_args.count", "2"]
    with_port += ["--pipeline.replicas.init_args.address", f"127.0.0.1:{free_port()}"]
    servers = begin(run_serve, "--pipeline.replicas.init_args.checkpoint", "kept")
    jobs = [begin(run_train, "--name", f"replica-{k}") for k in range(2)]
    for job in [*jobs, servers]:
        outcome = job.wait()
        outcome.expect(0, 0)
        assert not any(outcome.err)
    out = "".join(outcome.out)
    assert "replica 0 has joined" in out and "replica 1 has finished" in out
    assert out.count("40 updates, staleness") == 2
    for stage in range(2):
        state = torch.load(f"kept/stage-{stage}.pt", weights_only=True)
        assert state["version"] == 40
    for k in range(2):
        assert summary(f"replica-{k}")["stages"][0]["updates"] == 20


def test_a_signal_ends_the_servers(folder: Path) -> None:
    address = ["--pipeline.replicas.init_args.address", f"127.0.0.1:{free_port()}"]
    count = ["--pipeline.replicas", "downpour", "--pipeline.replicas.init_args.count", "2"]
    servers = start("serve", 1, "--stages", "1", *count, *address)
    assert servers.stdout is not None
    assert servers.stdout.readline().startswith("serving 1 stage to 2 replicas at")
    servers.send_signal(signal.SIGTERM)
    _, err = finish(servers, code=1)
    assert "headrace: stopped by SIGTERM" in err


# What a configuration makes ---------------------------------------------------------------------


def options(*overrides: str) -> Any:
    return parse(["--config", "small.yaml", *overrides]).pipeline


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("allreduce", Allreduce),
        ("hogwild", Hogwild),
        ("downpour", Downpour),
        ("elastic", Elastic),
        ("headrace.pipeline.replicas.Downpour", Downpour),
    ],
)
def test_names_of_replicas(folder: Path, name: str, kind: type) -> None:
    assert type(make_replicas(options("--pipeline.replicas", name))) is kind


def test_arguments_of_replicas(folder: Path) -> None:
    arguments = "{class_path: downpour, init_args: {count: 3, sync: hard, checkpoint: x}}"
    made = make_replicas(options("--pipeline.replicas", arguments))
    assert isinstance(made, Downpour)
    assert (made.count, made.sync, made.prefetch, made.checkpoint) == (3, "hard", 0, Path("x"))
    with pytest.raises(ValueError, match=r"pipeline.replicas: n_fetch=0: give a whole number >= 1"):
        make_replicas(
            options("--pipeline.replicas", "{class_path: downpour, init_args: {n_fetch: 0}}")
        )
    with pytest.raises(ValueError, match="no 'downpur' in"):
        options("--pipeline.replicas", "downpur")


def test_corrections(folder: Path) -> None:
    given = (
        "[learning_rate, {class_path: learning_rate, init_args: {factor: inverse_sqrt}}, "
        "{class_path: learning_rate, init_args: {factor: 0.5}}, "
        "{class_path: learning_rate, init_args: {factor: mine.factor}}, delay_compensation]"
    )
    (folder / "mine.py").write_text("def factor(staleness): return 1 / (2 + staleness)\n")
    made = make_corrections(options("--pipeline.corrections", given))
    assert [type(each) for each in made] == [LearningRate] * 4 + [DelayCompensation]
    factors = [each.factor(4) for each in made]
    assert factors == [0.25, inverse_sqrt(4), 0.5, 1 / 6, 1.0]
    one = make_corrections(options("--pipeline.corrections", "learning_rate"))
    assert [type(each) for each in one] == [LearningRate]
    with pytest.raises(ValueError, match=r"pipeline.corrections\[0\].factor: no 'invrse'"):
        options(
            "--pipeline.corrections", "[{class_path: learning_rate, init_args: {factor: invrse}}]"
        )


def test_alone_replicas_are_refused(folder: Path) -> None:
    config = parse(["--config", "small.yaml", "--pipeline.replicas", "downpour"])
    with pytest.raises(ValueError, match="torchrun --nproc-per-node 6"):
        make_pipeline(config, torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)), 1)


def test_a_histogram_in_the_files(folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    files = RunFiles(new_folder(Path("runs"), "x"), "")
    files.histogram("staleness of stage 1", 40, {0: 3, 2: 5})
    files.close()
    line = json.loads((files.folder / "metrics.jsonl").read_text())
    assert line["counts"] == {"0": 3, "2": 5} and line["step"] == 40
    board = EventAccumulator(str(files.folder))
    board.Reload()
    (event,) = board.Histograms("servers/staleness of stage 1")
    shown = event.histogram_value
    assert (shown.num, shown.sum, shown.min, shown.max) == (8, 10, 0, 2)


def test_a_histogram_in_a_line() -> None:
    assert bars({0: 1, 1: 4, 3: 8}) == "(0 ▁▄ █ 3)"
    assert bars({2: 5}) == "(2 █ 2)"
    assert bars(dict.fromkeys(range(64), 1)) == f"(0 {'█' * 16} 63)"
    assert bars({}) == "(none)"
