"""The simulation command: what it runs, prints, writes and refuses."""

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch.nn.utils import parameters_to_vector

from headrace.launch.assemble import make_corrections
from headrace.launch.config import Config, parse
from headrace.launch.simulate import main
from headrace.launch.simulation import side_by_side
from headrace.launch.simulation.differences import difference, differences
from headrace.launch.simulation.plan import DEFAULT, Case, Grid, plan, read_variants
from headrace.launch.simulation.results import Row, best, results_table, smooth, updates_until
from headrace.launch.simulation.run import Outcome, simulate
from headrace.launch.studies.simulation_speed import WORKS, cut_up, train
from headrace.launch.studies.simulation_speed import main as speed
from headrace.pipeline.simulation import Simulation

CONFIG = """\
epochs: 2
log_every: 2
model: {class_path: mlp, init_args: {widths: [6, 8, 8, 3]}}
loss: CrossEntropyLoss
optimizer: {class_path: SGD, init_args: {lr: 0.1, momentum: 0.5}}
scheduler: cosine_with_warmup
metrics: [accuracy]
data:
  train: {class_path: Generated, init_args: {shape: [6], classes: 3, samples: 80}}
  test: {class_path: Generated, init_args: {shape: [6], classes: 3, samples: 20, seed: 1}}
  batch_size: 8
"""

VARIANTS = """\
no delay: {stages: 1}
stash: {}
hot: {optimizer.init_args.lr: 1e30}
"""

TWO = "no delay: {stages: 1}\nstash: {}\n"

DEEP = """\
model: {class_path: gpt, init_args: {vocabulary: 97, context: 8, blocks: 2, width: 8, heads: 2}}
loss: TokenCrossEntropy
optimizer: {class_path: AdamW, init_args: {lr: 1e-3}}
data:
  train: {class_path: SourceText, init_args: {context: 8, characters: 2000}}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Each test runs in a folder of its own, with the files above."""
    monkeypatch.chdir(tmp_path)
    for name, text in (("tiny", CONFIG), ("variants", VARIANTS), ("deep", DEEP), ("two", TWO)):
        (tmp_path / f"{name}.yaml").write_text(text)
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    yield tmp_path
    for number, handler in handlers.items():
        signal.signal(number, handler)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The line with which the command ends."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("headrace: ") and error.count("\n") == error.count("\n  ") + 1
    return error


def test_the_whole_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(
        ["--config", "tiny.yaml", "--stages", "2,3", "--seeds", "2", "--variants", "variants.yaml"]
    )
    out = capsys.readouterr().out
    above, below = out.split("less no delay")
    table = {
        (int(m[1]), m[2]): m[3]
        for m in re.finditer(r"^ +(\d) +(no delay|stash|hot) {2,}(.*)$", above, re.MULTILINE)
    }
    assert list(table) == [(1, "no delay"), (2, "stash"), (2, "hot"), (3, "stash"), (3, "hot")]
    number = r"\d\.\d{4} ± \d\.\d{4}"
    assert re.match(rf"{number} +{number} +0\.95 +20 +\d+\.\d\dx", table[2, "stash"])
    assert re.match(rf"{number} +{number} +0\.00 +20 +\d+\.\d s", table[1, "no delay"])
    assert table[3, "hot"].startswith("diverged ")
    assert "diverged: 2 stages, hot, seed 0: stage " in out
    interval = r"[+-]\d\.\d{4} \([+-]\d\.\d{4} to [+-]\d\.\d{4}\)"
    rows = re.findall(rf"^ +(\d) +(\w+) +{interval} +{interval} *$", below, re.MULTILINE)
    assert rows == [("2", "stash"), ("3", "stash")], "what diverges has none"
    written = folder / "runs" / "tiny-simulation"
    names = ["config.yaml", "curves.png", "curves.svg", "results.csv", "results.json"]
    assert sorted(path.name for path in written.iterdir()) == names
    results = json.loads((written / "results.json").read_text())
    assert [(e["stages"], e["score"]) for e in results["differences"]] == [
        (2, "loss"), (2, "accuracy"), (3, "loss"), (3, "accuracy"),
    ]  # fmt: skip
    runs = results["runs"]
    assert len(runs) == 10 and {run["seed"] for run in runs} == {0, 1}
    stash = [run for run in runs if (run["variant"], run["stages"]) == ("stash", 3)]
    # d_j = 2, 1, 0, once warm: the first micro-batches meet fewer updates.
    assert stash[0]["staleness"] == [(0 + 1 + 2 * 18) / 20, (0 + 19) / 20, 0]
    assert [samples for samples, _ in stash[0]["curve"]][-1] == 160 - 2 * 8
    with (written / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["diverged"] for line in lines] == [str(r["diverged"] is not None) for r in runs]
    assert float(lines[2]["loss"]) == runs[2]["scores"]["loss"]


