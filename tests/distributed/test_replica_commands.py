"""Replicas from a configuration, of every kind: what the commands write, and what they refuse."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from ..launch.test_replicas import CONFIG
from .commands import UNDER_TORCHRUN, run_serve, run_throughput, run_train
from .ranks import Launcher, Outcome

pytestmark = pytest.mark.timeout(120)

KINDS = {"allreduce": 4, "hogwild": 4, "downpour": 6, "elastic": 6}


def run(launcher: Launcher, program: Any, ranks: int, folder: Path, *overrides: str) -> Outcome:
    (folder / "small.yaml").write_text(CONFIG)
    arguments = ["--config", str(folder / "small.yaml"), *overrides]
    return launcher.run(program, ranks, arguments, environment=UNDER_TORCHRUN)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(launcher: Launcher, tmp_path: Path, kind: str) -> None:
    ranks = KINDS[kind]
    job_folders = set(launcher.folder.iterdir())
    outcome = run(launcher, run_train, ranks, tmp_path, "--pipeline.replicas", kind)
    outcome.expect(*[0] * ranks)
    assert "small  2 replicas of 2 stages" in outcome.out[0]
    assert not any(outcome.out[1:]), "the first rank alone speaks"
    assert not any(outcome.err)
    (folder,) = set(launcher.folder.iterdir()) - job_folders
    folder = folder / "runs" / "small"
    found = json.loads((folder / "summary.json").read_text())
    rows = [(row["replica"], row["stage"]) for row in found["stages"]]
    assert rows == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(row["updates"] == 20 for row in found["stages"])
    weights = torch.load(folder / "weights.pt", weights_only=True)
    assert set(weights) == {f"{k}.{n}" for k in (1, 3, 5) for n in ("weight", "bias")}
    assert ("servers" in found) == (kind in ("downpour", "elastic"))
    assert outcome.out[0].count("test accuracy") == 1
    if kind == "downpour":
        assert re.search(r"server of stage 1 +40 updates, staleness \d", outcome.out[0])
        assert [row["updates"] for row in found["servers"]] == [40, 40]
        assert [row["pushed"] for row in found["servers"]] == [{"0": 20, "1": 20}] * 2
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        counts = [e for e in map(json.loads, lines) if e["event"] == "histogram"]
        assert [e["name"] for e in counts] == ["staleness of stage 0", "staleness of stage 1"]
        assert all(sum(e["counts"].values()) == 40 for e in counts)


REFUSED = {
    "ranks": (run_train, 3, "allreduce", "3 ranks do not make replicas of 2 stages: start with"),
    "serve": (run_serve, 2, "hogwild", "launch.serve is for `stages`, and `pipeline.replicas`"),
    "throughput": (run_throughput, 4, "hogwild", "throughput measures one pipeline: write"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(launcher: Launcher, tmp_path: Path, name: str) -> None:
    program, ranks, kind, line = REFUSED[name]
    outcome = run(launcher, program, ranks, tmp_path, "--pipeline.replicas", kind)
    outcome.expect(*[2] * ranks)
    assert outcome.report.startswith(f"headrace: {line}"), f"{outcome}"
    assert outcome.tracebacks == 0
