"""The configuration: what is read, what is refused, and with which words."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from headrace.launch.components import Component, build, call
from headrace.launch.config import Config, parse, to_yaml
from headrace.launch.strict_yaml import dump, load
from headrace.pipeline.rules import Synthetic
from headrace.pipeline.synthesizers import MLP

BASE = """\
stages: 2
model:
  class_path: mlp
  init_args: {widths: [64, 16, 10]}
loss: CrossEntropyLoss
optimizer:
  class_path: SGD
  init_args: {lr: 1e-1, momentum: 0.5}
metrics: [accuracy]
data:
  train: Digits
  test: {class_path: Digits, init_args: {split: test}}
pipeline:
  rule: {class_path: delayed, init_args: {weights: stash}}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Each test runs in a folder of its own, with base.yaml in it; imports are undone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    modules = set(sys.modules)
    (tmp_path / "base.yaml").write_text(BASE)
    yield tmp_path
    for name in set(sys.modules) - modules:
        if name.startswith("my_"):
            del sys.modules[name]


def base(*overrides: str) -> Config:
    return parse(["--config", "base.yaml", *overrides])


def refusal(*arguments: str) -> str:
    """The one line with which these arguments are refused."""
    with pytest.raises(ValueError) as caught:
        parse(arguments)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_a_file_is_read_with_defaults_and_short_names() -> None:
    config = base()
    assert config.name == "base"  # the file's
    assert config.stages == 2 and config.seed == 0 and config.epochs == 1
    assert config.model == Component("mlp", {"widths": [64, 16, 10]})
    assert config.loss == Component("CrossEntropyLoss", {})
    assert config.data.train == Component("Digits", {})
    assert config.data.batch_size == 32 and config.data.shuffle is True
    assert config.pipeline.rule == Component("delayed", {"weights": "stash"})
    assert config.pipeline.timeout == (300.0, 60.0)
    assert config.scheduler is None


@pytest.mark.parametrize(
    "arguments",
    [
        ["--pipeline.slack", "1", "--epochs=3"],
        ["--epochs=3", "--pipeline.slack=1"],
    ],
)
def test_overrides_win_over_the_file(arguments: list[str]) -> None:
    config = base(*arguments)
    assert config.pipeline.slack == 1 and config.epochs == 3


def test_overrides_of_every_kind_of_value() -> None:
    config = base(
        "--name", "wide",
        "--threads", "null",
        "--data.shuffle", "false",
        "--metrics", "[]",
        "--pipeline.balance", "[2, 2]",
        "--pipeline.slack", "auto",
        "--pipeline.clip_grad_norm", "1e0",
        "--pipeline.autocast", "bfloat16",
        "--pipeline.compile", "{mode: default}",
        "--pipeline.timeout", "[30, 5]",
    )  # fmt: skip
    assert config.name == "wide" and config.threads is None and config.metrics == []
    assert config.data.shuffle is False
    options = config.pipeline
    assert options.balance == [2, 2] and options.slack == "auto"
    assert options.clip_grad_norm == 1.0 and options.autocast == "bfloat16"
    assert options.compile == {"mode": "default"} and options.timeout == (30.0, 5.0)


def test_an_override_of_one_argument_keeps_the_others() -> None:
    config = base("--optimizer.init_args.lr=1e-3", "--loss.init_args.label_smoothing", "0.1")
    assert config.optimizer.init_args == {"lr": 0.001, "momentum": 0.5}
    assert config.loss == Component("CrossEntropyLoss", {"label_smoothing": 0.1})


@pytest.mark.parametrize("first", [0, 1])
def test_another_class_drops_the_arguments_of_the_one_in_the_file(first: int) -> None:
    pairs = [["--optimizer.class_path", "AdamW"], ["--optimizer.init_args.lr", "0.5"]]
    config = base(*pairs[first], *pairs[1 - first])
    assert config.optimizer == Component("AdamW", {"lr": 0.5})
    assert base("--optimizer", "AdamW").optimizer == Component("AdamW", {})


