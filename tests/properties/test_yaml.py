"""A configuration is a stranger's text until it has been read: one line for what is none."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from headrace.launch import plan, serve, sharpness, simulate, train
from headrace.launch.config import parse, to_yaml
from headrace.launch.strict_yaml import DEEPEST, LONGEST_FILE, MOST_VALUES, dump, load

SOUND = """
stages: 2
model: {class_path: mlp, init_args: {widths: [64, 4, 10]}}
loss: CrossEntropyLoss
optimizer: {class_path: SGD, init_args: {lr: 0.1}}
data: {train: Digits}
"""
ALIASES = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    + [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]" for k in range(1, 10)]
)
MERGES = "\n".join(
    ["a0: &a0 {x: 1}"]
    + [f"a{k}: &a{k} {{<<: [{', '.join([f'*a{k - 1}'] * 10)}]}}" for k in range(1, 10)]
)

HOSTILE: dict[str, tuple[str | bytes, str]] = {
    "a Python call": (
        "model: !!python/object/apply:os.system ['touch RAN']",
        "line 1: the tag !!python/object/apply:os.system: plain values are needed",
    ),
    "a Python object": ("a: !!python/object/new:os.system [x]", "line 1: the tag !!python/object/"),
    "a Python name": ("loss: !!python/name:os.system", "line 1: the tag !!python/name:os.system"),
    "a tag of one's own": ("loss: !mine x", "line 1: the tag !mine: plain values"),
    "a date by its tag": ("name: !!timestamp x", "line 1: the tag !!timestamp: plain values"),
    "a billion laughs": (ALIASES, f"its aliases .* repeat values to more than {MOST_VALUES:,}"),
    "a billion merges": (MERGES, f"its aliases .* repeat values to more than {MOST_VALUES:,}"),
    "an alias of itself": ("a: &a [*a]", "line 1: this holds an alias .* of itself"),
    "a mapping of itself": ("a: &a {b: *a}", "line 1: this holds an alias .* of itself"),
    "an alias of nothing": ("a: *b", "line 1: found undefined alias 'b'"),
    "deep lists": ("[" * 100_000, f"line 1: lists and mappings go more than {DEEPEST} levels deep"),
    "deep mappings": (
        "\n".join(" " * k + "a:" for k in range(99)),
        f"line {DEEPEST + 1}: lists and mappings go more than {DEEPEST} levels deep",
    ),
    "a key twice": ("stages: 1\nstages: 2", "line 2: the key 'stages' is there twice"),
    "a key that is a list": ("{[1]: 2}", "line 1: found unhashable key"),
    "a huge number": ("stages: " + "9" * 5000, r"line 1: '9+\.\.\.9+' is too large for a whole"),
    "a huge hexadecimal": ("stages: 0x" + "f" * 5000, "line 1: .* is too large for a whole number"),
    "a large number": (f"seed: {2**64}", f"line 1: '{2**64}' is too large for a whole number"),
    "a number by its tag": ("epochs: !!int abc", "line 1: 'abc' is no number"),
    "a truth by its tag": ("epochs: !!bool abc", "a value is not what its tag says"),
    "NUL": (b"stages: \x00 1", "unacceptable character #x0000"),
    "Latin": ("name: µ".encode("latin-1"), "byte 6 is no UTF-8: save the file as UTF-8 text"),
    "UTF-16": ("stages: 1".encode("utf-16"), "byte 0 is no UTF-8"),
    "nothing": ("", "a configuration is keys and values, not nothing"),
    "a comment": ("# nothing", "a configuration is keys and values, not nothing"),
    "a list": ("- 1\n- 2", r"a configuration is keys and values, not \[1, 2\]"),
    "a word": ("hello", "a configuration is keys and values, not 'hello'"),
    "two documents": ("a: 1\n---\nb: 2", "line 2: but found another document"),
    "too much": (b"#" * (LONGEST_FILE + 1), f"more than {LONGEST_FILE:,} bytes are no configur"),
    "a merge of a word": ("<<: 3", "line 1: expected a mapping or list of mappings for merging"),
    "a tab": ("a:\n\tb: 1", "line 2: found character '\\\\t' that cannot start any token"),
}
COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": train.main,
    "plan": plan.main,
    "serve": serve.main,
    "simulate": simulate.main,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(
    capsys: pytest.CaptureFixture[str], command: Callable[[list[str]], None], *arguments: str
) -> str:
    """The one line with which a command ends with 2."""
    with pytest.raises(SystemExit) as ended:
        command([*arguments])
    said = capsys.readouterr()
    assert ended.value.code == 2, said.err
    line = said.err.removeprefix("headrace: ").removesuffix("\n")
    assert "\n" not in line and len(line) < 500 and not said.out
    return line


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_and_broken_files(
    folder: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    text, match = HOSTILE[name]
    (folder / "x.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    start = time.monotonic()
    with pytest.raises(ValueError, match=f"^x.yaml: {match}"):
        parse(["--config", "x.yaml"])
    assert time.monotonic() - start < 5
    refusal(capsys, train.main, "--config", "x.yaml")
    assert [path.name for path in folder.iterdir()] == ["x.yaml"], "nothing has run"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses(
    folder: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    more = ["--stages", "2"] if command == "simulate" else []
    (folder / "x.yaml").write_text(HOSTILE["a Python call"][0])  # type: ignore[arg-type]
    line = refusal(capsys, COMMANDS[command], "--config", "x.yaml", *more)
    assert line.startswith("x.yaml: line 1: the tag !!python/object/apply:os.system")
    (folder / "folder").mkdir()
    line = refusal(capsys, COMMANDS[command], "--config", "folder", *more)
    assert line == "folder: Is a directory"
    assert not (folder / "RAN").exists()


def test_sharpness_refuses(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "config.yaml").write_text(HOSTILE["a Python call"][0])  # type: ignore[arg-type]
    (folder / "weights.pt").write_bytes(b"")
    assert "the tag !!python" in refusal(capsys, sharpness.main, "--checkpoint", ".")


def test_an_override_is_named(folder: Path) -> None:
    (folder / "x.yaml").write_text(SOUND)
    with pytest.raises(ValueError, match=r"^--model: line 1: the tag !!python/name:os.system"):
        parse(["--config", "x.yaml", "--model", "!!python/name:os.system"])


def test_merge_keys_and_aliases_of_a_persons_size_are_read() -> None:
    text = "base: &b {lr: 1.0, m: [1, 2]}\nmine: {<<: *b, lr: 2.0}\nagain: *b"
    base = {"lr": 1.0, "m": [1, 2]}
    assert load(text) == {"base": base, "mine": base | {"lr": 2.0}, "again": base}
    assert load(f"seed: {2**64 - 1}") == {"seed": 2**64 - 1}


# Names of what may not be called ------------------------------------------------------------------

TOUCH = "{class_path: subprocess.Popen, init_args: {args: [touch, RAN]}}"
CALLS: dict[str, tuple[tuple[str, str], str]] = {
    "a model": (
        ("{class_path: mlp, init_args: {widths: [64, 4, 10]}}", TOUCH),
        "model: subprocess.Popen is Python's own, and not an nn.Sequential: name one that is",
    ),
    "a model's argument": (
        ("[64, 4, 10]", TOUCH),
        "model.widths: subprocess.Popen is Python's own, and not a class or a function of",
    ),
    "a shell": (
        (
            "{class_path: mlp, init_args: {widths: [64, 4, 10]}}",
            "{class_path: os.system, init_args: {command: touch RAN}}",
        ),
        "model: os.system is Python's own, and not an nn.Sequential",
    ),
    "eval": (
        ("loss: CrossEntropyLoss", "loss: builtins.eval"),
        "loss: builtins.eval is Python's own, and not a loss",
    ),
    "by a detour": (
        ("loss: CrossEntropyLoss", "loss: torch.os.system"),
        "loss: torch.os.system is Python's own, and not a loss",
    ),
    "an optimizer": (
        ("class_path: SGD", "class_path: shutil.rmtree"),
        "optimizer: shutil.rmtree is Python's own, and not an optimizer",
    ),
    "a dataset": (
        ("train: Digits", f"train: {TOUCH}"),
        "data.train: subprocess.Popen is Python's own, and not a dataset",
    ),
    "a rule": (
        ("stages: 2", f"pipeline: {{rule: {TOUCH}}}"),
        "pipeline.rule: subprocess.Popen is Python's own, and not a rule",
    ),
    "a correction": (
        ("stages: 2", f"pipeline: {{corrections: [{TOUCH}]}}"),
        r"pipeline.corrections\[0\]: subprocess.Popen is Python's own, and not a correction",
    ),
    "a way of sharing": (
        ("stages: 2", f"pipeline: {{replicas: {TOUCH}}}"),
        "pipeline.replicas: subprocess.Popen is Python's own, and not a way of sharing weights",
    ),
    "a growth": (
        ("stages: 2", f"pipeline: {{batch_size: {TOUCH}}}"),
        "pipeline.batch_size: subprocess.Popen is Python's own, and not a growth of the batch",
    ),
    "a metric": (
        ("stages: 2", "metrics: [os.system]"),
        "metrics: os.system is Python's own, and not a metric",
    ),
    "a layer for an optimizer": (
        ("{class_path: SGD, init_args: {lr: 0.1}}", "torch.nn.Flatten"),
        "optimizer: torch.nn.Flatten is the class of something else than an optimizer",
    ),
    "an optimizer for a model": (
        ("{class_path: mlp, init_args: {widths: [64, 4, 10]}}", "torch.optim.SGD"),
        "model: torch.optim.SGD is the class of something else than an nn.Sequential",
    ),
    "a loader's own class for a loss": (
        ("CrossEntropyLoss", "headrace.launch.data.Digits"),
        "loss: headrace.launch.data.Digits is the class of something else than a loss",
    ),
    "a module": (("CrossEntropyLoss", "torch.nn.functional"), "loss: .* is a module; a class or a"),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_is_plainly_something_else_is_not_called(
    folder: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (old, new), match = CALLS[name]
    assert old in SOUND
    (folder / "x.yaml").write_text(SOUND.replace(old, new))
    with pytest.raises(ValueError, match=f"^{match}"):
        parse(["--config", "x.yaml"])
    refusal(capsys, train.main, "--config", "x.yaml")
    assert [path.name for path in folder.iterdir()] == ["x.yaml"], "nothing has run"


def test_a_function_that_gives_no_model_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "seven.py").write_text("def model():\n    return 7\n")
    (folder / "x.yaml").write_text(SOUND)
    line = refusal(capsys, train.main, "--config", "x.yaml", "--model.class_path", "seven.model")
    assert line == "model gave 7, and must give an nn.Sequential"


# Any text -----------------------------------------------------------------------------------------

fragments = st.lists(
    st.sampled_from(
        ["model", "stages", "data", ": ", "\n", "  ", "- ", "[", "]", "{", "}", "&a ", "*a", "!!",
         "!!int ", "!!bool ", "!!float ", "!!null ", "!!str ", "!!seq ", "!!map ", "!!python/x ",
         "<<: ", "1", "1e3", ".nan", "~", "'", '"', "\\", "|", ">", "?", "%YAML 1.2\n", "---\n",
         "...", "#", "@", "`", "class_path", "init_args", "mlp", "train", "pipeline", "\t", "\r"]
    ),
    max_size=25,
).map("".join)  # fmt: skip


@given(st.text(max_size=60) | fragments)
@example("!!map 3")
@example("!!seq x")
@example("!!float {}")
@example("- !!int ''")
@example("? !!map 3\n: 1")
@example("{? {}}")
def test_any_text_is_read_or_refused_in_one_line(text: str) -> None:
    try:
        value = load(text)
    except ValueError as error:
        assert str(error) and "\n" not in str(error)
    else:
        again = load(dump(value))
        assert again == value or repr(again) == repr(value)


@given(st.binary(max_size=80) | fragments.map(str.encode))
def test_any_file_gives_a_configuration_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(SOUND.encode() + data)
    try:
        config = parse(["--config", str(path)])
    except ValueError as error:
        assert str(error) and "\n" not in str(error)
    else:
        assert yaml.safe_load(to_yaml(config))["stages"] == config.stages
