"""A configuration with some keys set: what is written, and that all the rest stays as it was."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from headrace.launch.components import Component
from headrace.launch.config import find_file, parse
from headrace.launch.profiling.fix import write_fixed

Write = Callable[..., str]


@pytest.fixture
def fixed(tmp_path: Path) -> Write:
    """Write a source, fix it, and give what the target has."""

    def write(text: str, **fixes: Any) -> str:
        source, target = tmp_path / "source.yaml", tmp_path / "target.yaml"
        source.write_text(text)
        write_fixed(source, {key.replace("__", "."): fixes[key] for key in fixes}, target)
        assert source.read_text() == text
        return target.read_text()

    return write


def test_comments_quotes_and_order_stay(fixed: Write) -> None:
    text = """\
# what it is
stages: 2  # two

optimizer: {class_path: 'SGD', init_args: {lr: 1e-3}}
name: "x"
pipeline:  # how
  # the slack
  slack: 0  # none yet
  schedule: stream

# and the data
data:
  train: Digits
# the end
"""
    assert fixed(text, pipeline__slack=2) == text.replace("slack: 0 ", "slack: 2 ")


@pytest.mark.parametrize(
    "rule", ["rule: {class_path: delayed}", "rule:\n    class_path: delayed", "rule: delayed"]
)
def test_a_new_key_comes_last_and_above_the_comment_of_the_next(rule: str, fixed: Write) -> None:
    text = f"""\
pipeline:
  {rule}  # the default

# the data
data: Digits
"""
    assert (
        fixed(text, pipeline__slack=[1, 2], pipeline__balance=[3, 4, 5])
        == f"""\
pipeline:
  {rule}  # the default
  slack: [1, 2]
  balance: [3, 4, 5]

# the data
data: Digits
"""
    )


def test_the_comment_below_a_block_outlives_it(fixed: Write) -> None:
    text = """\
pipeline:
  balance:
  - 1
  - 3

  # the rule
  rule:
    class_path: exact

# the data
data: Digits
"""
    assert (
        fixed(text, pipeline__balance=[2, 2], pipeline__rule="delayed")
        == """\
pipeline:
  balance: [2, 2]

  # the rule
  rule: delayed

# the data
data: Digits
"""
    )


def test_comments_above_and_below_a_block_both_outlive_it(fixed: Write) -> None:
    text = "slack:  # ours\n  # one each\n  - 1\n  - 2\n# next\nstages: 3\n"
    got = fixed(text, slack=[0, 1])
    assert [line.split() for line in got.splitlines()] == [
        ["slack:", "[0,", "1]", "#", "ours"],
        ["#", "one", "each"],
        ["#", "next"],
        ["stages:", "3"],
    ]


@pytest.mark.parametrize("parent", ["pipeline:", "pipeline: null", "pipeline: ~"])
def test_keys_below_a_null_are_made(fixed: Write, parent: str) -> None:
    got = fixed(f"{parent}\n\n# the data\ndata: Digits\n", pipeline__slack=[1], pipeline__a__b=2)
    assert got == "pipeline: {slack: [1], a: {b: 2}}\n\n# the data\ndata: Digits\n"


def test_keys_below_one_that_is_absent_are_made(fixed: Write) -> None:
    got = fixed("data: Digits\n# the end\n", pipeline__slack=1, pipeline__schedule="stream")
    assert got == "data: Digits\npipeline: {slack: 1, schedule: stream}\n# the end\n"


def test_keys_in_braces_stay_in_braces(fixed: Write) -> None:
    text = "pipeline: {schedule: 1f1b, slack: 0} # how\n"
    got = fixed(text, pipeline__schedule="stream", pipeline__balance=[1, 2])
    assert got == "pipeline: {schedule: stream, slack: 0, balance: [1, 2]} # how\n"


def test_long_lines_stay_whole(fixed: Write) -> None:
    text = f"widths: [{', '.join(['512'] * 40)}]\nwords: {'much ' * 40}more\n"
    assert fixed(text, stages=2) == f"{text}stages: 2\n"


def test_a_file_that_is_there_is_left_as_it_is(tmp_path: Path) -> None:
    source, target = tmp_path / "source.yaml", tmp_path / "target.yaml"
    source.write_text("stages: 2\n")
    target.write_text("mine\n")
    with pytest.raises(ValueError) as caught:
        write_fixed(source, {"stages": 3}, target)
    assert str(caught.value) == f"{target} exists: give another name, or move it away"
    assert target.read_text() == "mine\n"
    with pytest.raises(ValueError, match="exists: "):
        write_fixed(source, {"stages": 3}, source)
    assert source.read_text() == "stages: 2\n"


def test_a_package_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ruamel.yaml", None)
    (tmp_path / "source.yaml").write_text("stages: 2\n")
    with pytest.raises(ImportError, match=r"^--fix needs .*: pip install 'headrace\[profile\]'$"):
        write_fixed(tmp_path / "source.yaml", {"stages": 3}, tmp_path / "target.yaml")
    assert not (tmp_path / "target.yaml").exists()


@pytest.mark.parametrize("name", ["charlm", "digits", "dnn", "emulated"])
def test_every_configuration_of_ours_can_be_fixed_and_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])  # parse adds to it
    source, target = find_file(name), tmp_path / f"{name}.yaml"
    fixes = {
        "pipeline.balance": [3, 4],
        "pipeline.slack": [1],
        "pipeline.schedule": "stream",
        "pipeline.rule": "delayed",
        "pipeline.micro_batches": 1,
    }
    write_fixed(source, fixes, target)
    before, got = parse(["--config", name]), parse(["--config", str(target)])
    options = replace(
        before.pipeline, balance=[3, 4], slack=[1], rule=Component("delayed"), micro_batches=1
    )
    assert got == replace(before, pipeline=options)
    text = source.read_text()
    kept = [line for line in text.splitlines() if not line.startswith("  rule: ")]
    assert [line for line in target.read_text().splitlines() if line in kept] == kept


def test_a_plain_name_keeps_its_place_when_an_argument_comes(tmp_path: Path) -> None:
    source, target = tmp_path / "a.yaml", tmp_path / "b.yaml"
    source.write_text("optimizer: SGD  # plain\nstages: 2\n")
    write_fixed(source, {"optimizer.init_args.lr": 0.5, "stages": 3}, target)
    assert yaml.safe_load(target.read_text()) == {
        "optimizer": {"class_path": "SGD", "init_args": {"lr": 0.5}},
        "stages": 3,
    }