def test_a_component_can_be_left_out_and_brought_back() -> None:
    assert base("--data.test", "null").data.test is None
    config = base("--scheduler", "StepLR", "--scheduler.init_args.step_size", "10")
    assert config.scheduler == Component("StepLR", {"step_size": 10})


def test_the_configurations_headrace_brings_are_found_by_name() -> None:
    assert parse(["--config", "digits"]).name == "digits"
    assert parse(["--config", "charlm"]).stages == 4


def test_without_a_file_the_command_line_is_enough() -> None:
    config = parse(
        ["--model", "mlp", "--model.init_args.widths", "[4, 2]", "--loss", "MSELoss",
         "--optimizer", "SGD", "--data.train", "Digits"]
    )  # fmt: skip
    assert config.name == "run" and config.optimizer == Component("SGD", {})


# Numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("written", ["1e-3", '"1e-3"', "'0.001'", "1.0e-3", ".001"])
def test_a_number_is_a_number_however_it_is_written(folder: Path, written: str) -> None:
    (folder / "base.yaml").write_text(
        BASE.replace("lr: 1e-1", f"lr: {written}") + f"  clip_grad_norm: {written}\n"
    )
    config = base()
    assert config.optimizer.init_args["lr"] == 0.001
    assert config.pipeline.clip_grad_norm == 0.001


def test_text_stays_text_where_text_is_meant(folder: Path) -> None:
    (folder / "my_parts.py").write_text(
        "def loss(output, target, tag: str = 'a', unsaid=None, count: int = 1): ...\n"
    )
    config = base("--loss", "my_parts.loss", "--loss.init_args",
                  "{tag: '1e-3', unsaid: '1e-3', count: '2'}")  # fmt: skip
    assert config.loss.init_args == {"tag": "1e-3", "unsaid": "1e-3", "count": 2}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001), ("-1E+2", -100.0), ("5.", 5.0), ("012", "012"), ("no", "no"),
        ("on", "on"), ("1:30", "1:30"), ("2024-01-01", "2024-01-01"), ("true", True), ("", None),
        (".inf", float("inf")), ("0x1F", 31), ("{<<: {a: 1}, b: 2}", {"a": 1, "b": 2}),
    ],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    assert load(text) == value


@pytest.mark.parametrize(
    "value", ["1e-3", "no", "null", "012", "", "2024-01-01", 1e-05, 1e30, [0.1, [1]], {"a": {}}]
)
def test_what_is_dumped_is_read_back(value: object) -> None:
    assert load(dump({"key": value})) == {"key": value}


# Refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("--modle=mlp", r"unknown key modle \(did you mean model\?\); a configuration has name, "),
        ("--pipeline.slak=1", r"unknown key pipeline.slak \(did you mean slack\?\); pipeline has"),
        ("--model.init_arg.widths=[4,2]", r"unknown key model.init_arg \(did you mean init_args"),
        ("--pipeline=stream", r"pipeline holds keys and values, not 'stream'"),
        ("--epochs=many", r"epochs must be a whole number, not 'many'"),
        ("--epochs=1.5", r"epochs must be a whole number, not 1.5"),
        ("--epochs=null", r"epochs must be a whole number, not null"),
        ("--epochs=0", r"epochs must be at least 1, not 0"),
        ("--data.batch_size=-1", r"data.batch_size must be at least 1, not -1"),
        ("--data.shuffle=1", r"data.shuffle must be true or false, not 1"),
        ("--pipeline.clip_grad_norm=x", r"pipeline.clip_grad_norm must be a number, or null, not"),
        ("--pipeline.timeout=[1]", r"pipeline.timeout must be a list of 2 numbers, not \[1\]"),
        ("--pipeline.on_nonfinite=go", r"pipeline.on_nonfinite must be stop, or skip, not 'go'"),
        ("--pipeline.slack=1.5", r"pipeline.slack must be a whole number, or a list of whole "),
        ("--name=a/b", r"name must be a plain folder name, not 'a/b'"),
        ("--name=", r"name must be text, not null"),
        ("--model=null", r"model is missing: write model: NAME, or its class_path and init_args"),
        ("--model=3", r"model is a name, or class_path and init_args, not 3"),
        ("--model.class_path=3", r"model.class_path must be a name or an import path, not 3"),
        ("--model.init_args=[1]", r"model.init_args must be names and values, not \[1\]"),
        ("--model=mpl", r"model: no 'mpl' in headrace.models, .*did you mean mlp\?.*module.name"),
        ("--model=my.net", r"model: there is no module 'my', neither installed nor in /"),
        ("--model=torch.nn.Linea", r"model: torch.nn has no 'Linea' \(did you mean Linear"),
        ("--model=torch.nn", r"model: torch.nn is a module; a class or a function is needed"),
        ("--model=my-net.a", r"model: 'my-net.a' is no import path; write module.name"),
        ("--model.init_args.wdth=1", r"model.init_args: mlp has no argument 'wdth' .*; it takes w"),
        ("--model.init_args={}", r"model.init_args: mlp needs widths"),
        ("--optimizer.init_args.params=1", r"SGD has no argument 'params'.*it takes lr, momentum"),
        ("--pipeline.rule=delay", r"pipeline.rule: no 'delay' in headrace.pipeline.rules, which"),
        ("--pipeline.rule.init_args.weight=a", r"delayed has no argument 'weight' \(did you mean"),
        ("--metrics=[acuracy]", r"metrics: no 'acuracy' in headrace.launch.metrics.*accuracy"),
        ("--data.train=Digit", r"data.train: no 'Digit' in headrace.launch.data.*Digits"),
        ("--model=[", r"line 1: .*expected"),
    ],
)  # fmt: skip
def test_refused_in_one_line(override: str, line: str) -> None:
    assert re.match(f"(?:.*: )?{line}", refusal("--config", "base.yaml", override)), refusal(
        "--config", "base.yaml", override
    )


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: 1\nb: 2\na: 3\n", r"x.yaml: line 3: the key 'a' is there twice, first on line 1"),
        ("m: {a: 1, a: 2}\n", r"x.yaml: line 1: the key 'a' is there twice, first on line 1"),
        ("model: [\n", r"x.yaml: line 2: "),
        ("- 1\n", r"x.yaml: a configuration is keys and values, not \[1\]"),
        ("epochs: 1\n", r"model is missing"),
    ],
)
def test_files_refused_in_one_line(folder: Path, text: str, line: str) -> None:
    (folder / "x.yaml").write_text(text)
    assert re.match(line, refusal("--config", "x.yaml"))


def test_a_missing_file_is_refused_with_those_there_are() -> None:
    assert refusal("--config", "none.yaml") == (
        "--config none.yaml: no such file (Headrace brings charlm, deep_charlm, deep_digits, "
        "digits, dnn, emulated, large_batch, replicas, synthetic, tiny, unlocked)"
    )


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["epochs", "3"], "'epochs' on the command line: write --config FILE or --key value"),
        (["--epochs"], "--epochs has no value: write --epochs VALUE"),
        (["--epochs", "--seed", "1"], "--epochs has no value: write --epochs VALUE"),
    ],
)
def test_a_command_line_that_is_no_pairs(arguments: list[str], line: str) -> None:
    assert refusal("--config", "base.yaml", *arguments) == line


# One's own classes and functions --------------------------------------------------------------


def test_ones_own_function_from_the_current_directory(folder: Path) -> None:
    (folder / "my_model.py").write_text(
        "from torch import nn\n"
        "def build(width, depth=2):\n"  # not annotated
        "    return nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))\n"
    )
    config = base("--model", "my_model.build", "--model.init_args.width", "3")
    model = call("model", build("model", config.model))
    assert [layer.in_features for layer in model] == [3, 3]
    assert "needs width" in refusal("--config", "base.yaml", "--model", "my_model.build")
    line = refusal("--config", "base.yaml", "--model.class_path", "my_model.build",
                   "--model.init_args.widht", "3")  # fmt: skip
    assert line == (
        "model.init_args: my_model.build has no argument 'widht' (did you mean width?);"
        " it takes width, depth"
    )


