"""The configuration: its keys, their types and meanings, and how it is read.

A YAML file, then `--dotted.key value` on the command line. jsonargparse checks and converts the
plain values and prints the help; what names a class or a function is checked in components.py,
because it may be anybody's, annotated or not.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args, get_origin, get_type_hints

import torch
from jsonargparse import ArgumentError, ArgumentParser

from .components import Component, check, did_you_mean, find
from .strict_yaml import dump, load, load_file, shorten

__all__ = [
    "Config",
    "Data",
    "PipelineOptions",
    "find_file",
    "parse",
    "parse_text",
    "read_overrides",
    "to_yaml",
]

_OWN = Path(__file__).with_name("configs")


@dataclass(frozen=True, kw_only=True)
class Data:
    """What is read, and how it is cut into mini-batches."""

    train: Annotated[Component, "dataset of (input, target) pairs to train on"]
    test: Annotated[Component | None, "dataset to evaluate on"] = None
    batch_size: Annotated[int, "samples in a mini-batch"] = 32
    shuffle: Annotated[bool, "a new order of the training data every epoch, from the seed"] = True
    drop_last: Annotated[bool, "leave out a last, smaller mini-batch of training data"] = False
    workers: Annotated[int, "processes that load data, beside the first stage's own"] = 0


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """What is saved of a run while it goes on, and what it begins from."""

    every: Annotated[
        int | Literal["epoch"] | None, "mini-batches between two, or epoch; null: none are made"
    ] = None
    keep: Annotated[int, "how many are kept, in runs/NAME/checkpoints"] = 2
    resume: Annotated[
        str | None, "auto: go on with the run NAME if it was stopped; or a checkpoint"
    ] = None


MOST_THREADS = 1024
"""No processor has more; of a hundred million torch dies by a signal."""

Schedule = Literal["gpipe", "1f1b", "stream"]
Balance = Literal["time", "parameters"] | list[str | int]


@dataclass(frozen=True, kw_only=True)
class PipelineOptions:
    """How the stages work together: the arguments of `headrace.pipeline.Pipeline`."""

    schedule: Annotated[Schedule, "gpipe, 1f1b: both exact; stream: never flushes"] = "stream"
    rule: Annotated[
        Component | list[Component] | None,
        "delayed, synthetic, local, exact; or a list; null: delayed, or exact",
    ] = None
    corrections: Annotated[
        list[Component], "what to do about staleness, in order: auto, weight_prediction, …"
    ] = field(default_factory=list)
    replicas: Annotated[
        Component | None, "copies of the pipeline: allreduce, hogwild, downpour, elastic"
    ] = None
    balance: Annotated[Balance, "how layers are cut: by a cost, layer counts, or first names"] = (
        "time"
    )
    slack: Annotated[
        int | list[int] | Literal["auto"], "more in flight per hop, to hide slow hops: one or each"
    ] = 0
    micro_batches: Annotated[int, "a mini-batch is cut into this many"] = 1
    update_every: Annotated[int, "micro-batches (stream) or mini-batches (others) per update"] = 1
    batch_size: Annotated[
        Component | None, "or samples per update, growing: steps, geometric, variance_test"
    ] = None
    clip_grad_norm: Annotated[float | None, "the largest norm of a gradient"] = None
    autocast: Annotated[Literal["bfloat16", "float16"] | None, "compute in this precision"] = None
    compile: Annotated[bool | dict[str, Any], "torch.compile every stage; or its arguments"] = False
    device: Annotated[str | None, "null: a GPU for every stage if there are enough, or CPU"] = None
    on_nonfinite: Annotated[Literal["stop", "skip"], "what a NaN or an infinity does"] = "stop"
    timeout: Annotated[
        tuple[float, float], "seconds without a sign of life: until the first update, and after"
    ] = (300.0, 60.0)
    check_stability: Annotated[
        int, "before training: products with the Hessian for the curvature; 0: none"
    ] = 0


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run."""

    name: Annotated[str, "of the run, which writes into runs/NAME; default: the file's"] = "run"
    seed: Annotated[int, "of the first weights, dropout, and the order of the data"] = 0
    stages: Annotated[int | None, "null: as many as torchrun started processes, or 1"] = None
    epochs: Annotated[int, "passes over the training data"] = 1
    threads: Annotated[int | None, "torch threads of every process; null: torch decides"] = None
    log_every: Annotated[int, "micro-batches between two lines of metrics.jsonl"] = 50
    model: Annotated[Component, "gives an nn.Sequential"]
    loss: Annotated[Component, "a class of losses, or a function (output, target) -> loss"]
    optimizer: Annotated[Component, "called with each stage's (name, parameter) pairs"]
    scheduler: Annotated[
        Component | None, "of learning rates, stepped every update; `total` is the number of them"
    ] = None
    metrics: Annotated[list[str], "functions (output, target) -> mean over the samples"] = field(
        default_factory=list
    )
    data: Data
    pipeline: PipelineOptions = field(default_factory=PipelineOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)

    def __post_init__(self) -> None:
        at_least = {"epochs": 1, "log_every": 1, "stages": 1, "threads": 1, "seed": 0}
        at_least |= {"checkpoint.every": 1, "checkpoint.keep": 1}
        at_least |= {"data.batch_size": 1, "data.workers": 0, "pipeline.check_stability": 0}
        for key, least in at_least.items():
            value = self
            for part in key.split("."):
                value = getattr(value, part)
            if isinstance(value, int) and value < least:
                raise ValueError(f"{key} must be at least {least}, not {value}")
        if self.threads is not None and self.threads > MOST_THREADS:
            raise ValueError(f"threads must be at most {MOST_THREADS}, not {self.threads}")
        if self.checkpoint.resume == "":
            raise ValueError("checkpoint.resume is '': write auto, a checkpoint's folder, or null")
        plain = self.name == Path(self.name).name and self.name.isprintable()
        if not plain or self.name.startswith(".") or len(self.name) > 200:
            raise ValueError(f"name must be a plain folder name, not {shorten(self.name)}")


