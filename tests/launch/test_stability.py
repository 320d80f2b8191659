"""What the training command and the plan say of stability before a run."""

import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from headrace.launch.assemble import make_loader, make_loss, make_model, make_pipeline
from headrace.launch.config import parse
from headrace.launch.plan import main as plan
from headrace.launch.stability import look_ahead
from headrace.launch.train import main
from headrace.pipeline.checkpoints import load_weights
from headrace.pipeline.curvature import estimate_curvature
from headrace.pipeline.feed import read

from .test_train import TINY, same

DEEP = TINY.replace("stages: 2", "stages: 8").replace("[4, 4]", "[2, 2, 2, 2, 2, 2, 1, 1]")
DEEP = DEEP.replace("[6, 8, 8, 3]", "[6, 8, 8, 8, 8, 3]")
MOMENTUM = ("--optimizer.init_args.momentum", "0.9")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "tiny.yaml").write_text(TINY)
    (tmp_path / "deep.yaml").write_text(DEEP)
    yield tmp_path


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """What was printed, its lines joined; none of it as Python prints warnings."""
    out, err = capsys.readouterr()
    assert err == ""
    return " ".join(out.split())


def train(*arguments: str, file: str = "tiny.yaml") -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        main(["--config", file, "--epochs", "1", *arguments])


FIGURES = (
    "stability: staleness 1 at stage 0 divides the largest stable learning rate by 6: η/(1-m) = 0.2"
    " bears a curvature up to 5, and 30 without delay"
)


def test_a_run_and_a_plan_begin_with_the_figures(capsys: pytest.CaptureFixture[str]) -> None:
    train()
    assert said(capsys).count(FIGURES) == 1
    plan(["--config", "tiny.yaml"])
    assert said(capsys).count(FIGURES) == 1


def test_a_warning_is_a_line_of_the_run_once(capsys: pytest.CaptureFixture[str]) -> None:
    line = "warning: staleness 7 at stage 0 divides the largest stable learning rate by 241"
    train(*MOMENTUM, "--epochs", "2", file="deep.yaml")
    out = said(capsys)
    assert out.count(line) == 1 and out.count("stab") == 1
    advice = "pipeline.corrections: [learning_rate], pipeline.update_every larger, or pipeline.rule"
    assert f"or write {advice}: {{class_path: delayed, init_args: {{weights: predict}}}}" in out
    plan(["--config", "deep.yaml", *MOMENTUM])
    assert said(capsys).count(line) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("--pipeline.schedule", "1f1b"),
        ("--pipeline.corrections", "learning_rate"),
        ("--pipeline.rule", "{class_path: delayed, init_args: {weights: predict}}"),
    ],
)
def test_nothing_is_said_where_nothing_is_to_be(
    arguments: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    train(*arguments, *MOMENTUM, file="deep.yaml")
    plan(["--config", "deep.yaml", *arguments, *MOMENTUM])
    out = said(capsys)
    assert "stab" not in out and "warning" not in out
    words = verdict(*arguments, *MOMENTUM, "--scheduler", "null")
    assert words.startswith("stability: not checked: check_stability is")


@pytest.mark.parametrize(
    "arguments",
    [
        ("[{class_path: synchronous_warm_up, init_args: {updates: 1}}]", *MOMENTUM),
        ("[auto]", "--pipeline.slack", "8"),
    ],
    ids=["warm-up", "auto"],
)
def test_what_does_nothing_about_the_delay_does_not_silence(
    arguments: Sequence[str], capsys: pytest.CaptureFixture[str]
) -> None:
    plain = ("--optimizer.init_args.momentum", "0.0", "--pipeline.corrections", *arguments)
    train(*plain, file="deep.yaml")
    plan(["--config", "deep.yaml", *plain])
    assert said(capsys).count("warning: staleness") == 2


def test_a_batch_that_grows_begins_with_the_delay_of_its_first_size(
    capsys: pytest.CaptureFixture[str],
) -> None:
    growth = "{class_path: steps, init_args: {sizes: [28, 56], at: [1]}}"
    cut = ("--data.batch_size", "4", "--pipeline.batch_size", growth, *MOMENTUM)
    train(*cut, file="deep.yaml")
    plan(["--config", "deep.yaml", *cut])
    figures = "stability: staleness 1 at stage 0 divides the largest stable learning rate by 38"
    assert said(capsys).count(figures) == 2


def test_a_plan_knows_what_auto_would_choose(capsys: pytest.CaptureFixture[str]) -> None:
    plan(["--config", "deep.yaml", *MOMENTUM, "--pipeline.corrections", "[auto]"])
    assert "stab" not in said(capsys)


def test_a_check_changes_no_number(capsys: pytest.CaptureFixture[str]) -> None:
    train()
    train("--pipeline.check_stability", "5")
    assert same("tiny", "tiny-2")
    out = said(capsys)
    assert "stability: stable at these weights, whose curvature training may raise: η·h = " in out
    assert "and staleness 1 allows 0.5, no delay 3" in out


# A run that went on from a checkpoint was judged by first weights that it does not have.
def test_a_check_is_made_at_the_weights_that_training_goes_on_from(
    capsys: pytest.CaptureFixture[str],
) -> None:
    check = ("--pipeline.check_stability", "20")
    train(*check, "--checkpoint.every", "epoch")
    train(*check, "--epochs", "2", "--checkpoint.resume", "runs/tiny")
    found = re.findall(r"at stage 0 \(curvature ([\d.]+)\)", said(capsys))
    config = parse(["--config", "tiny.yaml"])
    batch = next(read(make_loader(config, "data.train", config.data.train), pairs_only=True))
    model, curvatures = make_model(config), []
    for state in ({}, load_weights("runs/tiny/checkpoints")):
        model.load_state_dict(state, strict=bool(state))
        h = estimate_curvature(model, make_loss(config), batch, layers=["0", "1", "2", "3"])
        curvatures.append(f"{h:.3g}")
    assert found == curvatures and found[0] != found[1]


def verdict(*arguments: str) -> str:
    config = parse(["--config", "tiny.yaml", "--pipeline.check_stability", "10", *arguments])
    loader = make_loader(config, "data.train", config.data.train)
    with make_pipeline(config, make_model(config), None) as pipe:
        pipe.prepare(loader)
        state = torch.get_rng_state()
        text = look_ahead(config, pipe, pipe.state_dict())
        assert torch.equal(torch.get_rng_state(), state)
    return "" if text is None else text.plain


def test_the_delay_is_blamed_for_what_it_does() -> None:
    plain = ("--scheduler", "null", "--optimizer.init_args.lr")
    assert verdict(*plain, "0.1").startswith("stability: stable")
    small = verdict(*plain, "1.0", "--optimizer.init_args.momentum", "0.9")
    assert small.startswith("warning: stable without delay, unstable with: η·h = ")
    assert verdict(*plain, "1000").startswith("warning: unstable with or without delay")


def test_adam_has_figures_and_no_verdict() -> None:
    adam = "{class_path: AdamW, init_args: {lr: 0.001}}"
    words = verdict("--scheduler", "null", "--optimizer", adam)
    assert "by 38: η/(1-m) = 0.001 bears a preconditioned curvature up to 1,000, and" in words
    assert words.endswith(", which check_stability cannot find: it is for SGD")


def test_a_check_takes_a_whole_number() -> None:
    with pytest.raises(ValueError, match="check_stability must be at least 0, not -1"):
        parse(["--config", "tiny.yaml", "--pipeline.check_stability", "-1"])
