"""The simulation command against torchrun's training command: the same weights, bit for bit."""

import json
from pathlib import Path

import pytest
import torch

from headrace.launch.simulate import main
from headrace.launch.simulation.run import fingerprint

from .commands import UNDER_TORCHRUN, run_train
from .ranks import Launcher

pytestmark = pytest.mark.timeout(120)

CONFIG = """\
epochs: 2
threads: 1
model:
  class_path: gpt
  init_args: {vocabulary: 97, context: 16, blocks: 4, width: 16, heads: 2, dropout: 0.1}
loss: TokenCrossEntropy
optimizer: {class_path: AdamW, init_args: {lr: 3e-3}}
scheduler: cosine_with_warmup
data:
  train: {class_path: SourceText, init_args: {context: 16, characters: 4000}}
  test: {class_path: SourceText, init_args: {split: validation, context: 16, characters: 4000}}
  batch_size: 16
pipeline: {balance: parameters, clip_grad_norm: 1.0}
"""


def test_the_weights_of_two_and_four_processes(
    launcher: Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(CONFIG)
    main(["--config", "small.yaml", "--stages", "2,4"])
    written = tmp_path / "runs" / "small-simulation" / "results.json"
    runs = [run for run in json.loads(written.read_text())["runs"] if run["stages"] > 1]
    assert {(run["variant"], run["stages"]) for run in runs} == {
        (weights, stages) for weights in ("stash", "predict", "current") for stages in (2, 4)
    }
    for stages in (2, 4):
        same = {run["variant"]: run for run in runs if run["stages"] == stages}
        arguments = {}
        for weights, run in same.items():
            file = tmp_path / f"{weights}{stages}.yaml"
            file.write_text(run["config"])
            arguments[weights] = ["--config", str(file), "--name", file.stem]
        jobs = launcher.run_many(run_train, stages, arguments, environment=UNDER_TORCHRUN)
        for weights, outcome in jobs.items():
            outcome.expect(*[0] * stages)
            (folder,) = launcher.folder.glob(f"*/runs/{weights}{stages}")
            found = torch.load(folder / "weights.pt", weights_only=True)
            assert fingerprint(found) == same[weights]["weights"], (weights, stages)
            scores = json.loads((folder / "summary.json").read_text())["test"]
            assert scores == same[weights]["scores"]