def parse(arguments: Sequence[str]) -> Config:
    """Read `--config FILE` and the overrides after it, check every key and value.

    Nothing that the configuration names is called. `--help` prints and exits.

    Raises:
        ValueError: in one line, naming the file or the key, and what to write.
    """
    if {"-h", "--help"} & set(arguments):
        print(_help())
        raise SystemExit(0)
    overrides = list(read_overrides(arguments))
    file = next((value for key, value in overrides if key == "config"), None)
    tree: dict[str, Any] = {}
    if file is not None:
        path = find_file(file)
        tree = _check_tree(load_file(path), str(path))
        tree.setdefault("name", path.stem)
    return _make(tree, [(key, value) for key, value in overrides if key != "config"])


def parse_text(text: str, where: str, arguments: Sequence[str] = ()) -> Config:
    """Read what `to_yaml` wrote, and the overrides after it, as `parse` does.

    Args:
        where: the text is from, for messages.

    Raises:
        ValueError: in one line, naming the key, and what to write.
    """
    try:
        tree = load(text)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return _make(_check_tree(tree, where), list(read_overrides(arguments)))


def _check_tree(tree: Any, where: str) -> dict[str, Any]:
    if not isinstance(tree, dict):
        what = "nothing" if tree is None else shorten(tree)
        raise ValueError(f"{where}: a configuration is keys and values, not {what}")
    return tree