def made_up(monkeypatch: pytest.MonkeyPatch, end: Callable[[Config], Outcome]) -> None:
    """Nothing trains: this is what becomes of each run. Nor is anything drawn."""

    def outcomes(configs: Sequence[Config], _: int) -> Generator[Outcome]:
        yield from map(end, configs)

    monkeypatch.setattr("headrace.launch.simulate.outcomes", outcomes)
    monkeypatch.setattr("headrace.launch.simulate.draw", lambda *_: [])


def ended(loss: float, **more: float) -> Outcome:
    """One that did not diverge."""
    return Outcome(None, {"loss": loss, **more}, (0.0,), 20, 0.1, ((10, 2.0), (20, 1.0)), "x")


BARE = "a: {}\nbare: {metrics: []}\nuntested: {data.test: null}\n"


@pytest.mark.parametrize("lines", [[0, 1, 2], [1, 0, 2]])
def test_variants_whose_scores_differ(
    lines: list[int],
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All runs were lost to a KeyError, after the last had ended."""
    text = BARE.splitlines()
    (folder / "bare.yaml").write_text("\n".join(text[k] for k in lines))
    accuracy = {"accuracy": 0.5}
    made_up(
        monkeypatch,
        lambda config: ended(
            1.0 + config.seed, **(accuracy if config.metrics and config.data.test else {})
        ),
    )
    main(["--config", "tiny.yaml", "--stages", "2", "--variants", "bare.yaml", "--seeds", "2"])
    out = capsys.readouterr().out
    assert " test or training loss " in out
    pair, rest = r"1\.5000 ± 0\.7071", r" +0\.00 +20 +0\.1 s *$"
    assert re.search(rf"^ +2 +a +{pair} +0\.5000 ± 0\.0000{rest}", out, re.MULTILINE)
    for name in ("bare", "untested"):
        assert re.search(rf"^ +2 +{name} +{pair}{rest}", out, re.MULTILINE), "an empty cell"
    results = json.loads((folder / "runs/tiny-simulation/results.json").read_text())
    (only,) = results["differences"]
    assert (only["score"], {only["variant"], only["less"]}) == ("loss", {"a", "bare"})


def table(out: str) -> list[list[str]]:
    """The cells of each row of the first table, without those of time."""
    lines = out.split("─ \n")[1].splitlines()
    return [re.split(r" {2,}", line.strip())[:-3] for line in lines if re.match(r" +\d", line)]


@pytest.mark.parametrize("unlucky", [1, 2])
def test_what_was_tuned_stays_chosen_where_a_later_seed_diverges(
    unlucky: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The star used to move to a rate that nobody chose, and that ran with one seed."""

    def end(config: Config) -> Outcome:
        rate = config.optimizer.init_args["lr"]
        if config.seed == 2 and rate == 0.1 and config.stages == unlucky:
            return Outcome("it blew up", updates=3)
        return ended({0.01: 2.0, 0.1: 1.0}[rate])

    made_up(monkeypatch, end)
    command = "--config tiny.yaml --stages 2 --variants two.yaml --seeds 3 --rates 0.01,0.1 --tune"
    main(command.split())
    out = capsys.readouterr().out
    whole, part = "1.0000 ± 0.0000", "1.0000 ± 0.0000, 1 of 3 diverged"
    assert table(out) == [
        ["1", "no delay", "0.01", "2.0000"],
        ["1", "no delay", "* 0.1", part if unlucky == 1 else whole],
        ["2", "stash", "0.01", "2.0000"],
        ["2", "stash", "* 0.1", part if unlucky == 2 else whole],
    ]
    who = {
        1: ("1 stage, no delay", "all: no delay diverged"),
        2: ("2 stages, stash", "stash: diverged"),
    }[unlucky]
    assert f"\nnot compared: 2 stages, {who[1]} with 1 of 3 seeds\n" in out
    assert "paired" not in out, "nothing is left to compare"
    assert f"\ndiverged: {who[0]}, rate 0.1, seed 2: it blew up\n" in out


def test_variants_that_cannot_be_compared(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "odd.yaml").write_text("a: {}\nb: {}\nc: {seed: 3}\nd: {data.test: null}\n")
    made_up(monkeypatch, lambda config: ended(1.0))
    main(["--config", "tiny.yaml", "--stages", "2", "--variants", "odd.yaml", "--seeds", "2"])
    assert capsys.readouterr().out.splitlines()[-5:-1] == [
        "differences are paired by seed; the interval of their mean is Student's",
        "not compared: 2 stages, c: its seeds are 3, 4, and those of a 0, 1",
        "not compared: 2 stages, d: its loss is of training data, and that of a of test data",
        "",
    ]
    (folder / "one.yaml").write_text("a: {}\n")
    main(["--config", "tiny.yaml", "--stages", "2", "--variants", "one.yaml", "--seeds", "2"])
    assert "compared" not in (out := capsys.readouterr().out) and "paired" not in out
    main(["--config", "tiny.yaml", "--stages", "2", "--variants", "odd.yaml"])
    assert "compared" not in capsys.readouterr().out, "one seed has no spread"


def test_results_are_written_before_they_are_compared(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up(monkeypatch, lambda config: ended(1.0))
    monkeypatch.setattr("headrace.launch.simulate.differences", lambda rows: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["--config", "tiny.yaml", "--stages", "2"])
    written = folder / "runs/tiny-simulation"
    assert len(json.loads((written / "results.json").read_text())["runs"]) == len(DEFAULT)
    assert len((written / "results.csv").read_text().splitlines()) == 1 + len(DEFAULT)


def pool_of(parent: int) -> set[int]:
    """The processes that simulate for it."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            is_child = f"PPid:\t{parent}\n" in (process / "status").read_text()
            if is_child and b"spawn_main" in (process / "cmdline").read_bytes():
                found.add(int(process.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    ("number", "to", "busy", "code", "line"),
    [
        (signal.SIGINT, "all", False, 130, "headrace: stopped by SIGINT\n"),
        (signal.SIGTERM, "parent", True, 143, "headrace: stopped by SIGTERM\n"),
        (signal.SIGKILL, "parent", True, -signal.SIGKILL, None),
        (signal.SIGKILL, "one", False, 1, "headrace: a process that simulated was ended from "),
    ],
)
def test_processes_side_by_side_end_together(
    number: signal.Signals, to: str, busy: bool, code: int, line: str | None, folder: Path
) -> None:
    words = "--config tiny.yaml --stages 3 --epochs 100000 --processes 2"
    process = subprocess.Popen(
        [sys.executable, "-m", "headrace.launch.simulate", *words.split()],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        end = time.monotonic() + 60
        while len(pool := pool_of(process.pid)) < 2 and time.monotonic() < end:
            time.sleep(0.01)
        assert len(pool) == 2
        if busy:
            time.sleep(6)
        if to == "all":
            os.killpg(process.pid, number)
        else:
            os.kill(process.pid if to == "parent" else min(pool), number)
        _, errors = process.communicate(timeout=60)  # once nobody has the pipe any more
        assert process.returncode == code
        assert line is None or (errors.startswith(line) and errors.count("\n") == 1)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_the_same_again_in_two_processes(folder: Path) -> None:
    for processes in (1, 2):
        main(f"--config tiny.yaml --stages 3 --processes {processes}".split())
    found = []
    for name in ("tiny-simulation", "tiny-simulation-2"):
        runs = json.loads((folder / "runs" / name / "results.json").read_text())["runs"]
        found.append([{k: v for k, v in run.items() if k != "seconds"} for run in runs])
    assert found[0] == found[1]
    assert [run["variant"] for run in found[0]] == list(DEFAULT)
    assert len({run["weights"] for run in found[0]}) == 4, "each variant ends elsewhere"


def test_rates_are_for_every_variant_and_the_best_has_a_star(
    capsys: pytest.CaptureFixture[str],
) -> None:
    main(
        [
            "--config",
            "tiny.yaml",
            "--stages",
            "2",
            "--rates",
            "1e-4,0.2",
            "--variants",
            "variants.yaml",
        ]
    )
    out = capsys.readouterr().out
    assert re.search(r"^ +2 +stash +\* 0\.2 ", out, re.MULTILINE)
    assert re.search(r"^ +2 +stash +0\.0001 ", out, re.MULTILINE)
    assert re.search(r"^ +2 +hot +\* 0\.2 ", out, re.MULTILINE), "the grid's rate wins"


def test_depth_follows_the_stages() -> None:
    arguments = ["--config", "deep.yaml"]
    grid = Grid((3, 5), DEFAULT, scale_depth="model.init_args.blocks")
    cases = plan(arguments, grid)
    assert [(c.variant, c.stages, c.columns) for c in cases if c.variant != "current"] == [
        ("no delay", 1, (3,)),
        ("stash", 3, (3,)),
        ("predict", 3, (3,)),
        ("no delay", 1, (5,)),
        ("stash", 5, (5,)),
        ("predict", 5, (5,)),
    ]
    assert [case.configs[0].model.init_args["blocks"] for case in cases] == [3] * 4 + [5] * 4
    (shared, *others) = plan(arguments, Grid((2, 4), DEFAULT))
    assert shared.columns == (2, 4), "without, one training without delay is enough"
    assert len(others) == 6
    assert plan(arguments, Grid((4, 2), DEFAULT)) == [shared, *others], "in the order of stages"


def test_a_cut_that_is_told_is_kept_where_it_fits() -> None:
    cases = plan(
        ["--config", "tiny.yaml", "--pipeline.balance", "[2, 4]"], Grid((2, 3), {"stash": {}})
    )
    assert [case.configs[0].pipeline.balance for case in cases] == [[2, 4], "parameters"]


def test_means_are_over_those_that_finished() -> None:
    config = parse(["--config", "tiny.yaml", "--stages", "2"])
    good = Outcome(None, {"loss": 2.0}, (1.0, 0.0), 10, 1.0, ((8, 2.0),), "x")
    bad = Outcome("at once", curve=((8, math.nan),), updates=3)
    rows = [
        Row(Case("a", (2,), 0.1, (config,) * 3), (good, bad, good)),
        Row(Case("a", (2,), 0.2, (config,)), (Outcome(None, {"loss": 3.0}, (1.0, 0.0)),)),
    ]
    other = Row(Case("a", (2,), 0.2, (config,) * 3), rows[1].outcomes * 3)
    assert best([rows[0], other], 2)["a"] is other, "a rate with which a seed diverges is not best"
    assert best(rows, 2)["a"] is rows[0], "but what was tuned on the first seed stays chosen"
    cells = [[str(cell) for cell in column.cells] for column in results_table(rows).columns]
    assert cells[3] == ["2.0000 ± 0.0000, 1 of 3 diverged", "3.0000"]


def test_an_interval_is_students_and_pairs_the_seeds() -> None:
    mean, half = difference([1.0, 2.0, 3.0], [0.0, 1.0, 1.0])  # 1, 1, 2
    # Of 3 differences with standard deviation 1/√3: 4.303 (t, 2 degrees of freedom) · 1/√3 · 1/√3.
    assert (mean, half) == (pytest.approx(4 / 3), pytest.approx(4.302653 / 3, rel=1e-6))
    mean, half = difference([5.0, 9.0], [4.0, 8.0])
    assert (mean, half) == (1, 0), "what the seeds share is gone"


def test_differences_are_of_the_best_rates_and_of_whole_rows() -> None:
    config = parse(["--config", "tiny.yaml", "--stages", "2"])

    def row(variant: str, rate: float, *losses: float) -> Row:
        ends = tuple(Outcome(None, {"loss": loss}, (0.0,)) for loss in losses)
        return Row(Case(variant, (2,), rate, (config,) * len(losses)), ends)

    first = [row("a", 0.1, 2.0, 3.0), row("a", 0.2, 1.0, 2.0)]
    others = [row("b", 0.1, 1.5, 2.5), row("b", 0.2, 4.0, 4.0), row("c", 0.1, 1.0)]
    (found,) = differences([*first, *others])
    assert (found.variant, found.less, found.mean, found.half) == ("b", "a", 0.5, 0.0)
    assert differences(others) == [], "of the first variant, b, c lacks a seed"
    assert differences([row("a", 0.1, 1.0), row("b", 0.1, 1.0)]) == [], "one seed has no spread"


def test_smooth() -> None:
    assert smooth([(1, 1.0), (2, 3.0), (3, 5.0)], 2) == [(1.5, 2.0), (3, 5.0)]
    assert smooth([(1, 1.0), (2, 3.0)], 2) == [(1, 1.0), (2, 3.0)]


def test_what_is_in_flight_at_the_end_takes_time_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run of fewer micro-batches than stages that is all: it was told as no time."""
    config = parse(["--config", "tiny.yaml", "--stages", "6", "--data.batch_size", "80"])
    drain = Simulation.drain

    def slow(pipe: Simulation) -> None:
        time.sleep(0.2)
        drain(pipe)

    monkeypatch.setattr(Simulation, "drain", slow)
    assert simulate(config).seconds >= 0.2


def test_a_run_that_diverges_is_an_outcome() -> None:
    config = parse(["--config", "tiny.yaml", "--stages", "2", "--optimizer.init_args.lr", "1e30"])
    outcome = simulate(config)
    assert outcome.diverged is not None and "is not finite" in outcome.diverged
    assert not outcome.scores


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--stages 2,x", "--stages 2,x: give whole numbers from 1 on, as in 8,16,32"),
        ("--stages 0", "--stages 0: give whole numbers from 1 on, as in 8,16,32"),
        ("--stages=", "--stages '': give whole numbers from 1 on"),
        ("--stages ,", "--stages ,: give whole numbers"),
        ("--stages 2 --seeds 0", "--seeds 0: give a whole number of at least 1"),
        ("--stages 2 --rates -1", "--rates -1: give learning rates, as in 1e-3,3e-3"),
        ("--stages 2,9", "--stages 9: the model has 6 layers, and each stage needs one: write "
         "--stages up to 6, or --scale-depth KEY (model.init_args.blocks of a gpt)"),
        ("--stages 2 --variants nine.yaml", "variant 'deep' has stages: 9, the model has 6 layers, "
         "and each stage needs one: write stages: 6 there, or fewer, or leave it out"),
        ("--stages 2 --scale-depth model.init_args.widths", "it must be a whole number"),
        ("--stages 2 --scale-depth model.init_args.blocks", "that is null in the configuration"),
        ("--stages 2 --data.batch 3", "unknown key data.batch"),
        ("--stages 2 --pipeline.replicas allreduce", "write --pipeline.replicas null"),
        ("--stages 2 --variants tiny.yaml", "variant 'epochs' must be a name with keys and values"),
        ("--stages 2 --variants none.yaml", "none.yaml: no such file"),
        ("--stages 2 --variants wrong.yaml", "variant 'stash', 2 stages: unknown key pipeline.rul "
         "(did you mean rule"),
        ("--stages 2 --pipeline.micro_batches 0", "pipeline.micro_batches is 0"),
    ],
)  # fmt: skip
def test_refusals(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: str, words: str
) -> None:
    (folder / "wrong.yaml").write_text("stash: {pipeline.rul: delayed}\n")
    (folder / "nine.yaml").write_text("stash: {}\ndeep: {stages: 9}\n")
    assert words in refused(capsys, "--config", "tiny.yaml", *arguments.split())
    assert not (folder / "runs").exists()


