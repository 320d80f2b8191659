"""The training command: what it writes, prints and refuses, alone and under torchrun."""

import io
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from headrace.launch.assemble import expected_staleness, make_loader, updates
from headrace.launch.config import parse
from headrace.launch.display import ProgressLine, amount, duration, per_stage
from headrace.launch.run_files import RunFiles, new_folder
from headrace.launch.train import main

from ..distributed.commands import UNDER_TORCHRUN, run_train
from ..distributed.ranks import Launcher, complaints

TINY = """\
stages: 2
epochs: 2
threads: 1
log_every: 4
model: {class_path: mlp, init_args: {widths: [6, 8, 8, 3], dropout: 0.1}}
loss: CrossEntropyLoss
optimizer: {class_path: SGD, init_args: {lr: 0.1, momentum: 0.5}}
scheduler: cosine_with_warmup
metrics: [accuracy]
data:
  train: {class_path: Generated, init_args: {shape: [6], classes: 3, samples: 50}}
  test: {class_path: Generated, init_args: {shape: [6], classes: 3, samples: 20, seed: 1}}
  batch_size: 8
pipeline:
  balance: [4, 4]
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Each test runs in a folder of its own, with tiny.yaml; imports and signals are undone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    modules = set(sys.modules)
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    (tmp_path / "tiny.yaml").write_text(TINY)
    yield tmp_path
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for name in set(sys.modules) - modules:
        if name.startswith("my_"):
            del sys.modules[name]


def train(*overrides: str, file: str = "tiny.yaml") -> None:
    main(["--config", file, *overrides])


def weights(run: str) -> dict[str, torch.Tensor]:
    loaded: dict[str, torch.Tensor] = torch.load(f"runs/{run}/weights.pt")
    return loaded


def same(a: str, b: str) -> bool:
    left, right = weights(a), weights(b)
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def events(run: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(f"runs/{run}/metrics.jsonl").read_text().splitlines()]


# Files --------------------------------------------------------------------------------------


def test_a_run_writes_its_files(folder: Path) -> None:
    train()
    assert parse(["--config", "runs/tiny/config.yaml"]) == parse(["--config", "tiny.yaml"])

    lines = events("tiny")
    assert [line["event"] for line in lines].count("epoch") == 2
    assert lines[-1]["event"] == "test" and 0.0 <= lines[-1]["accuracy"] <= 1.0
    progress = next(line for line in lines if line["event"] == "progress")
    assert len(progress["staleness"]) == len(progress["busy"]) == 2
    assert progress["step"] == 32 and progress["epoch"] == 1  # 4 micro-batches of 8

    summary = json.loads(Path("runs/tiny/summary.json").read_text())
    assert summary["name"] == "tiny" and summary["test"]["accuracy"] == lines[-1]["accuracy"]
    assert [stage["layers"] for stage in summary["stages"]] == [list("0123"), list("4567")]
    assert summary["stages"][0]["staleness_max"] == 1
    assert summary["stages"][1]["staleness_mean"] == 0.0

    assert set(weights("tiny")) == {
        "1.weight",
        "1.bias",
        "4.weight",
        "4.bias",
        "7.weight",
        "7.bias",
    }
    assert not list(Path("runs/tiny").glob("*.part"))


def test_what_auto_chooses_is_said_and_kept(capsys: pytest.CaptureFixture[str]) -> None:
    sgd = "--optimizer.init_args.momentum=0.5", "--pipeline.corrections", "[auto]"
    train(*sgd, "--epochs", "1")
    line = "auto chose gap_aware, spike_compensation at stage 0, nothing at stage 1\n"
    assert capsys.readouterr().out.count(line) == 1
    kept = json.loads(Path("runs/tiny/summary.json").read_text())["auto"]
    assert kept == {"0": ["gap_aware", "spike_compensation"], "1": []}
    train("--pipeline.corrections", "[gap_aware]", "--epochs", "1")
    assert "auto chose" not in capsys.readouterr().out
    assert "auto" not in json.loads(Path("runs/tiny-2/summary.json").read_text())


def test_tensorboard_events_are_written(folder: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train()
    events = accumulator.EventAccumulator("runs/tiny")
    events.Reload()
    tags = events.Tags()["scalars"]
    assert {"progress/loss", "progress/staleness/stage 1", "epoch/loss", "test/accuracy"} <= set(
        tags
    )


def test_how_well_synthesizers_learn_is_in_every_file(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "tiny.yaml").write_text(
        TINY.replace("stages: 2", "stages: 3").replace("4, 4", "3, 3, 2")
    )
    rules = "[{class_path: local, init_args: {outputs: 3}}, synthetic, delayed]"
    train("--pipeline.rule", rules, "--log_every", "2")
    progress = [line for line in events("tiny") if line["event"] == "progress"][-1]
    for name, there in (("cosine", 1), ("synthesizer_loss", 1), ("lag", 1), ("local_loss", 0)):
        assert [value is not None for value in progress[name]] == [j == there for j in range(3)]
    stages = json.loads(Path("runs/tiny/summary.json").read_text())["stages"]
    assert "cosine" in stages[1] and stages[1]["lag_mean"] > 2
    assert "local_loss" in stages[0] and "cosine" not in stages[0]
    out = capsys.readouterr().out
    assert "stream, local (outputs: 3) | synthetic | delayed, seed 0" in out
    assert re.search(r"^cosine +- +-?[\d.]+ +-\s*$", out, re.M)
    assert re.search(r"^local loss +[\d.]+ +- +-\s*$", out, re.M)
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = accumulator.EventAccumulator("runs/tiny")
    board.Reload()
    tags = set(board.Tags()["scalars"])
    assert {"progress/cosine/stage 1", "progress/synthesizer_loss/stage 1"} <= tags
    assert "progress/cosine/stage 0" not in tags


def test_no_run_is_written_over(folder: Path) -> None:
    train()
    before = {p.name: p.read_bytes() for p in Path("runs/tiny").iterdir()}
    train("--seed", "1")
    train("--seed", "2")
    assert {p.name: p.read_bytes() for p in Path("runs/tiny").iterdir()} == before
    assert sorted(p.name for p in Path("runs").iterdir()) == ["tiny", "tiny-2", "tiny-3"]


def test_the_seed_makes_the_run(folder: Path) -> None:
    train()
    train("--seed", "1")
    train(file="runs/tiny/config.yaml")
    assert same("tiny", "tiny-3") and not same("tiny", "tiny-2")


def test_metrics_are_on_disk_line_by_line_and_have_no_nan(folder: Path) -> None:
    files = RunFiles(new_folder(Path("runs"), "x"), "")
    files.log("progress", 8, {"loss": float("nan"), "staleness": (1.0, float("inf"))})
    line = json.loads(Path("runs/x/metrics.jsonl").read_text())
    assert line == {"event": "progress", "step": 8, "loss": None, "staleness": [1.0, None]}
    files.close()


def test_a_run_that_is_gone_on_with_tells_of_nothing_twice(folder: Path) -> None:
    """A checkpoint after an epoch's last sample may be one before its end."""
    place = new_folder(Path("runs"), "x")
    files = RunFiles(place, "")
    for event, step, more in (
        ("progress", 8, {}), ("epoch", 8, {"epoch": 1}), ("progress", 16, {}),
        ("epoch", 16, {"epoch": 2}), ("test", 16, {"loss": 1.0}), ("servers", 16, {}),
    ):  # fmt: skip
        files.log(event, step, more)
    files.histogram("staleness of stage 0", 16, {0: 1})
    files.close()
    with (place / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"event": "progress", "st')

    def kept(samples: int, epochs: int) -> list[tuple[str, int]]:
        RunFiles(place, "", samples, epochs).close()
        lines = map(json.loads, (place / "metrics.jsonl").read_text().splitlines())
        return [(line["event"], line["step"]) for line in lines]

    whole = [("progress", 8), ("epoch", 8), ("progress", 16), ("epoch", 16)]
    assert kept(16, 2) == whole
    assert kept(16, 1) == whole[:3]
    assert kept(8, 1) == whole[:2]


@pytest.mark.parametrize(
    ("overrides", "total", "made"),
    [
        ("", 14, 14),  # 50 samples are 6 mini-batches of 8 and one of 2, twice
        ("--data.drop_last true", 12, 12),
        ("--pipeline.micro_batches 3", 40, 40),  # the mini-batch of 2 makes 2
        ("--pipeline.update_every 4", 4, 3),  # the last one is made when the pipeline is closed
        ("--pipeline.micro_batches 3 --pipeline.update_every 5", 8, 8),
        ("--pipeline.schedule gpipe --pipeline.micro_batches 3", 14, 14),
        ("--pipeline.schedule 1f1b --pipeline.update_every 2", 7, 7),
    ],
)
def test_the_number_of_updates_is_known_beforehand(
    folder: Path, overrides: str, total: int, made: int
) -> None:
    config = parse(["--config", "tiny.yaml", *overrides.split()])
    assert updates(config, make_loader(config, "data.train", config.data.train)) == total
    train(*overrides.split())
    stages = json.loads(Path("runs/tiny/summary.json").read_text())["stages"]
    assert [stage["updates"] for stage in stages] == [made, made]


def batch_size(name: str, **arguments: Any) -> list[str]:
    return ["--pipeline.batch_size", json.dumps({"class_path": name, "init_args": arguments})]


@pytest.mark.parametrize(
    ("more", "total", "made"),
    [
        # 8 six times and 2 | + 8, then 16, 16 and 10 of 16.
        (batch_size("steps", sizes=[8, 16], at=[1]), 10, 9),
        # 8; 16 of 10; 16 of 12; 8 + 2 | + 8 of 15; 24 of 18; 18 of 21.
        (batch_size("geometric", start=8, most=30), 6, 5),
        # Cut in 3, 3 and 2: six 8s and 2 | + 3 + 3, and the rest is less than 800.
        (
            [*batch_size("steps", sizes=8, factor=100, at=[1]), "--pipeline.micro_batches", "3"],
            8,
            7,
        ),
        # Whole mini-batches: 24, 24 and 2 | + 24, and 26 of 48.
        (
            [
                *batch_size("steps", sizes=24, factor=2, at=[1]),
                *("--pipeline.schedule", "1f1b", "--pipeline.micro_batches", "2"),
            ],
            4,
            3,
        ),
    ],
    ids=["steps", "geometric", "cut", "1f1b"],
)
def test_the_number_of_updates_of_a_batch_that_grows(
    folder: Path, more: list[str], total: int, made: int
) -> None:
    config = parse(["--config", "tiny.yaml", *more])
    assert updates(config, make_loader(config, "data.train", config.data.train)) == total
    train(*more)
    stages = json.loads(Path("runs/tiny/summary.json").read_text())["stages"]
    assert [stage["updates"] for stage in stages] == [made, made]


def test_a_batch_that_grows_by_what_is_measured(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = batch_size("variance_test", start=16, most=50, theta=0.5)
    config = parse(["--config", "tiny.yaml", *more])
    assert updates(config, make_loader(config, "data.train", config.data.train)) is None
    with pytest.raises(SystemExit):
        train(*more)
    assert "pipeline.batch_size decides by what it measures" in capsys.readouterr().err
    train(*more, "--scheduler.class_path", "ExponentialLR", "--scheduler.init_args.gamma", "0.9")
    assert "stale at start" in capsys.readouterr().out
    assert next(e["batch_size"] for e in events("tiny") if e["event"] == "progress") == 16
    with pytest.raises(SystemExit):
        train(*batch_size("variance_test", start=8, most=50), "--scheduler", "null")
    assert "start at 9 or more" in capsys.readouterr().err


def test_a_resume_whose_scheduler_is_at_its_end_says_so(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All that it trained moved nothing, and nothing said so."""
    train("--epochs", "1", "--checkpoint.every", "epoch")
    again = ("--checkpoint.resume", "runs/tiny")
    train(*again, "--pipeline.update_every", "4")
    said = " ".join(capsys.readouterr().out.split())
    assert "headrace: the checkpoint has 7 updates, and by epochs, data.batch_size and" in said
    assert "this run would have 4 in all: the scheduler is at its end" in said
    assert same("tiny", "tiny-2")
    train(*again)
    assert "the scheduler is at its end" not in capsys.readouterr().out
    assert not same("tiny", "tiny-3")


@pytest.mark.parametrize(
    ("notes", "text"),
    (
        ({"config": "a: [1"}, r"notes\.config is no configuration \("),
        ({"journal": 7}, r"notes\.journal is 7, and is to be numbers by name: the checkpoint is"),
        ({"journal": {"loss": "x"}}, r"notes\.journal is \{'loss': 'x'\}, and is to be numbers"),
    ),
)
def test_a_resume_of_another_programs_notes(
    folder: Path, notes: Any, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    train("--epochs", "1", "--checkpoint.every", "epoch")
    (manifest,) = folder.glob("runs/tiny/checkpoints/*/checkpoint.json")
    whole = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(whole | {"notes": whole["notes"] | notes}))
    with pytest.raises(SystemExit) as ended:
        train("--checkpoint.resume", "runs/tiny")
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(rf"checkpoint\.json: {text}", line), line


def test_the_scheduler_is_told_the_number_of_updates(folder: Path) -> None:
    train("--scheduler", "LinearLR", "--scheduler.init_args",
          "{start_factor: 1.0, end_factor: 0.0, total_iters: total}")  # fmt: skip
    rates = [line["learning_rate"] for line in events("tiny") if line["event"] == "progress"]
    assert all(a > b for a, b in itertools.pairwise(rates))
    summary = json.loads(Path("runs/tiny/summary.json").read_text())
    assert [stage["learning_rate"] for stage in summary["stages"]] == [0.0, 0.0]


# One's own parts ----------------------------------------------------------------------------


def test_ones_own_model_loss_optimizer_data_and_metric(folder: Path) -> None:
    (folder / "my_parts.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "def model(width): return nn.Sequential(nn.Linear(3, width), nn.Linear(width, 1))\n"
        "def loss(output, target, scale=1.0): return scale * (output - target).square().mean()\n"
        "def optimizer(params, rate): return torch.optim.SGD(params, lr=rate)\n"
        "def data(): \n"
        "    x = torch.randn(40, 3)\n"
        "    return torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True))\n"
        "def error(output, target): return (output - target).abs().mean()\n"
    )
    (folder / "mine.yaml").write_text(
        "stages: 2\n"
        "model: {class_path: my_parts.model, init_args: {width: 8}}\n"
        "loss: {class_path: my_parts.loss, init_args: {scale: 0.5}}\n"
        "optimizer: {class_path: my_parts.optimizer, init_args: {rate: 1e-2}}\n"
        "metrics: [my_parts.error]\n"
        "data: {train: my_parts.data, test: my_parts.data, batch_size: 4}\n"
    )
    train(file="mine.yaml")
    assert events("mine")[-1]["error"] > 0.0


# Refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["--epoch", "1"], "unknown key epoch (did you mean epochs?)"),
        (["--pipeline.schedule", "gpipe", "--pipeline.rule", "delayed"], "nothing is stale"),
        (["--pipeline.rule", "exact"], "exact"),
        (["--stages", "12", "--pipeline.balance", "time"], "12 stages"),
        (["--pipeline.balance", "[5, 5]"], "pipeline.balance: [5, 5] has 10 layers, the model has"),
        (["--pipeline.balance", "['0', layer9]"], "layer9"),
        (["--model", "torch.nn.Linear", "--model.init_args", "{in_features: 6, out_features: 3}"],
         "model is a Linear"),
        (["--model.init_args.widths", "[6]"], "widths=[6]"),
        (["--model.init_args.widths", "[7, 3]", "--pipeline.balance", "time"], "layer '1' (Line"),
        (["--data.train", "MNIST", "--data.train.init_args", "{root: nowhere}"], "nowhere"),
        (["--data.train.init_args.samples", "0"], "data.train: samples=0"),
        (["--data.batch_size", "64", "--data.drop_last", "true"],
         "data.train: 50 samples make no mini-batch of 64"),
        (["--scheduler.init_args.warmup", "2"], "warmup=2"),
        (["--pipeline.micro_batches", "0"], "pipeline.micro_batches is 0"),
        (["--pipeline.device", "abacus"], "abacus"),
    ],
)  # fmt: skip
def test_refused_with_one_line_and_exit_code_2(
    folder: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], line: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        train(*overrides)
    assert caught.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith("headrace: ") and shown.count("\n") == 1
    assert line in shown
    assert not Path("runs").exists()


def test_an_exception_in_a_layer_is_no_refusal(folder: Path) -> None:
    (folder / "my_model.py").write_text(
        "from torch import nn\n"
        "class Breaks(nn.Linear):\n"
        "    calls = 0\n"
        "    def forward(self, x):\n"
        "        Breaks.calls += 1\n"
        "        if Breaks.calls > 20: raise ValueError('broken')\n"
        "        return super().forward(x)\n"
        "def build(): return nn.Sequential(nn.Linear(6, 6), Breaks(6, 3))\n"
    )
    with pytest.raises(ValueError, match="broken"):
        train("--model", "my_model.build", "--pipeline.balance", "[1, 1]", "--epochs", "9")


# What is shown ------------------------------------------------------------------------------


def test_what_is_printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train()
    shown = capsys.readouterr().out
    assert re.search(r"^tiny  2 stages in one process, stream, delayed, seed 0$", shown, re.M)
    assert re.search(r"^ +0 +0 to 3 ", shown, re.M)
    assert re.search(r"^test accuracy +0\.\d{4} *$", shown, re.M)
    assert re.search(r"^staleness +0\.\d\d  0\.00 *$", shown, re.M)
    assert re.search(r"^files +runs/tiny *$", shown, re.M)
    assert "\x1b" not in shown


def test_what_is_not_known_is_a_dash(capsys: pytest.CaptureFixture[str]) -> None:
    """An epoch of one mini-batch, still in flight at its end; and a run with nothing left to do."""
    once = ["--epochs", "1", "--data.batch_size", "64"]
    train(*once)
    out = capsys.readouterr().out
    assert re.search(r"^train loss +-, as no finite loss came back in the last epoch *$", out, re.M)
    assert re.search(r"^samples/s +-, trained for 0:0\d *$", out, re.M)
    assert "nan" not in out
    train(*once, "--checkpoint.every", "1", "--name", "saved")
    capsys.readouterr()
    train(*once, "--checkpoint.resume", "runs/saved")
    out = capsys.readouterr().out
    assert "its epoch is done, after 50 samples: nothing is left to train\n" in out
    assert re.search(r"^busy +-  +- *$", out, re.M)
    assert "nan" not in out


def test_progress_without_a_terminal_is_lines_at_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    out = io.StringIO()
    line = ProgressLine(Console(file=out, width=100, highlight=False), epochs=12, samples=1000)
    for now, done in ((3.0, 50), (3.5, 100), (6.5, 300), (7.0, 350), (10.0, 550)):
        clock[0] = now
        line.update(3, done, 1234.5, 0.25, (1.0, 0.0))
    line.close()
    assert out.getvalue().splitlines() == [
        "epoch  3/12   10%    1,234 samples/s   loss 0.25     staleness 1 0   0:09 left",
        "epoch  3/12   30%    1,234 samples/s   loss 0.25     staleness 1 0   0:10 left",
        "epoch  3/12   55%    1,234 samples/s   loss 0.25     staleness 1 0   0:06 left",
    ]


def test_progress_on_a_terminal_is_one_line_that_goes_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = io.StringIO()
    line = ProgressLine(Console(file=out, width=100, force_terminal=True), epochs=2, samples=None)
    line.update(1, 10, 100.0, 0.5, (2.0, 1.0, 0.0))
    monkeypatch.setattr(time, "monotonic", lambda: math.inf)
    line.update(1, 20, 100.0, 0.5, (2.0, 1.0, 0.0))
    line.close()
    assert "staleness 2 1 0" in out.getvalue()
    assert out.getvalue().endswith("\x1b[2K")


def test_numbers_to_read() -> None:
    assert [amount(n) for n in (0, 1023, 1536, 20480, 3 << 20)] == [
        "0 B", "1023 B", "1.5 KiB", "20 KiB", "3.0 MiB"
    ]  # fmt: skip
    assert [duration(s) for s in (0.4, 61, 3723)] == ["0:00", "1:01", "1:02:03"]
    assert per_stage((3.0, 2.0, 1.0, 0.0)) == "3 2 1 0"
    assert per_stage([float(k) for k in range(63, -1, -1)]) == "63 62 61 … 1 0"


def test_expected_staleness(folder: Path) -> None:
    def of(*overrides: str) -> tuple[float, ...]:
        return expected_staleness(parse(["--config", "tiny.yaml", *overrides]), (3, 0))

    assert of() == (3.0, 0.0)
    assert of("--pipeline.update_every", "2") == (1.5, 0.0)
    assert of("--pipeline.schedule", "1f1b") == (0.0, 0.0)
    # At the start: 20 samples are three micro-batches of 8, or five of 4.
    growing = batch_size("geometric", start=20, most=50)
    assert of(*growing) == (1.0, 0.0)
    assert of(*growing, "--pipeline.micro_batches", "2") == (0.6, 0.0)


# Processes ----------------------------------------------------------------------------------


def command(*arguments: str, ranks: int = 0) -> list[str]:
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [sys.executable, *(run if ranks else []), "-m", "headrace.launch.train", *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def test_torchrun_gives_the_same_weights_and_only_the_first_rank_speaks(folder: Path) -> None:
    wide = ("--model.init_args.widths", "[6, 200, 400, 3]")  # large tensors, too
    train(*wide)
    done = subprocess.run(
        command("--config", "tiny.yaml", *wide, ranks=2),
        env=environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test accuracy") == 1
    assert complaints(done.stderr) == ""
    assert same("tiny", "tiny-2")
    ours = [json.loads(Path(f"runs/{r}/summary.json").read_text()) for r in ("tiny", "tiny-2")]
    assert ours[0]["test"] == ours[1]["test"]


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["--modle", "x"], "unknown key modle"),  # every rank finds it
        (["--data.train.init_args.samples", "0"], "data.train: samples=0"),  # the first alone does
        (["--stages", "3"], "stages: 3, but torchrun started 2 processes: start it with"),
        (["--pipeline.slack", "[1, 1]"], "pipeline.slack is [1, 1]"),  # the pipeline does
        (["--pipeline.balance", "[1, 1]"], "pipeline.balance: [1, 1] has"),
        (["--pipeline.corrections", "[auto, auto]"], "pipeline.corrections has auto and auto"),
    ],
)
def test_ranks_print_a_refusal_once(
    launcher: Launcher, folder: Path, overrides: list[str], line: str
) -> None:
    given = ["--config", "tiny.yaml", *overrides]
    outcome = launcher.run(run_train, 2, given, folder, environment=UNDER_TORCHRUN)
    outcome.expect(2, 2)
    assert line in outcome.report
    assert not Path("runs").exists()


def test_ranks_tell_of_a_divergence_in_one_line_as_one_process_does(
    launcher: Launcher, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--config", "tiny.yaml", "--optimizer.init_args.lr", "1e30"]
    with pytest.raises(SystemExit) as ended:
        main(given)
    line = capsys.readouterr().err
    assert ended.value.code == 1 and line.startswith("headrace: stage 1 of 2, micro-batch 1: the ")
    assert line.endswith("pipeline.clip_grad_norm: 1.0, or pipeline.on_nonfinite: 'skip'\n")
    outcome = launcher.run(run_train, 2, given, folder, environment=UNDER_TORCHRUN)
    outcome.expect(1, 1)
    assert outcome.report + "\n" == line and not outcome.tracebacks


def test_torchrun_prints_a_refusal_once(folder: Path) -> None:
    """It ends the ranks as soon as one has ended: not before the line is out."""
    done = subprocess.run(
        command("--config", "tiny.yaml", "--data.train.init_args.samples", "0", ranks=2),
        env=environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1  # torchrun's own, whatever its workers return
    ours = [each for each in done.stderr.splitlines() if each.startswith("headrace: ")]
    assert len(ours) == 1 and "data.train: samples=0" in ours[0]
    assert re.search(r"exitcode +: 2 ", done.stderr)
    assert not Path("runs").exists()


def test_a_signal_ends_a_run_of_one_process(folder: Path) -> None:
    codes = {signal.SIGINT: 130, signal.SIGTERM: 143}
    processes = {
        number: subprocess.Popen(
            command(
                "--config", "tiny.yaml", "--epochs", "100000", "--name", number.name,
                "--data.workers", workers,
            ),
            env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )
        for number, workers in zip(codes, "10", strict=True)
    }  # fmt: skip
    try:
        for number, process in processes.items():
            metrics, end = Path(f"runs/{number.name}/metrics.jsonl"), time.monotonic() + 60
            while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < end:
                time.sleep(0.05)
            os.killpg(process.pid, number)  # as a terminal does: to a loader's worker, too
            _, errors = process.communicate(timeout=30)
            assert process.returncode == codes[number]
            assert errors == f"headrace: stopped by {number.name}\n"
            assert events(number.name)  # every line is whole
    finally:
        for process in processes.values():
            process.kill()
