"""A few faults of different kinds, done to a real job; and what is said when one is lost."""

import json
import os
import random
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch

from headrace.launch.faults.fault import Moment
from headrace.launch.faults.fragile import Fragile
from headrace.launch.faults.job import Job, LostError
from headrace.launch.faults.kill import Kill, KillReplica, KillServer
from headrace.launch.faults.plan import KINDS, draw
from headrace.launch.faults.verdict import check
from headrace.launch.faults.workload import WORKLOADS

FOUR = ("gradient", "kill", "pause", "cut")


@pytest.mark.timeout(180)
def test_four_faults(tmp_path: Path) -> None:
    """Each is survived, and the weights at the end are those of the undisturbed run."""
    command = [sys.executable, "-m", "headrace.launch.chaos", "--faults", "4", "--stages", "2"]
    command += ["--seed", "41", "--jobs", "gradient"]
    command += ["--kinds", ",".join(FOUR), "--folder", str(tmp_path / "chaos")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170, env=os.environ)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "chaos/results.json").read_text())
    assert results["lost"] == [] and results["seed"] == 41
    names = {KINDS[kind][0].name for kind in FOUR}
    assert Counter(row["what"] for row in results["faults"]) == Counter(names)
    assert done.stdout.count("came to its end: as undisturbed") == 1
    assert "| all, in 1 jobs" in done.stdout
    assert [path.name for path in (tmp_path / "chaos").iterdir()] == ["results.json"]


def test_the_seed_says_what_happens() -> None:
    def told(seed: int) -> list[tuple[str, str, str, float]]:
        return [
            (trial.workload, fault.name, str(fault.moment), fault.draws.random())
            for trial in draw(100, seed)
            for fault in trial.faults
        ]

    assert told(3) == told(3) != told(4)
    assert len(told(3)) == 100
    assert {what for _, what, _, _ in told(3)} == {fault.name for fault, _ in KINDS.values()}
    comes_to = defaultdict(set)
    for workload, what, _, _ in told(3):
        comes_to[what].add(workload)
    moves = comes_to["SIGTERM to torchrun"]
    assert moves == {"1f1b", "downpour"}, "elsewhere a drain in another place changes the numbers"
    assert comes_to["kill a server"] == {"downpour"}
    assert comes_to["kill a replica"] == {"allreduce", "downpour"}


def test_only_the_jobs_that_are_asked_for() -> None:
    found = {trial.workload for trial in draw(30, 0, ("kill", "server"), jobs=("1f1b", "downpour"))}
    assert found == {"1f1b", "downpour"}
    with pytest.raises(ValueError, match=r"no job of 1f1b,gradient is one for server,nan"):
        next(draw(1, 0, ("server", "nan"), jobs=("1f1b", "gradient")))


def test_who_is_who_in_a_job_with_servers(tmp_path: Path) -> None:
    """Two replicas of two stages, and a server for each, however many stages others have."""
    job = Job(tmp_path, WORKLOADS["downpour"], 3)
    assert [*map(job.name, range(6))] == [
        *("replica 0, stage 0", "replica 0, stage 1", "replica 1, stage 0", "replica 1, stage 1"),
        *("the server of stage 0", "the server of stage 1"),
    ]
    moment = Moment(30, 0.0)
    killed = {tuple(KillServer(random.Random(k), moment).victims(job)) for k in range(20)}
    assert killed == {(4,), (5,)}
    killed = {tuple(KillReplica(random.Random(k), moment).victims(job)) for k in range(20)}
    assert killed == {(0, 1), (2, 3)}
    killed = {tuple(Kill(random.Random(k), moment).victims(job)) for k in range(50)}
    assert killed == {(0,), (1,), (2,), (3,)}


def test_a_layer_that_loses_its_gradient() -> None:
    """Where a sample is large, and there alone; what it hands on is of the usual size."""
    x = torch.tensor([[1.0, -2.0], [400.0, -100.0]], requires_grad=True)
    y = Fragile()(x)
    assert y.tolist() == [[1.0, -2.0], [1.0, -0.25]]
    y.sum().backward()
    assert x.grad is not None
    assert x.grad[0].tolist() == [1.0, 1.0] and x.grad[1].isnan().all()


def test_a_fault_that_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a job's end, not a word of it, not a number goes by unseen."""
    job = Job(tmp_path, WORKLOADS["1f1b"], 2)
    job.log.write_text("headrace: something else\n")
    with pytest.raises(LostError, match=r"no report matches 'is gone'.*something else"):
        job.expect("is gone", 0)
    try:
        job.start_alone("--epochs", "0")
        with pytest.raises(LostError, match=r"ended with 2.*no ranks of start 0"):
            Kill(random.Random(0), Moment(30, 0.0)).await_moment(job)
    finally:
        job.end()
    job.run.mkdir(parents=True)
    monkeypatch.setattr(Job, "saved", lambda self: [(n, self.checkpoints) for n in (1, 2, 320)])
    monkeypatch.setattr(Job, "check_checkpoints", lambda self: None)
    monkeypatch.setattr("headrace.launch.faults.verdict._check_files", lambda job: None)
    epochs = [{"event": "epoch", "step": 640 * k, "epoch": k} for k in range(1, 9)]
    (job.run / "metrics.jsonl").write_text("\n".join(map(json.dumps, epochs)))
    stage = {"updates": 320, "skipped": 0}
    summary = {"samples": 320 * 16, "stages": [stage, stage]}
    (job.run / "summary.json").write_text(json.dumps(summary))
    weights = {"a": torch.tensor([1.0, 2.0]), "b": torch.zeros(3)}
    torch.save(weights, job.run / "weights.pt")
    check(job, weights)
    other = {**weights, "a": torch.tensor([1.0, torch.tensor(2.0).nextafter(torch.tensor(3.0))])}
    with pytest.raises(LostError, match=r"1 of 2 weights are not .* \(a …; by 2.38e-07 at most"):
        check(job, other)
    weights["a"][0] = torch.nan
    torch.save(weights, job.run / "weights.pt")
    with pytest.raises(LostError, match=r"the weights a are not finite"):
        check(job, None)
    summary["stages"] = [stage, {**stage, "updates": 319}]
    (job.run / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(LostError, match=r"counts updates: \[320, 319\], not \[320, 320\]"):
        check(job, None)
    (job.run / "metrics.jsonl").write_text("\n".join(map(json.dumps, epochs[1:])))
    with pytest.raises(LostError, match=r"tells of epochs 2, 3"):
        check(job, None)
