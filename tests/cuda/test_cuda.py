"""On one GPU: plain torch's numbers, and the same in one process and on ranks that share it."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from headrace.launch.simulate import main
from headrace.pipeline import Pipeline

from ..distributed.commands import run_train
from ..distributed.ranks import Launcher
from ..distributed.test_simulation import CONFIG
from ..distributed.training import CASES, SIZES, run_cases
from ..pipeline.helpers import OPTIMIZERS, assert_same, batches_of, plain, tanh_net
from ..pipeline.resuming import run_all

pytestmark = pytest.mark.timeout(300)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_stage_is_plain_torch(name: str) -> None:
    batches = batches_of(60, 7)
    model = tanh_net().cuda()
    placed = [(x.cuda(), y.cuda()) for x, y in batches]
    plain(model, nn.MSELoss(), OPTIMIZERS[name], placed, clip=0.1)
    with Pipeline(
        tanh_net(), nn.MSELoss(), OPTIMIZERS[name], device="cuda", clip_grad_norm=0.1
    ) as pipe:
        pipe.train(batches)
        assert all(p.is_cuda for _, p in pipe.named_parameters())
        found = pipe.state_dict()
    assert_same(found, {name: tensor.cpu() for name, tensor in model.state_dict().items()})


@pytest.mark.parametrize("options", ({"autocast": torch.bfloat16}, {"compile": True}), ids=str)
def test_low_precision_and_compilation_learn(options: dict[str, Any]) -> None:
    x = torch.randn(256, 5, generator=torch.Generator().manual_seed(0))
    batches = [(part, part[:, :3] * 2) for part in x.split(32)] * 30
    sgd = partial(torch.optim.SGD, lr=0.02)
    model = nn.Sequential(nn.Linear(5, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
    model.append(nn.Linear(64, 3))
    with Pipeline(
        model, nn.MSELoss(), sgd, stages=2, balance=[2, 3], device="cuda", **options
    ) as pipe:
        before = pipe.evaluate(batches[:8])["loss"]
        pipe.train(batches)
        assert pipe.evaluate(batches[:8])["loss"] < 0.2 * before


@pytest.mark.parametrize("stages", (2, 3))
def test_ranks_that_share_a_gpu(launcher: Launcher, stages: int) -> None:
    outcome = launcher.run(run_cases, stages, stages, False, "cuda:0", seconds=250)
    outcome.expect(*[0] * stages)
    alone = run_cases(stages, True, "cuda:0")
    for name in CASES:
        for rank in (each[name] for each in outcome.results):
            assert_same(rank.halfway, alone[name].halfway)
            assert_same(rank.weights, alone[name].weights)
            assert rank.reports == alone[name].reports, name
            assert rank.evaluations == alone[name].evaluations, name
            assert rank.predictions.equal(alone[name].predictions), name


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_is_gone_on_with(name: str, tmp_path: Path) -> None:
    """Dropout draws from the GPU's own generators, of each stage."""
    found = list(run_all(tmp_path, SIZES[2], [name], device="cuda"))
    for _, _, whole, again in found:
        assert_same(again.weights, whole.weights)
        assert again.evaluation == whole.evaluation
    assert len(found) == 3


def test_a_simulation_is_the_run_of_two_ranks(
    launcher: Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = CONFIG.replace("pipeline: {", "pipeline: {device: 'cuda:0', ")
    (tmp_path / "small.yaml").write_text(config)
    main(["--config", "small.yaml", "--stages", "2"])
    written = tmp_path / "runs" / "small-simulation" / "results.json"
    runs = [run for run in json.loads(written.read_text())["runs"] if run["stages"] > 1]
    for run in runs:
        (tmp_path / "one.yaml").write_text(run["config"])
        name = f"{run['variant']}2"
        outcome = launcher.run(
            run_train,
            2,
            ["--config", str(tmp_path / "one.yaml"), "--name", name],
            environment={"TORCHELASTIC_RUN_ID": "here"},
            seconds=120,
        )
        outcome.expect(0, 0)
        (folder,) = launcher.folder.glob(f"*/runs/{name}")
        scores = json.loads((folder / "summary.json").read_text())["test"]
        assert scores["loss"] == pytest.approx(run["scores"]["loss"], rel=1e-5), run["variant"]
