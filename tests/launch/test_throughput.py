"""The profile, whole: started as a user does, and everything that it prints and writes."""

import csv
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from headrace.launch.config import parse
from headrace.launch.profiling.systems import DEFAULT_ROWS, SYSTEMS, default_rows, observed
from headrace.launch.throughput import main, parse_command

from ..distributed.commands import UNDER_TORCHRUN, run_throughput
from ..distributed.ranks import Launcher, Outcome

pytestmark = pytest.mark.timeout(180)

ODD = """\
threads: 1
model: {class_path: odd_layers.build}
loss: odd_layers.loss
optimizer: SGD
data:
  train: {class_path: Generated, init_args: {shape: [8], classes: 8, samples: 40}}
  batch_size: 8
"""

LAYERS = """\
import torch
from torch import nn


class Two(nn.Module):
    def forward(self, x):
        return x, 2 * x


class One(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 1)

    def forward(self, pair):
        return self.inner(pair[0] + pair[1]).sum(1)


class Breaks(nn.Module):
    def forward(self, x):
        if x.requires_grad and torch.is_grad_enabled() and len(x) == 8:
            Breaks.calls = getattr(Breaks, "calls", 0) + 1
            if Breaks.calls > 20:
                raise RuntimeError("enough")
        return x


def build(breaks=False):
    return nn.Sequential(nn.Linear(8, 8), Two(), One(), *([Breaks()] if breaks else []))


def loss(output, target):
    return (output - target).square().mean()
"""

CONFIG = """\
# A comment that is kept.
threads: 1
model: {class_path: mlp, init_args: {widths: [64, 256, 256, 256, 10]}}
loss: CrossEntropyLoss
optimizer: {class_path: SGD, init_args: {lr: 0.01, momentum: 0.9}}
data:
  train: {class_path: Generated, init_args: {shape: [64], classes: 10, samples: 160}}
  batch_size: 32
pipeline:
  balance: [1, 7]  # much the worst
"""

EMULATED = """\
threads: 1
model: {class_path: emulated, init_args: {layers: 2, forward_ms: 8, backward_ms: 16}}
loss: CrossEntropyLoss
optimizer: SGD
data:
  train: {class_path: Generated, init_args: {shape: [8], classes: 8, samples: 80}}
  batch_size: 8
"""

ROWS = [
    "one-device", "ceiling", "stream:stash", "stream:stash+recorded", "stream:replay", "1f1b",
    "torch-1f1b", "torch-interleaved", "torch-zero-bubble", "ddp",
]  # fmt: skip


@dataclass(frozen=True)
class Run:
    folder: Path
    out: str

    @property
    def table(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.folder / "table.json").read_text())
        return content

    def rows(self, system: str) -> list[dict[str, Any]]:
        return [row for row in self.table["rows"] if row["system"] == system]


def start(launcher: Launcher, folder: Path, config: str, *options: str) -> Outcome:
    """On two ranks, without torchrun's own start."""
    (folder / "mine.yaml").write_text(config)
    given = ["--config", "mine.yaml", *options]
    how: dict[str, Any] = {"seconds": 170, "environment": UNDER_TORCHRUN}
    return launcher.run(run_throughput, 2, given, folder, **how)


def run(launcher: Launcher, folder: Path, config: str, *options: str) -> Run:
    outcome = start(launcher, folder, config, *options)
    outcome.expect(0, 0)
    assert not outcome.out[1]
    return Run(folder / "out", outcome.out[0])