def _make(tree: dict[str, Any], overrides: list[tuple[str, str]]) -> Config:
    """The configuration of a file's tree and what the command line changes in it."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    # A class_path goes first: it drops the arguments of the one in the file.
    for key, value in sorted(overrides, key=lambda item: not item[0].endswith(".class_path")):
        _assign(tree, key, _value(key, value))
    config: Config = _build(Config, tree)
    for metric in config.metrics:
        find("metrics", metric)
    _check_device(config.pipeline.device)
    return config


def _check_device(name: str | None) -> None:
    try:
        torch.device(name or "cpu")
    except RuntimeError:
        raise ValueError(
            f"pipeline.device is {shorten(name)}: write cpu, cuda, or cuda:0 for a certain GPU"
        ) from None


def to_yaml(config: Config) -> str:
    """The configuration with every default written out; `parse` reads it back the same."""
    return dump(_tree(config))


def _tree(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _tree(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return [_tree(each) for each in value] if isinstance(value, list | tuple) else value


# The command line ---------------------------------------------------------------------------


def read_overrides(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Keys and values of a command line.

    Raises:
        ValueError: something in it is neither.
    """
    remaining = iter(arguments)
    for argument in remaining:
        if not argument.startswith("--") or argument == "--":
            raise ValueError(
                f"{argument!r} on the command line: write --config FILE or --key value"
            )
        key, equals, value = argument[2:].partition("=")
        if not equals:
            value = next(remaining, "--")
            if value.startswith("--"):
                raise ValueError(f"--{key} has no value: write --{key} VALUE")
        yield key, value


def _value(key: str, text: str) -> Any:
    try:
        return load(text)
    except ValueError as error:
        raise ValueError(f"--{key}: {error}") from None


