"""The sharpness command: figures, files, refusals, alone and under torchrun; and its study."""

import json
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace.launch import saved, train
from headrace.launch.assemble import make_model
from headrace.launch.config import parse, to_yaml
from headrace.launch.data import Digits
from headrace.launch.saved import find_saved
from headrace.launch.sharpness import main
from headrace.launch.studies import large_batch
from headrace.launch.studies.large_batch import (
    BOTH,
    DECAY,
    GROWTH,
    HYBRID,
    Minimum,
    Run,
    check,
    draw,
    epoch_of,
    find_minimum,
    follow,
    forever,
    minima_table,
    runs_table,
    train_until,
    warm,
)

from ..distributed.commands import UNDER_TORCHRUN, run_sharpness
from ..distributed.ranks import Launcher

pytest.importorskip("scipy")

TINY = """\
name: tiny
stages: 2
threads: 1
model: {class_path: mlp, init_args: {widths: [6, 8, 8, 3], norm: BatchNorm1d, dropout: 0.5}}
loss: CrossEntropyLoss
optimizer: {class_path: SGD, init_args: {lr: 0.1}}
metrics: [accuracy]
data:
  train: {class_path: Generated, init_args: {shape: [6], classes: 3, samples: 20}}
  test: {class_path: Generated, init_args: {shape: [6], classes: 3, samples: 10, seed: 1}}
  batch_size: 8
  drop_last: true
pipeline:
  balance: [5, 5]
"""

FEW = ("--subspace", "5", "--epsilon", "1e-3")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Each test runs in a folder with two runs, runs/a and runs/b."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    for seed, name in enumerate("ab"):
        make_run(Path("runs") / name, seed)
    yield tmp_path
    for number, handler in handlers.items():
        signal.signal(number, handler)


def make_run(run: Path, seed: int, text: str = TINY) -> None:
    """A run's files, as training leaves them, with weights that were never trained."""
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(text)
    config = parse(["--config", str(run / "config.yaml"), "--seed", str(seed)])
    (run / "config.yaml").write_text(to_yaml(config))
    model = make_model(config)
    for _ in range(3):
        model(torch.randn(20, 6))  # BatchNorm has statistics of its own
    torch.save(model.state_dict(), run / "weights.pt")


