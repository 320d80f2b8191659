"""Write what a diagnosis advises into a copy of a YAML file, its comments kept."""

from collections.abc import Mapping
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
    yaml.width = 100
    tree = yaml.load(source.read_text(encoding="utf-8"))
    for key, value in fixes.items():
        *parents, name = key.split(".")
        place = tree
        for parent in parents:
            if not isinstance(place.get(parent), dict):
                place[parent] = {}
            place = place[parent]
        place[name] = value
    with target.open("x", encoding="utf-8") as file:
        yaml.dump(tree, file)