def _assign(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    node = tree
    for parent in parents:
        child = node.get(parent)
        if isinstance(child, str):  # `loss: MSELoss`, and now one of its arguments
            child = {"class_path": child}
        node[parent] = child = dict(child) if isinstance(child, dict) else {}
        node = child
    if last == "class_path" and node.get(last) != value:
        node.pop("init_args", None)
    node[last] = value


def find_file(name: str) -> Path:
    """The file, or the one of Headrace's own of that name (`--config digits`)."""
    own = {path.stem: path for path in sorted(_OWN.glob("*.yaml"))}
    path = Path(name)
    if not path.exists() and name not in own:
        raise ValueError(f"--config {name}: no such file (Headrace brings {', '.join(own)})")
    return path if path.exists() else own[name]


# Keys ---------------------------------------------------------------------------------------


def _is_component(annotation: Any) -> bool:
    return Component in (annotation, *get_args(annotation))  # a list's are its items'


def _components(key: str, given: Any, annotation: Any) -> Component | list[Component] | None:
    """One, or where a list may stand one of each item."""
    if annotation == list[Component] and not isinstance(given, list):
        given = [] if given is None else [given]
    if isinstance(given, list) and list[Component] in (annotation, *get_args(annotation)):
        return [
            cast(Component, _component(f"{key}[{k}]", each, Component))
            for k, each in enumerate(given)
        ]
    return _component(key, given, annotation)


def _build(cls: Any, tree: Any, prefix: str = "") -> Any:
    """The dataclass `cls` from its part of the tree, every key and value checked."""
    if not isinstance(tree, dict):
        raise ValueError(f"{prefix[:-1]} holds keys and values, not {shorten(tree)}")
    annotations = get_type_hints(cls)
    for name in tree:
        if name not in annotations:
            raise ValueError(
                f"unknown key {prefix}{name}{did_you_mean(name, annotations)};"
                f" {prefix[:-1] or 'a configuration'} has {', '.join(annotations)}"
            )
    values = {}
    for each in dataclasses.fields(cls):
        key, annotation, given = prefix + each.name, annotations[each.name], tree.get(each.name)
        if _is_component(annotation):
            values[each.name] = _components(key, given, annotation)
        elif dataclasses.is_dataclass(annotation):
            values[each.name] = _build(annotation, given or {}, f"{key}.")
        elif each.name in tree:
            values[each.name] = _convert(key, given, annotation)
    return cls(**values)


def _component(key: str, given: Any, annotation: Any) -> Component | None:
    """From `{class_path, init_args}`, or the class_path alone."""
    if given is None and annotation is not Component:
        return None
    if given is None:
        raise ValueError(f"{key} is missing: write {key}: NAME, or its class_path and init_args")
    tree = {"class_path": given} if isinstance(given, str) else given
    if not isinstance(tree, dict):
        raise ValueError(f"{key} is a name, or class_path and init_args, not {shorten(given)}")
    for name in tree:
        if name not in (known := ("class_path", "init_args")):
            near = did_you_mean(name, known)
            raise ValueError(f"unknown key {key}.{name}{near}; {key} has {', '.join(known)}")
    path, arguments = tree.get("class_path"), tree.get("init_args") or {}
    if not isinstance(path, str):
        raise ValueError(f"{key}.class_path must be a name or an import path, not {shorten(path)}")
    if not isinstance(arguments, dict) or not all(isinstance(name, str) for name in arguments):
        raise ValueError(f"{key}.init_args must be names and values, not {shorten(arguments)}")
    return check(key, Component(path, arguments))


# Plain values: jsonargparse ------------------------------------------------------------------


def _convert(key: str, value: Any, annotation: Any) -> Any:
    """The value as the type it is annotated with: `"1e-3"` as a number, a list as a tuple."""
    parser = ArgumentParser(exit_on_error=False, default_env=False)
    parser.add_argument("--value", type=annotation)
    try:
        if value is None and type(None) not in get_args(annotation):
            raise ArgumentError(None, "null")
        return parser.parse_object({"value": value}).value
    except ArgumentError:
        shown = "null" if value is None else shorten(value)
        raise ValueError(f"{key} must be {_in_words(annotation)}, not {shown}") from None


def _in_words(annotation: Any) -> str:
    """A type for a person to read: `int | None` is "a whole number, or null"."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    words |= {type(None): "null", Any: "anything"}
    parts, origin = get_args(annotation), get_origin(annotation)
    if origin is Literal:
        return ", or ".join(parts)
    if origin is list:
        many = {int: "whole numbers", float: "numbers", str: "names"}
        return "a list of " + " or ".join(many[kind] for kind in get_args(parts[0]) or parts)
    if origin is tuple:
        return f"a list of {len(parts)} numbers"
    if origin is dict:
        return "names and values"
    return ", or ".join(map(_in_words, parts)) if parts else words[annotation]


# Help ------------------------------------------------------------------------------------------

_USAGE = """\
python -m headrace.launch.train --config FILE [--KEY VALUE ...]
python -m headrace.launch.plan --config FILE [--KEY VALUE ...]
python -m headrace.launch.simulate --config FILE --stages N,N,... [--KEY VALUE ...]

Keys go into the YAML file; on the command line they are dotted, and win over the file.
A key marked * names a class or a function: one of ours, or an import path. Its arguments are
--KEY.init_args.ARGUMENT VALUE, or class_path and init_args in the file.
"""


def _help() -> str:
    lines = [f"  --{key:<28} {default:<14} {text}" for key, default, text in _help_rows(Config, "")]
    head = f"  {'key':<30} {'default':<14} meaning"
    return "\n".join([_USAGE, head, *lines])


def _help_rows(cls: Any, prefix: str) -> Iterator[tuple[str, str, str]]:
    plain, described = get_type_hints(cls), get_type_hints(cls, include_extras=True)
    for each in dataclasses.fields(cls):
        key, annotation = f"{prefix}{each.name}", plain[each.name]
        if dataclasses.is_dataclass(annotation) and annotation is not Component:
            yield from _help_rows(annotation, f"{key}.")
            continue
        required = each.default is each.default_factory is dataclasses.MISSING
        default = [] if each.default is dataclasses.MISSING else each.default
        shown = "required" if required else json.dumps(default).strip('"')
        star = " *" if _is_component(annotation) or key == "metrics" else ""
        yield key + star, shown, described[each.name].__metadata__[0]