def run_by_torchrun(folder: Path, config: str, *options: str) -> Run:
    """As a user does."""
    (folder / "mine.yaml").write_text(config)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "headrace.launch.throughput"]
    done = subprocess.run(
        [*command, "--config", "mine.yaml", *options],
        cwd=folder, capture_output=True, text=True, timeout=170,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return Run(folder / "out", done.stdout)


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """All kinds of rows, and all that can be asked for."""
    options = ["--rounds", "2", "--steps", "15", "--micro-batches", "2", "4", "5", "--out", "out"]
    asked = ["--predict", "--fix", "--torch-profiler"]
    return run_by_torchrun(
        tmp_path_factory.mktemp("profile"), CONFIG, *options, *asked, "--rows", *ROWS
    )


@pytest.fixture(scope="module")
def slow_links(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Emulated devices behind emulated links, on a terminal's terms."""
    options = ["--rounds", "1", "--out", "out", "--link-latency-ms", "20", "--timeline", "text"]
    rows = ["--rows", "one-device", "stream:stash", "stream:stash+auto", "torch-1f1b"]
    return run(launcher, tmp_path_factory.mktemp("links"), EMULATED, *options, *rows, "--predict")


# The table -----------------------------------------------------------------------------------


def test_every_row_is_measured(profile: Run) -> None:
    found = [(row["system"], row["micro_batches"]) for row in profile.table["rows"]]
    flushing = ("1f1b", "torch-1f1b", "torch-interleaved", "torch-zero-bubble")
    assert found == [
        (system, m) for system in ROWS for m in ((2, 4, 5) if system in flushing else (None,))
    ]
    for row in profile.table["rows"]:
        if row["not_run"] is None:
            assert row["rounds"] == 2 and len(row["peak_memory_bytes"]) == 2
            assert 0 < row["slowest"] <= row["samples_per_second"] <= row["fastest"]
        else:
            assert row["samples_per_second"] is None and row["rounds"] == 0


def test_ratios_are_of_the_same_round(profile: Run) -> None:
    (one,), (ceiling,) = profile.rows("one-device"), profile.rows("ceiling")
    assert one["over_one_device"] == 1 and ceiling["of_ceiling"] == 1
    (stream,) = profile.rows("stream:stash")
    least = stream["slowest"] / one["fastest"]
    assert least <= stream["over_one_device"] <= stream["fastest"] / one["slowest"]


def test_what_each_stage_did(profile: Run) -> None:
    (stream,) = profile.rows("stream:stash")
    assert stream["staleness"] == [1, 0]
    for busy, bubble in zip(stream["busy"], stream["bubble"], strict=True):
        assert 0 < busy < 1 and 0 <= bubble < 1 and busy + bubble < 1.01
    for row in profile.rows("1f1b") + profile.rows("ddp"):
        assert row["staleness"] == [0, 0]
    (one,) = profile.rows("one-device")
    assert one["busy"] == [None, None], "a plain loop has no such number"


def test_what_cannot_run_is_said(profile: Run) -> None:
    said = {row["micro_batches"]: row["not_run"] for row in profile.rows("torch-interleaved")}
    assert said[2] is said[4] is None
    assert said[5] == "5 micro-batches are not a multiple of 2 ranks"
    (stage,) = [row["not_run"] for row in profile.rows("torch-1f1b") if row["micro_batches"] == 5]
    assert stage == "32 samples do not divide into 5 micro-batches"
    assert [row["not_run"] for row in profile.rows("1f1b")] == [None] * 3, "ours takes any number"


def test_the_same_table_as_csv(profile: Run) -> None:
    with (profile.folder / "table.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    for line, row in zip(lines, profile.table["rows"], strict=True):
        assert line["system"] == row["system"] and line["emulated"] == "False"
        rate = row["samples_per_second"]
        assert line["samples_per_second"] == ("" if rate is None else str(rate))


def test_the_table_is_printed_once(profile: Run) -> None:
    """Of each system the best number of micro-batches, by one rank."""
    for system in ROWS:
        assert len(re.findall(rf"^{re.escape(system)} +[-\d]", profile.out, re.M)) == 2, system
    assert re.search(r"^stage 1 +(\d+\.\d{3} *){8}$", profile.out, re.M), "where its time goes"
    assert re.search(r"the cut allows 0\.\d+ of the ceiling", profile.out)


def test_the_configuration_is_written_beside_it(profile: Run) -> None:
    written = parse(["--config", str(profile.folder / "config.yaml")])
    assert written.data.batch_size == 32 and written.pipeline.balance == [1, 7]
    about = profile.table
    assert about["ranks"] == 2 and about["emulated"] is False and about["cut"] == [1, 7]


# Diagnosis -----------------------------------------------------------------------------------


def test_a_bad_cut_is_found_and_mended(profile: Run) -> None:
    fixes = profile.table["fixes"]
    assert fixes["pipeline.balance"] != [1, 7] and sum(fixes["pipeline.balance"]) == 8
    text = (profile.folder / "mine-fixed.yaml").read_text()
    assert "# A comment that is kept." in text
    mended = parse(["--config", str(profile.folder / "mine-fixed.yaml")])
    assert mended.pipeline.balance == fixes["pipeline.balance"]
    assert "stage 1 is the bottleneck" in profile.out


def test_what_to_set_behind_slow_links(slow_links: Run) -> None:
    """20 ms each way are hidden by 2 more micro-batches of 24 ms in flight, 40/24 rounded up. On a
    busy machine a hop may look longer, and a micro-batch too.
    """
    (slack,) = slow_links.table["fixes"]["pipeline.slack"]
    assert 1 <= slack <= 4
    (without,), (auto,) = slow_links.rows("stream:stash"), slow_links.rows("stream:stash+auto")
    assert 2 <= auto["staleness"][0] <= 5
    assert auto["samples_per_second"] > 1.3 * without["samples_per_second"]
    (refused,) = slow_links.rows("torch-1f1b")[:1]
    assert refused["not_run"] == "the emulated latency is in Headrace's transport only"


def test_emulated_is_said_everywhere(slow_links: Run) -> None:
    assert slow_links.table["emulated"] is True
    assert "EMULATED" in slow_links.out
    with (slow_links.folder / "table.csv").open(newline="") as file:
        assert {line["emulated"] for line in csv.DictReader(file)} == {"True"}
    assert "EMULATED" in (slow_links.folder / "speed-up.svg").read_text()
    assert json.loads((slow_links.folder / "prediction.json").read_text())["emulated"] is True


# Models of other kinds -----------------------------------------------------------------------


def test_layers_that_pass_tuples(launcher: Launcher, tmp_path: Path) -> None:
    (tmp_path / "odd_layers.py").write_text(LAYERS)
    rows = ["stream:stash", "torch-1f1b", "ddp"]
    options = ["--pipeline.balance", "[2, 1]", "--rounds", "1", "--steps", "5", "--out", "out"]
    more = ["--micro-batches", "2", "--timeline", "none", "--rows", *rows]
    done = run(launcher, tmp_path, ODD, *options, *more)
    assert [row["not_run"] for row in done.table["rows"]] == [None] * 3


def test_a_row_that_fails_is_named(launcher: Launcher, tmp_path: Path) -> None:
    (tmp_path / "odd_layers.py").write_text(LAYERS)
    options = ["--pipeline.balance", "[2, 2]", "--rounds", "1", "--model.init_args.breaks", "true"]
    done = start(launcher, tmp_path, ODD, *options, "--steps", "30", "--rows", "one-device")
    assert all(done.codes)
    assert "headrace: row one-device failed on rank 0: RuntimeError: enough" in done.reports


# Timelines -----------------------------------------------------------------------------------


def test_a_trace_of_both(profile: Run) -> None:
    events = json.loads((profile.folder / "timeline.json").read_text())["traceEvents"]
    names = [e["args"]["name"] for e in events if e["name"] == "process_name"]
    assert [n.partition(",")[0] for n in names[::2]] == ["stream: stage 0", "1F1B"]
    assert len(names) == 4
    kinds = {e["cat"] for e in events if e["ph"] == "X"}
    assert kinds >= {"forward", "backward", "update", "wait", "send down", "send up", "idle"}


@pytest.mark.parametrize("name", ["timeline", "speed-up", "bandwidth"])
def test_pictures(profile: Run, name: str) -> None:
    png = (profile.folder / f"{name}.png").read_bytes()
    assert png.startswith(b"\x89PNG") and len(png) > 10_000
    svg = (profile.folder / f"{name}.svg").read_text()
    words = {
        "timeline": ["stage 1", "forward", "backward", "milliseconds", "at work"],
        "speed-up": ["stream, slack 0", "1F1B", "GPipe", "ideal", "measured"],
        "bandwidth": ["DDP", "1F1B", "NVLink", "is the fastest"],
    }
    assert all(word in svg for word in words[name]), "words are words there"


def test_a_timeline_in_letters(slow_links: Run) -> None:
    """Forwards, backwards, and waits for messages that take 20 ms."""
    rows = re.findall(r"^stage [01] +\|([FBu.d ]+)\|", slow_links.out, re.M)
    assert len(rows) == 4, "two stages of the stream, and two of 1F1B"
    for row in rows:
        assert min(row.count(letter) for letter in "FB.") >= 5, row
    assert not (slow_links.folder / "timeline.png").exists()


def test_the_profilers_own_trace_has_our_spans(profile: Run) -> None:
    for rank in range(2):
        text = (profile.folder / f"torch-profiler-rank{rank}.json").read_text()
        names = {e.get("name") for e in json.loads(text)["traceEvents"]}
        assert any(re.fullmatch(r"forward \d+", str(name)) for name in names)
        assert any(re.fullmatch(r"update \d+", str(name)) for name in names)
        assert any(str(name).startswith("aten::") for name in names), "and torch's own"


# Prediction ----------------------------------------------------------------------------------


def test_emulated_devices_are_as_fast_as_predicted(slow_links: Run) -> None:
    for system in ("stream:stash", "stream:stash+auto"):
        (row,) = slow_links.rows(system)
        assert row["predicted_samples_per_second"] == pytest.approx(
            row["samples_per_second"], rel=0.4
        ), "it is 5% on a quiet machine"


def test_a_prediction_is_written(profile: Run) -> None:
    content = json.loads((profile.folder / "prediction.json").read_text())
    curves = {c["name"]: c for c in content["speed_up_by_stages"]}
    assert curves["1F1B"]["x"] == [2.0**k for k in range(1, 11)]
    assert {c["name"] for c in content["samples_per_second_by_bandwidth"]} == {
        "stream, slack auto", "1F1B", "DDP",
    }  # fmt: skip
    borders = content["fastest"]
    assert borders[0]["from"] == 12.5e6 and borders[-1]["to"] == 450e9
    assert profile.rows("1f1b")[0]["predicted_samples_per_second"] > 0
    assert profile.rows("stream:replay")[0]["predicted_samples_per_second"] is None


# Refusals ------------------------------------------------------------------------------------


def test_without_torchrun(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--config", "dnn"])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("headrace: throughput compares systems over several processes: start")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rows", "stream"], "--rows stream: there is no such row; write one-device, ceiling"),
        (["--rounds", "0"], "--rounds 0: give a whole number of at least 1"),
        (["--steps", "-1"], "--steps -1: give a whole number of at least 1"),
        (["--micro-batches", "2", "0"], "--micro-batches 0: give whole numbers from 1 on"),
        (["--link-latency-ms", "-3"], "--link-latency-ms -3.0: give milliseconds, 0 or more"),
        (["--pipline.slack", "1"], "unknown key pipline (did you mean pipeline?)"),
        (["--stages", "3"], "stages: 3, but torchrun started 2 processes: start it with"),
        (["--out", __file__], f"--out {__file__}: there is a file of that name; give a folder"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_refusals(monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        parse_command(["--config", "dnn", *arguments])
    assert str(caught.value).startswith(said)


def test_nothing_is_written_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Which one would rather know before the measuring."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    monkeypatch.setenv("WORLD_SIZE", "2")
    command = ["--config=dnn", "--fix", "--out", str(tmp_path)]
    fixes = parse_command(command)[1].fixes
    assert fixes is not None and fixes.name == "dnn.yaml"
    (tmp_path / "dnn-fixed.yaml").touch()
    with pytest.raises(ValueError, match=r"--fix: .*dnn-fixed.yaml exists: give another --out"):
        parse_command(command)
    (tmp_path / "table.json").touch()
    with pytest.raises(ValueError, match=r"--out .*: an earlier run's results are there"):
        parse_command(command)


def test_one_rank_has_nothing_to_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(ValueError, match="compares systems over several processes"):
        parse_command(["--config", "dnn"])


def test_a_refusal_is_one_line(launcher: Launcher, tmp_path: Path) -> None:
    for option, value, said in (
        ("--data.batch_size", "1000", "data.train: 160 samples make no mini-batch of 1000"),
        (
            "--model",
            "{class_path: emulated, init_args: {layers: 1}}",
            "1 layer cannot make 2 stage",
        ),
    ):
        done = start(launcher, tmp_path, CONFIG, option, value)
        done.expect(2, 2)
        assert done.report.startswith(f"headrace: {said}")


def test_rows_have_names() -> None:
    assert set(DEFAULT_ROWS) < set(SYSTEMS)
    assert [row for row in SYSTEMS if row not in DEFAULT_ROWS] == [
        "stream:configured", "stream:synthetic", "stream:synthetic+free",
        "stream:synthetic+unlock", "stream:local", "stream:stash+recorded",
    ]  # fmt: skip
    plain = parse(["--config", "digits"])
    assert default_rows(plain) == DEFAULT_ROWS
    own = parse(["--config", "digits", "--pipeline.rule", "synthetic"])
    assert default_rows(own) == ["stream:configured", *DEFAULT_ROWS]
    assert observed(["ceiling", "stream:stash+recorded", "stream:local"]) == "stream:stash"
    assert observed(["one-device"]) == "stream:stash"


def test_rules_that_wait_for_no_gradient(launcher: Launcher, tmp_path: Path) -> None:
    """Their rows, and a profile of a configuration that has such a rule."""
    rule = ["--pipeline.rule", "synthetic", "--pipeline.rule.init_args.synthesizer", "linear"]
    rows = ["stream:configured", "stream:synthetic+free", "stream:synthetic+unlock", "stream:local"]
    more = ["--rounds", "1", "--steps", "20", "--out", "out", "--timeline", "text", "--predict"]
    done = run(launcher, tmp_path, CONFIG, *rule, *more, "--rows", "one-device", "ceiling", *rows)
    for name in rows:
        (row,) = done.rows(name)
        assert row["samples_per_second"] > 0
        assert row["staleness"] == [0, 0] and row["saved_graphs"] == [1, 1]
        assert row["weight_copies"] == [0, 0]
    assert re.search(r"^ms a mini-batch .* learning +sending", done.out, re.M)
    trace = json.loads((done.folder / "timeline.json").read_text())["traceEvents"]
    assert {"forward", "backward", "update", "learn"} <= {event.get("cat") for event in trace}
    assert re.search(r"^stream:configured\nstage 0 ", done.out, re.M), "its timeline has its name"
    assert done.table["slack"] == []
    assert "pipeline.slack" not in done.table["fixes"]
