"""A few faults of different kinds, done to a real job; and what is said when one is lost."""

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from headrace.launch.faults.fault import Moment
from headrace.launch.faults.job import Job, LostError
from headrace.launch.faults.kill import Kill
from headrace.launch.faults.plan import KINDS, draw
from headrace.launch.faults.verdict import check
from headrace.launch.faults.workload import WORKLOADS

FIVE = ("kill", "two", "pause", "preempt", "cut")


@pytest.mark.timeout(180)
def test_five_faults(tmp_path: Path) -> None:
    """Each is survived, and the weights at the end are those of the undisturbed run."""
    command = [sys.executable, "-m", "headrace.launch.chaos", "--faults", "5", "--stages", "2"]
    command += ["--seed", "41"]
    command += ["--kinds", ",".join(FIVE), "--folder", str(tmp_path / "chaos")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170, env=os.environ)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "chaos/results.json").read_text())
    assert results["lost"] == [] and results["seed"] == 41
    names = {KINDS[kind][0].name for kind in FIVE}
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
    moves = {name for name, what, _, _ in told(3) if what == KINDS["preempt"][0].name}
    assert moves == {"1f1b"}, "elsewhere a drain in another place changes the numbers"


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
    (job.run / "metrics.jsonl").write_text("")
    weights = {"a": torch.tensor([1.0, 2.0]), "b": torch.zeros(3)}
    torch.save(weights, job.run / "weights.pt")
    check(job, weights)
    other = {**weights, "a": torch.tensor([1.0, torch.tensor(2.0).nextafter(torch.tensor(3.0))])}
    with pytest.raises(LostError, match=r"1 of 2 weights are not .* \(a …; by 2.38e-07 at most"):
        check(job, other)