def result(out: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((Path(out) / "sharpness.json").read_text())
    return loaded


def test_one_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    main(["--checkpoint", "runs/a", "--subspace", "5"])
    out = capsys.readouterr().out
    assert out.startswith("tiny  187 weights, float64, evaluation mode, 2 stages\n")
    for row in (
        "train loss", "train accuracy", "test loss", "test accuracy",
        "phi, whole space, epsilon 0.001", "phi, whole space, epsilon 0.0005",
        "phi, 5 directions, epsilon 0.001", "phi, 5 directions, epsilon 0.0005", "lambda_max",
    ):  # fmt: skip
        assert re.search(rf"^{row} +\d", out, re.M), out
    assert "distance" not in out

    found = result("runs/a")
    assert "line" not in found
    (point,) = found["checkpoints"]
    config = parse(["--config", "runs/a/config.yaml"])
    model = make_model(config)
    model.load_state_dict(torch.load("runs/a/weights.pt"))
    data = [(x, y) for x, y in _dataset(config)]
    x, y = torch.stack([x for x, _ in data]), torch.tensor([int(y) for _, y in data])
    loss = torch.nn.functional.cross_entropy(model.double().eval()(x.double()), y)
    assert point["train"]["loss"] == pytest.approx(loss.item(), rel=1e-12), "all samples"
    fine, finer = point["phi"]
    assert fine["phi"] > finer["phi"] > 0
    wanted = 100 * (fine["loss"] - loss.item()) / (1 + loss.item())
    assert fine["phi"] == pytest.approx(wanted, rel=1e-9)
    assert fine["phi"] > point["phi_subspace"][0]["phi"] > 0
    worst = point["worst_direction"]
    assert (worst["steps"][0], worst["steps"][10], worst["steps"][-1]) == (-1, 0, 1)
    assert worst["loss"][10] == point["train"]["loss"]
    assert worst["loss"][-1] == pytest.approx(fine["loss"], rel=1e-12)
    assert (Path("runs/a") / "worst-direction.png").stat().st_size > 10_000
    assert not Path("runs/a/line.png").exists()


def _dataset(config: Any) -> Any:
    from headrace.launch.components import build, call

    return call("data.train", build("data.train", config.data.train))


def test_the_line_between_two(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    main(["--checkpoint", "runs/a", "runs/b", "--out", "both", *FEW])
    out = capsys.readouterr().out
    assert re.search(r"^ +runs/a +runs/b$", out, re.M), out
    assert re.search(r"^distance between the two +\d", out, re.M), out
    found = result("both")
    a, b = found["checkpoints"]
    line = found["line"]
    assert len(line["alphas"]) == len(line["train"]) == len(line["test"]) == 25
    assert (line["train"][8], line["test"][8]) == (a["train"], a["test"]), "alpha is 0"
    assert (line["train"][16], line["test"][16]) == (b["train"], b["test"]), "alpha is 1"
    assert (Path("both") / "line.png").stat().st_size > 10_000
    alone = "runs/b"
    main(["--checkpoint", alone, *FEW])
    assert result(alone)["checkpoints"][0] == b, "the other's buffers are gone"


def trained() -> list[Path]:
    """A run's checkpoints, the newest last."""
    Path("tiny.yaml").write_text(TINY)
    train.main(["--config", "tiny.yaml", "--checkpoint.every", "1", "--checkpoint.keep", "9"])
    return sorted(Path("runs/tiny/checkpoints").iterdir())


def test_a_checkpoint_and_a_run_that_was_stopped(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last checkpoint has the weights of the run's end, and stands for it before."""
    first, last = trained()
    run = Path("runs/tiny")
    ended, (earlier, later) = find_saved(run), map(find_saved, (first, last))
    whole = ended.weights()
    assert ended.checkpoint is None and ended.config() == later.config(["--stages", "2"]), (
        "the notes have all of it"
    )
    assert all(torch.equal(whole[name], each) for name, each in later.weights().items())
    assert any(not torch.equal(whole[name], each) for name, each in earlier.weights().items())
    capsys.readouterr()

    (run / "weights.pt").unlink()
    stopped = find_saved(run)
    said = f"headrace: runs/tiny has not ended: its newest whole checkpoint is {last}\n"
    assert capsys.readouterr().out == said
    assert (stopped.folder, stopped.out) == (last, run)
    with monkeypatch.context() as second:
        second.setattr(saved, "rank", lambda: 1)
        second.setattr(saved, "hear", lambda name: str(first))
        assert find_saved(run).checkpoint == earlier.checkpoint, "what the first rank has found"
    for file in last.glob("weights/*"):
        file.write_bytes(file.read_bytes()[:-1])
    assert find_saved(run).folder == first
    assert str(last) in capsys.readouterr().out
    assert find_saved(run / "checkpoints").folder == first

    main(["--checkpoint", str(first), "--subspace", "1", "--data.batch_size", "20"])
    assert "\nphi, 1 direction, epsilon 0.001 " in capsys.readouterr().out
    assert result(f"{first}-sharpness")["checkpoints"][0]["checkpoint"] == str(first)
    assert not (first / "sharpness.json").exists(), "a checkpoint stays as it was written"


def test_weights_that_are_none_or_not_finite(capsys: pytest.CaptureFixture[str]) -> None:
    file = Path("runs/a/weights.pt")
    weights = torch.load(file)

    def says(state: Any) -> str:
        torch.save(state, file)
        line = refused(capsys, "--checkpoint", "runs/a")
        return line.removeprefix("--checkpoint runs/a: ")

    assert says([1]).startswith("weights.pt does not hold tensors by their names (it is a list);")
    assert "('1.weight' is a int)" in says(weights | {"1.weight": 5})
    spoilt = weights["5.weight"].clone()
    spoilt[0, 0] = float("nan")
    assert says(weights | {"5.weight": spoilt}) == (
        "the weights of layer '5' are not finite: NaN or infinity in 5.weight; take a checkpoint "
        "from before training diverged"
    )


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("headrace: ") and line.count("\n") == 1, line
    return line[len("headrace: ") :].strip()


def test_refusals(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def says(*arguments: str) -> str:
        return refused(capsys, "--checkpoint", *arguments)

    assert says("runs/none") == (
        "--checkpoint runs/none: neither a run nor a checkpoint is there; give a run's folder, as "
        "runs/digits, or one with a checkpoint.json"
    )
    assert says("runs/a", "runs/b", "runs/a").startswith("--checkpoint has 3 folders: give one")
    assert says("runs/a", "--epsilon", "0").startswith("--epsilon 0: give numbers above 0")
    assert says("runs/a", "--subspace", "0").startswith("--subspace 0: give a number")
    for seed in ("-1", str(2**64)):  # the second used to be a traceback
        wanted = f"--seed {seed}: give a whole number from 0 on and below 2^64"
        assert says("runs/a", "--seed", seed) == wanted
    assert says("runs/a", "--subspace", "188").startswith("--subspace 188: the model has 187 wei")
    assert says("runs/a", "--config", "x.yaml").startswith("--config: a checkpoint has its own")
    assert says("runs/a", "--model.init_args.widhts", "[1]").startswith("model.init_args: mlp has")
    wide = says("runs/a", "--model.init_args.widths", "[6, 9, 8, 3]")
    assert wide.startswith("--checkpoint runs/a: the weights do not fit the model: 1.bias (9,), g")
    make_run(Path("runs/wide"), 0, TINY.replace("[6, 8, 8, 3]", "[6, 7, 8, 3]"))
    assert says("runs/a", "runs/wide").startswith("--checkpoint runs/wide: the weights do not fit")
    Path("runs/b/weights.pt").write_bytes(b"nothing")
    assert says("runs/b").startswith("--checkpoint runs/b: weights.pt cannot be read")
    Path("runs/b/weights.pt").unlink()
    assert says("runs/b") == (
        "--checkpoint runs/b: no weights.pt and no checkpoint there; the run has not ended"
    )
    Path("runs/a/sharpness.json").write_text("{}")
    assert says("runs/a").startswith("--out runs/a: there is a sharpness.json already")
    Path("file").touch()
    assert says("runs/a", "--out", "file").startswith("--out file: it cannot be made: file is a f")
    assert says("runs/a", "--out", "/proc/x").startswith("--out /proc/x: it cannot be made: ")
    Path("gone").symlink_to("nowhere")
    assert says("runs/a", "--out", "gone/x").startswith("--out gone/x: it cannot be made: gone is")
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    assert says("runs/a", "--out", "x").endswith("pip install 'headrace[sharpness]'")


def test_data_that_differs_from_pass_to_pass(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "my_noise.py").write_text(
        "import torch\n"
        "class Noise(torch.utils.data.Dataset):\n"
        "    def __len__(self): return 20\n"
        "    def __getitem__(self, k): return torch.randn(6), torch.tensor(k % 3)\n"
    )
    line = refused(capsys, "--checkpoint", "runs/a", *FEW, "--data.train", "my_noise.Noise")
    assert line.startswith("the training loss is ") and "without random augmentation" in line
    sys.modules.pop("my_noise", None)


def test_stages_and_ranks_do_not_change_a_figure(launcher: Launcher) -> None:
    """Of several ranks only the first rank has the data, and all run the solver in step."""
    arguments = ["--checkpoint", "runs/a", *FEW, "--pipeline.balance", "parameters", "--out"]
    for stages in ("1", "2"):
        main([*arguments, stages, "--stages", stages])
    given, environment = [*arguments, "ranks"], UNDER_TORCHRUN
    outcome = launcher.run(run_sharpness, 2, given, Path.cwd(), environment=environment)
    outcome.expect(0, 0)
    assert outcome.out[0].count("lambda_max") == 1 and not outcome.out[1]
    assert outcome.err == ["", ""]
    assert result("1") == result("2") == result("ranks")


# The study ----------------------------------------------------------------------------------


def test_spoilt_labels_are_the_same_ones_and_as_many_as_told() -> None:
    clean, spoilt = Digits("train"), Digits("train", noise=0.2)
    changed = (clean.targets != spoilt.targets).float().mean()
    assert float(changed) == pytest.approx(0.18, abs=0.015), "one in ten is drawn as it was"
    assert torch.equal(spoilt.targets, Digits("train", noise=0.2).targets)
    assert torch.equal(clean.inputs, spoilt.inputs)
    with pytest.raises(ValueError, match=r"^noise=2: give a share in \[0, 1\]$"):
        Digits("train", noise=2)


def test_an_epoch_has_full_mini_batches_each_sample_at_most_once() -> None:
    data = Digits("train")
    data.targets = torch.arange(len(data))
    order = torch.Generator().manual_seed(0)
    epochs = [[y for _, y in epoch_of(data, size, order)] for size in (16, 400)]
    assert [len(epoch) for epoch in epochs] == [89, 3]
    assert all(len(torch.cat(epoch).unique()) == sum(map(len, epoch)) for epoch in epochs)


def test_plans_make_the_updates_that_they_say() -> None:
    """An update that an epoch's end leaves unfinished is finished in the next, at its own size."""
    updates = [follow(plan, 0.2, 0, 3).updates for plan in (DECAY, GROWTH, HYBRID)]
    assert updates == [3 * 89, 89 + 17 + 1 + 3, 89 + 35]


def test_a_plan_s_rate_falls_when_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    original = large_batch.LambdaLR

    def spy(optimizer: Any, rate: Any) -> Any:
        seen.append([rate(k) for k in range(109)])
        return original(optimizer, rate)

    monkeypatch.setattr(large_batch, "LambdaLR", spy)
    follow(BOTH, 0.0, 0, 3)
    (rates,) = seen
    assert rates == [1.0] * 89 + [0.2] * 17 + [0.2 * 0.2] * 3


def test_training_ends_at_the_loss_and_is_the_same_again() -> None:
    data = Digits("train", noise=0.2)
    first, second = (train_until(0, data, forever(144), until=1.9) for _ in "ab")
    assert first.loss == second.loss < 1.9
    assert all(torch.equal(first.end[name], second.end[name]) for name in first.end)
    assert first.updates == second.updates == 9 * first.epochs
    with pytest.raises(RuntimeError, match=r"^after 1 epochs the training loss is 2\."):
        train_until(0, data, forever(1437), until=0.1, most=1)
    mixed = train_until(0, data, warm(1), until=1.0)
    assert mixed.updates == 89 + mixed.epochs - 1


def minimum(phi: float, curvature: float) -> Minimum:
    return Minimum(phi, 1.0, 1.0, curvature, 1.0, 0.9, 100)


def test_claims_can_fail_and_tables_have_all() -> None:
    minima = {
        "batch 16": [minimum(5, 4)],
        "batch 144": [minimum(7, 8)],
        "batch 1437": [minimum(29, 10), minimum(31, 10)],
        "5 epochs of 16, then 1437": [minimum(14, 5)],
    }
    decay, growth = Run(0.0010, 0.95, 400, []), Run(0.0012, 0.94, 160, [])
    runs = {"clean labels": {DECAY.name: [decay], GROWTH.name: [growth]}}
    verdicts = [claim.holds for claim in check(minima, runs, (0, 5))]
    assert verdicts == [False, True, True, True, True, False, True]
    assert minima_table(minima).splitlines()[4].startswith("| batch 1437 | 30.0 ± 1.4 | 1.00 ± 0")
    assert runs_table(runs["clean labels"]).splitlines()[2:] == [
        "| constant batch, rate decays | 0.950 | 0.001 | 400 |",
        "| batch grows, constant rate | 0.940 | 0.0012 | 160 |",
    ]


def test_the_picture_of_plans(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = [(89 * k, 1 / k, 1 - 0.1 / k) for k in range(1, 4)]
    draw({"clean labels": {DECAY.name: [Run(0.3, 0.9, 267, path)] * 2}}, tmp_path / "plans.png")
    assert (tmp_path / "plans.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_large_batch_ends_in_a_sharper_minimum() -> None:
    """The first claims, of one seed and a higher loss; the study has all of them."""
    small, large = (find_minimum(0, forever(size), until=0.2) for size in (16, 144))
    assert large.phi > 1.5 * small.phi
    assert large.lambda_max > small.lambda_max
    assert large.updates < small.updates / 3
