"""The engine's errors and warnings name its Python arguments, which a configuration has as keys."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import headrace.pipeline
from headrace.pipeline.errors import told_in

__all__ = ["engine_in_yaml", "in_yaml"]

_ENGINE = str(Path(headrace.pipeline.__file__).parent)

# Arguments of `Pipeline` that are keys, and how one of the objects of Headrace's is written there.
_OPTIONS = (
    "schedule|rule|corrections|replicas|balance|slack|micro_batches|update_every|batch_size"
    "|clip_grad_norm|autocast|compile|device|on_nonfinite|timeout"
)
_KEYS = {"stages": "stages", "seed": "seed", "loss_fn": "loss"}
_KEYS |= {name: name for name in ("optimizer", "scheduler", "beside", "address")}
_KEYS |= {name: f"pipeline.{name}" for name in _OPTIONS.split("|")}

_WORDS = {"None": "null", "True": "true", "False": "false"}
_WORD = re.compile(r"(?<![\w./\\-])(None|True|False)(?![\w/\\-]|\.\w)")  # no part of a path

_IMPORT = re.compile(r",? with from headrace\.[\w.]+ import \w+")
_CALL = re.compile(
    r"\b(Delayed|Exact|Synthetic|Local|Allreduce|Hogwild|Downpour|Elastic|LearningRate)"
    r"\(([^()]*)\)"
)
_ARGUMENT = re.compile(rf"(?<![\w./])({'|'.join(_KEYS)})=(?=(\S)?)")
_FIRST_ARGUMENT = {"delayed": "weights", "learning_rate": "factor"}
# "slack=-1: give …": what is wrong comes first, by its value.
_VALUE = r"(?:\[[^\]]*\]|\([^)]*\)|'[^']*'|[^\s:]+)"
_FIRST = re.compile(rf"(?:^|(?<=: ))({'|'.join(_KEYS)})=(?={_VALUE}: (?:give|write|torch) )")


def in_yaml(text: str) -> str:
    """What an error or a warning says with keys for arguments: "rule=Exact()" is
    "pipeline.rule: exact".
    """
    text = _CALL.sub(_component, _IMPORT.sub("", text))
    text = _FIRST.sub(lambda found: f"{_KEYS[found[1]]} is ", text)
    text = _ARGUMENT.sub(_key, text)
    return _WORD.sub(lambda found: _WORDS[found[0]], text)


@contextmanager
def engine_in_yaml() -> Iterator[None]:
    """Within a block, or a function that it decorates, the engine's errors and warnings are a line
    in a configuration's words; those of others are as they were.
    """
    plain = warnings.formatwarning

    def say(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        line: str | None = None,
    ) -> str:
        if filename.startswith(_ENGINE):
            return f"headrace: warning: {in_yaml(str(message))}\n"
        return plain(message, category, filename, lineno, line)

    warnings.formatwarning = say
    try:
        with told_in(in_yaml):
            yield
    finally:
        warnings.formatwarning = plain


def _file(name: str) -> str:
    """The file of a class of Headrace's, which is its name in a configuration."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def _component(found: re.Match[str]) -> str:
    name, arguments = _file(found[1]), found[2].replace("'", "")
    if arguments in ("", "…"):
        return name
    first = _FIRST_ARGUMENT.get(name, "count")
    each = [part.strip() for part in arguments.split(",")]
    pairs = ", ".join(p.replace("=", ": ", 1) if "=" in p else f"{first}: {p}" for p in each)
    return f"{{class_path: {name}, init_args: {{{pairs}}}}}"


def _key(found: re.Match[str]) -> str:
    # "micro_batches=4" has a value behind it, "micro_batches= larger" has none.
    return f"{_KEYS[found[1]]}{': ' if found[2] not in (None, *' :;,.') else ''}"
