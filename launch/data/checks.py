"""Early refusals, and errors that say where a file or a package comes from."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

__all__ = ["check_one_of", "check_positive", "find_file", "import_extra"]


def check_one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    """Raise ValueError unless the argument `name` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: give one of {', '.join(allowed)}")


def check_positive(**sizes: int) -> None:
    """Raise ValueError, by name, for the first of `sizes` that is not a whole number above 0."""
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r}: give a whole number of at least 1")


def find_file(candidates: Sequence[Path], advice: str) -> Path:
    """The first of `candidates` that exists; FileNotFoundError, ending in `advice`, if none."""
    for path in candidates:
        if path.is_file():
            return path
    raise FileNotFoundError(f"there is no file {candidates[0].absolute()}. {advice}")


def import_extra(module: str, *, extra: str, user: str) -> Any:
    """Import an optional package's `module`.

    Raises:
        ModuleNotFoundError: it is not installed; says which of Headrace's extras brings it.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise  # the package is there, and something it needs is not
        raise ModuleNotFoundError(
            f"{user} needs a package that is not installed: pip install 'headrace[{extra}]'",
            name=error.name,
        ) from error
