"""The plan: what is measured and printed, and that nothing is started."""

import re
from pathlib import Path

import pytest

from headrace.launch.config import parse
from headrace.launch.display import prospect
from headrace.launch.plan import main, make_plan
from headrace.pipeline.partition import LayerCost, Partition

FILE = """\
stages: 2
threads: 1
model: {class_path: mlp, init_args: {widths: [64, 16, 16, 10]}}
loss: CrossEntropyLoss
optimizer: SGD
data: {train: {class_path: Generated, init_args: {shape: [8, 8], classes: 10}}, batch_size: 5}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.yaml").write_text(FILE)
    return tmp_path


def test_layers_and_stages_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--config", "plan.yaml", "--pipeline.balance", "[2, 4]", "--pipeline.slack", "1"])
    shown = capsys.readouterr().out
    layer = r"^ +0? +1  Linear +1,040 +320 B +\d\.\d{3} +\d\.\d{3} +\d\.\d{3} +\d+%"
    assert re.search(layer, shown, re.M)  # 5 samples of 16 numbers of 4 bytes
    assert re.search(r"^ +0 +0 to 1  Flatten, Linear +1,040 +320 B .* 2 *$", shown, re.M)
    assert re.search(r"^ +1 +2 to 5  2×ReLU, 2×Linear +442 +200 B .* 0 *$", shown, re.M)
    assert "predicted speed-up over one device: " in shown
    assert not Path("runs").exists()


def test_a_plan_is_measured_whatever_it_is_cut_by() -> None:
    plan, staleness = make_plan(
        parse(["--config", "plan.yaml", "--pipeline.balance", "parameters"])
    )
    assert plan.sizes == (2, 4) and staleness == (1.0, 0.0)
    assert all(layer.forward > 0.0 and layer.backward > 0.0 for layer in plan.layers)


def test_a_plan_is_for_a_micro_batch() -> None:
    plan, staleness = make_plan(
        parse(["--config", "plan.yaml", "--pipeline.micro_batches", "5", "--stages", "3"])
    )
    assert plan.layers[-1].activation_bytes == 40
    assert staleness == (2.0, 1.0, 0.0)


def layers(*seconds: float) -> tuple[LayerCost, ...]:
    return tuple(
        LayerCost(str(k), "Linear", 1, 4, forward=s / 2, backward=s / 2, update=0.0)
        for k, s in enumerate(seconds)
    )


def test_one_layer_that_bounds_every_cut_is_named() -> None:
    assert prospect(Partition(layers(1.0, 1.0, 6.0, 2.0), (2, 1, 1))) == (
        "forward, backward and update in ms for one micro-batch;\n"
        "predicted speed-up over one device: 1.67x\n"
        "layer 2 alone is 60% of the work: no cut by layers can exceed 1.67x"
    )
    assert "alone" not in prospect(Partition(layers(1.0, 1.0, 1.0), (1, 1, 1)))
    assert prospect(Partition(layers(1.0, 9.0), (2,))) == (
        "forward, backward and update in ms for one micro-batch"
    )


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["--stages", "7"], "6 layers cannot make 7 stages"),
        (["--model.init_args.widths", "[3, 2]"], "layer '1' (Linear) cannot take float32[5, 64]"),
        (["--loss", "BCELoss"], "loss"),
        (["--pipeline.slack", "[1, 1]"], "pipeline.slack is [1, 1]"),
        (["--pipeline.schedule", "strem"], "pipeline.schedule must be gpipe, or 1f1b, or stream"),
        (["--pipeline.rule", "exact"], "exact"),
        (["--pipeline.device", "abacus"], "abacus"),
        (["--optimizer.lr", "1"], "unknown key optimizer.lr"),
    ],
)
def test_refused_with_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], overrides: list[str], line: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--config", "plan.yaml", *overrides])
    assert caught.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith("headrace: ") and shown.count("\n") == 1
    assert line in shown