def test_arguments_may_be_components_themselves(folder: Path) -> None:
    (folder / "my_model.py").write_text(
        "from torch import nn\ndef build(layers, **options):\n    return nn.Sequential(*layers)\n"
    )
    layer = "{class_path: torch.nn.Linear, init_args: {in_features: 2, out_features: 3}}"
    config = base("--model", "my_model.build", "--model.init_args", f"{{layers: [{layer}], x: 1}}")
    model = call("model", build("model", config.model))
    assert model[0].out_features == 3
    line = refusal("--config", "base.yaml", "--model", "my_model.build", "--model.init_args",
                   "{layers: [{class_path: torch.nn.Linear}]}")  # fmt: skip
    assert line == "model.layers.init_args: torch.nn.Linear needs in_features, out_features"


@pytest.mark.parametrize(
    ("source", "line"),
    [
        (
            "import no_such_module\n",
            r"model: importing my_model failed: ModuleNotFoundError: .*no_s",
        ),
        ("def build(:\n", r"model: importing my_model failed: SyntaxError: .*my_model.py, line 1"),
        ("1 / 0\n", r"model: importing my_model failed: ZeroDivisionError: .* \(my_model.py:1\)"),
        ("builds = 1\n", r"model: my_model has no 'build' \(did you mean builds\?\)"),
    ],
)
def test_ones_own_file_that_cannot_be_imported(folder: Path, source: str, line: str) -> None:
    (folder / "my_model.py").write_text(source)
    assert re.match(line, refusal("--config", "base.yaml", "--model", "my_model.build"))


def test_an_exception_of_ones_own_function_is_one_line_that_says_where(folder: Path) -> None:
    (folder / "my_model.py").write_text("def build():\n    raise KeyError('width\\nfirst')\n")
    config = base("--model", "my_model.build")
    with pytest.raises(ValueError, match=r"^model: KeyError: .* \(my_model.py:2\)$"):
        call("model", build("model", config.model))


def test_a_rule_of_ones_own_and_of_ours(folder: Path) -> None:
    (folder / "my_rule.py").write_text(
        "from headrace.pipeline.rules import Rule\n"
        "class Mine(Rule):\n    def __init__(self, a=1): self.a = a\n"
    )
    config = base("--pipeline.rule", "my_rule.Mine", "--pipeline.rule.init_args.a", "2")
    assert config.pipeline.rule is not None
    assert call("pipeline.rule", build("pipeline.rule", config.pipeline.rule)).a == 2
    assert base("--pipeline.rule", "exact").pipeline.rule == Component("exact", {})


SYNTHETIC = """
pipeline:
  rule:
    class_path: synthetic
    init_args:
      conditional: true
      classes: 10
      synthesizer: {class_path: mlp, init_args: {width: 10}}
      optimizer: {class_path: Adam, init_args: {lr: 1e-2}}
"""


def test_a_rules_own_parts_are_made_when_it_calls_them(folder: Path) -> None:
    (folder / "base.yaml").write_text(BASE.partition("pipeline:")[0] + SYNTHETIC)
    config = base("--pipeline.rule.init_args.lag", "free")
    rule = config.pipeline.rule
    assert isinstance(rule, Component)
    made = call("pipeline.rule", build("pipeline.rule", rule))
    assert isinstance(made, Synthetic) and made.eager
    synthesizer = made._make(torch.Size([5]), torch.Size([5]), None)
    assert isinstance(synthesizer, MLP) and synthesizer.first.linear.out_features == 10
    optimizer = made._optimizer([("w", torch.nn.Parameter(torch.zeros(1)))])
    assert isinstance(optimizer, torch.optim.Adam) and optimizer.defaults["lr"] == 0.01
    (folder / "config.yaml").write_text(to_yaml(config))
    assert parse(["--config", "config.yaml"]) == config


