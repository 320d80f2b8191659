"""Write what a diagnosis advises into a copy of a YAML file, its comments kept."""

from collections.abc import Mapping
from copy import copy
from pathlib import Path
from typing import Any

from ..data.checks import import_extra

__all__ = ["write_fixed"]


def write_fixed(source: Path, fixes: Mapping[str, Any], target: Path) -> None:
    """Copy a configuration with some keys set.

    Args:
        fixes: values by dotted key.

    Raises:
        ValueError: the target exists: nobody's file is written over.
        ImportError: ruamel.yaml is not installed.
    """
    if target.exists():
        raise ValueError(f"{target} exists: give another name, or move it away")
    yaml = import_extra("ruamel.yaml", extra="profile", user="--fix").YAML()
    yaml.preserve_quotes = True
    yaml.width = 1 << 20  # no line is broken
    yaml.default_flow_style = None  # a new list is one line
    tree = yaml.load(source.read_text(encoding="utf-8"))
    for key, value in fixes.items():
        *parents, name = key.split(".")
        place = tree
        for parent in parents:
            held = place.get(parent)
            if not isinstance(held, dict):
                _set(place, parent, type(place)())
                place[parent].fa.set_flow_style()
                if isinstance(held, str):  # `optimizer: SGD`, and now one of its arguments
                    place[parent]["class_path"] = held
            place = place[parent]
        _set(place, name, value)
    with target.open("x", encoding="utf-8") as file:
        yaml.dump(tree, file)


def _set(place: Any, key: str, value: Any) -> None:
    """Set a key; comments below what was there stay below it."""
    below = _take_comments(place.get(key, place))
    place[key] = value
    if below is not None:
        tokens = place.ca.items.setdefault(key, [None] * 4)
        if tokens[2] is None:
            tokens[2] = below
        else:
            tokens[2].value += below.value.removeprefix("\n")


def _take_comments(node: Any) -> Any:
    """Take from a block what comes after its last line; None if there is nothing.

    ruamel.yaml keeps it with the innermost value of that line, after the comment on the line.
    """
    tokens: Any = None
    while hasattr(node, "fa") and node and not node.fa.flow_style():
        last = [*node][-1] if isinstance(node, dict) else len(node) - 1
        tokens, node = node.ca.items.get(last), node[last]
    token = next((token for token in tokens or () if hasattr(token, "value")), None)
    if token is None:
        return None
    below = copy(token)
    own, newline, rest = token.value.partition("\n")
    token.value, below.value = own + newline, newline + rest
    return below
