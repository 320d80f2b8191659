"""The engine's errors name its Python arguments; a configuration has the same things as keys."""

import re

__all__ = ["in_yaml"]

# Arguments of `Pipeline` that are keys, and how one of the objects of Headrace's is written there.
_OPTIONS = (
    "schedule|rule|corrections|replicas|balance|slack|micro_batches|update_every|batch_size"
    "|clip_grad_norm|autocast|compile|device|on_nonfinite|timeout"
)
_KEYS = {"stages": "stages", "seed": "seed", "loss_fn": "loss"}
_KEYS |= {name: name for name in ("optimizer", "scheduler", "beside", "address")}
_KEYS |= {name: f"pipeline.{name}" for name in _OPTIONS.split("|")}

_WORDS = {"None": "null", "True": "true", "False": "false"}

_IMPORT = re.compile(r",? with from headrace\.[\w.]+ import \w+")
_CALL = re.compile(
    r"\b(Delayed|Exact|Synthetic|Local|Allreduce|Hogwild|Downpour|Elastic)\(([^()]*)\)"
)
_ARGUMENT = re.compile(rf"(?<![\w.])({'|'.join(_KEYS)})=(?=(\S)?)")
# "slack=-1: give …": what is wrong comes first, by its value.
_VALUE = r"(?:\[[^\]]*\]|\([^)]*\)|'[^']*'|[^\s:]+)"
_FIRST = re.compile(rf"(?:^|(?<=: ))({'|'.join(_KEYS)})=(?={_VALUE}: (?:give|write|torch) )")


def in_yaml(text: str) -> str:
    """An error's text with keys for arguments: "rule=Exact()" is "pipeline.rule: exact"."""
    text = _CALL.sub(_component, _IMPORT.sub("", text))
    text = _FIRST.sub(lambda found: f"{_KEYS[found[1]]} is ", text)
    text = _ARGUMENT.sub(_key, text)
    return re.sub(r"\b(None|True|False)\b", lambda found: _WORDS[found[0]], text)


def _component(found: re.Match[str]) -> str:
    name, arguments = found[1].lower(), found[2].replace("'", "")
    if arguments in ("", "…"):
        return name
    first = "weights" if name == "delayed" else "count"
    each = [part.strip() for part in arguments.split(",")]
    pairs = ", ".join(p.replace("=", ": ", 1) if "=" in p else f"{first}: {p}" for p in each)
    return f"{{class_path: {name}, init_args: {{{pairs}}}}}"


def _key(found: re.Match[str]) -> str:
    # "micro_batches=4" has a value behind it, "micro_batches= larger" has none.
    return f"{_KEYS[found[1]]}{': ' if found[2] not in (None, *' :;,.') else ''}"