def test_a_synthesizer_by_its_name_alone_or_of_ones_own(folder: Path) -> None:
    (folder / "my_m.py").write_text(
        "import torch\n"
        "class Mine(torch.nn.Module):\n"
        "    def __init__(self, given, wanted, condition, scale=1.0):\n"
        "        super().__init__()\n"
        "        self.scale = scale\n"
    )
    (folder / "base.yaml").write_text(BASE.partition("pipeline:")[0] + SYNTHETIC)
    key = "--pipeline.rule.init_args.synthesizer"
    for text, name, scale in (
        ("convolution", "Convolution", None),
        ("sequence", "Sequence", None),
        ("Linear", "Linear", None),
        ("{class_path: my_m.Mine, init_args: {scale: 3}}", "Mine", 3),
    ):
        rule = base(key, text).pipeline.rule
        assert isinstance(rule, Component)
        make = call("pipeline.rule", build("pipeline.rule", rule))._make
        assert make.func.__name__ == name
        if scale:
            assert make(None, None, None).scale == scale


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("synthesizer", "mpl", "pipeline.rule.synthesizer: no 'mpl' in headrace.pipeline.synth"),
        (
            "synthesizer",
            "{class_path: mlp, init_args: {wide: 3}}",
            "pipeline.rule.synthesizer.init_args: mlp has no argument 'wide' (did you mean width",
        ),
        ("optimizer", "Addam", "pipeline.rule.optimizer: no 'Addam' in torch.optim"),
        (
            "lags",
            "2",
            "pipeline.rule.init_args: synthetic has no argument 'lags' (did you mean lag",
        ),
    ],
)
def test_what_is_wrong_in_a_rules_parts(folder: Path, key: str, value: str, says: str) -> None:
    (folder / "base.yaml").write_text(BASE.partition("pipeline:")[0] + SYNTHETIC)
    said = refusal("--config", "base.yaml", f"--pipeline.rule.init_args.{key}", value)
    assert said.startswith(says)


def test_a_rule_for_each_stage() -> None:
    text = "[synthetic, {class_path: local, init_args: {outputs: 10}}, delayed]"
    config = base("--pipeline.rule", text)
    assert config.pipeline.rule == [
        Component("synthetic", {}),
        Component("local", {"outputs": 10}),
        Component("delayed", {}),
    ]
    assert "rule:\n  - class_path: synthetic\n" in to_yaml(config).replace("    - ", "  - ")
    says = refusal("--config", "base.yaml", "--pipeline.rule", "[synthetic, local]")
    assert says == "pipeline.rule[1].init_args: local needs outputs"


def test_a_scheduler_that_takes_the_number_of_updates_is_given_it() -> None:
    config = base("--scheduler", "cosine_with_warmup")
    assert config.scheduler == Component("cosine_with_warmup", {"total": "total"})
    config = base("--scheduler", "CosineAnnealingLR", "--scheduler.init_args.T_max", "total")
    assert config.scheduler == Component("CosineAnnealingLR", {"T_max": "total"})


# The resolved configuration -------------------------------------------------------------------


@pytest.mark.parametrize("file", ["base.yaml", "digits", "charlm"])
def test_the_resolved_configuration_is_read_back_the_same(folder: Path, file: str) -> None:
    config = parse(["--config", file, "--pipeline.clip_grad_norm", "1e-5", "--name", "no"])
    (folder / "config.yaml").write_text(to_yaml(config))
    assert parse(["--config", "config.yaml"]) == config
    assert to_yaml(parse(["--config", "config.yaml"])) == to_yaml(config)


def test_help_names_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    for key in ("--config", "--epochs", "--model *", "--data.batch_size", "--pipeline.timeout"):
        assert key in shown
    assert max(map(len, shown.splitlines())) <= 120