def test_the_ratios_to_plain_training(capsys: pytest.CaptureFixture[str]) -> None:
    speed(["--rounds", "1", "--share", "0.03", "--stages", "4"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "4 stages, times those of plain training"
    assert re.fullmatch(r"\| MLP +\| 1\.00 +(\| \d+\.\d\d +){6}\|", lines[-1])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--stages", "0"], "--stages 0: give a whole number from 1 to 8, the layers with weights"),
        (["--stages", "9"], "--stages 9: give a whole number from 1 to 8"),
        (["--share", "0"], "--share 0: give a number above 0"),
        (["--share", "nan"], "--share nan: give a number above 0"),
    ],
)
def test_speeds_that_cannot_be_measured(
    capsys: pytest.CaptureFixture[str], given: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        speed(given)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_plain_training_in_several_graphs_is_the_same() -> None:
    work = WORKS["MLP"]
    found = []
    for graphs, optimizers in ((1, 1), (1, 4), (4, 4)):
        torch.manual_seed(0)
        model = work.model()
        parts = [work.optimizer(part.named_parameters()) for part in cut_up(model, optimizers)]
        train(cut_up(model, graphs), parts, work.loss_fn, work.batches(5))
        found.append(parameters_to_vector(model.parameters()))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_under_torchrun(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headrace.launch.simulate.processes", lambda: 2)
    assert "start it without torchrun" in refused(capsys, "--config", "tiny.yaml", "--stages", "2")


def test_the_rate_is_tuned_on_the_first_seed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(
        ["--config", "tiny.yaml", "--stages", "2", "--seeds", "2", "--variants", "variants.yaml",
         "--rates", "1e-3,0.1", "--tune", "--until", "1.0"]
    )  # fmt: skip
    runs = json.loads((folder / "runs/tiny-simulation/results.json").read_text())["runs"]
    seeds: dict[tuple[str, float], list[int]] = {}
    losses: dict[tuple[str, float], float] = {}
    for run in runs:
        key = (run["variant"], run["rate"])
        seeds.setdefault(key, []).append(run["seed"])
        losses.setdefault(key, run["scores"]["loss"])
    for variant in ("no delay", "stash"):
        better, worse = sorted((0.001, 0.1), key=lambda rate: losses[variant, rate])
        assert seeds[variant, better] == [0, 1] and seeds[variant, worse] == [0]
    assert re.search(r"staleness +updates +to 1 +time", capsys.readouterr().out)


def test_tuning_needs_rates(capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "--config", "tiny.yaml", "--stages", "2", "--tune")
    assert "--tune chooses among --rates: give two or more" in line


def test_updates_until() -> None:
    curve = tuple((8 * k, 2.0 - 0.1 * k) for k in range(1, 11))
    outcome = Outcome(updates=20, curve=curve)
    assert updates_until(outcome, 1.55) == 10  # the fifth of ten points, of 20 updates
    assert math.isnan(updates_until(outcome, 0.5))
    assert math.isnan(updates_until(Outcome(), 0.5))


def test_variants_that_headrace_brings(capsys: pytest.CaptureFixture[str]) -> None:
    """Every one can be parsed with its configuration, and its optimizers and corrections made."""
    momentum = "deep_digits --optimizer.init_args.momentum 0.9"
    brought = {
        "charlm_adam": "deep_charlm", "charlm_muon": "deep_charlm", "deeper": "deep_charlm",
        "digits": "deep_digits", "digits_momentum": momentum,
    }  # fmt: skip
    for name, config in brought.items():
        grid = Grid((8,), read_variants(Path(name)))
        for case in plan(["--config", *config.split()], grid):
            make_corrections(case.configs[0].pipeline)
    line = refused(capsys, "--config", "tiny.yaml", "--stages", "2", "--variants", "none")
    assert f"--variants none: no such file (Headrace brings {', '.join(sorted(brought))})" in line


def test_nothing_trains_before_the_last_variant_is_known_to_work(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor what is refused when a stage's optimizer is made: that used to be told hours later."""
    trained: list[object] = []
    monkeypatch.setattr(side_by_side, "simulate", trained.append)
    (folder / "late.yaml").write_text(
        "stash: {}\nlate: {optimizer.init_args.momentum: 0.0, "
        "pipeline.corrections: [spike_compensation]}\n"
    )
    words = refused(capsys, "--config", "tiny.yaml", "--stages", "2", "--variants", "late.yaml")
    assert words == (
        "headrace: variant 'late', 2 stages: spike_compensation is about momentum, and this SGD "
        "has none: write a momentum above 0, or leave the correction out\n"
    )
    assert not trained and not (folder / "runs").exists()
