"""What a key's class or function must be: what is plainly something else is refused, not called.

This is no fence. A configuration names code, so it can run any that can be imported: treat one like
a script (docs/security.md).
"""

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from headrace.pipeline.batch_size import Growth
from headrace.pipeline.corrections import Correction
from headrace.pipeline.replicas import Replicas
from headrace.pipeline.rules import Rule

__all__ = ["check_kind", "check_result", "is_one"]

_KINDS: dict[str, tuple[type, str]] = {
    "model": (nn.Module, "an nn.Sequential"),
    "optimizer": (torch.optim.Optimizer, "an optimizer"),
    "scheduler": (torch.optim.lr_scheduler.LRScheduler, "a scheduler of learning rates"),
    "pipeline.rule": (Rule, "a rule"),
    "pipeline.corrections": (Correction, "a correction"),
    "pipeline.replicas": (Replicas, "a way of sharing weights"),
    "pipeline.batch_size": (Growth, "a growth of the batch"),
}

_DOES: dict[str, tuple[tuple[str, ...], str]] = {
    "loss": (("__call__",), "a loss (output, target) -> number"),
    "data.train": (("__getitem__", "__iter__"), "a dataset of (input, target) pairs"),
    "data.test": (("__getitem__", "__iter__"), "a dataset of (input, target) pairs"),
    "metrics": (("__call__",), "a metric (output, target) -> mean"),
}

# Whose classes may be arguments of a user's own: paths, ranges, partial functions …
_PLAIN = {"collections", "datetime", "decimal", "fractions", "functools", "math", "pathlib", "re"}


def check_kind(key: str, place: str, class_path: str, target: Any) -> Callable[..., Any]:
    """What `class_path` names, if it may be what the key needs.

    Args:
        place: the key without the numbers of list items.

    Raises:
        ValueError: it is something else.
    """
    kind, needs = _KINDS.get(place, (object, ""))
    methods, does = _DOES.get(place, ((), ""))
    needed = needs or does or "a class or a function of a model, its data or its training"
    if not callable(target):
        raise ValueError(
            f"{key}: {class_path} is a {type(target).__name__}; a class or a function is needed"
        )
    named = inspect.isclass(target) or inspect.isroutine(target)
    home = (getattr(target, "__module__", None) or "").partition(".")[0]
    harmless = not (needs or does) and (
        home.removeprefix("_") in _PLAIN or (home == "builtins" and inspect.isclass(target))
    )
    if named and home in sys.stdlib_module_names and not harmless:
        raise ValueError(f"{key}: {class_path} is Python's own, and not {needed}: name one that is")
    if inspect.isclass(target):
        able = not methods or bool(_attributes(target) & set(methods))
        if not issubclass(target, kind) or not able:
            raise ValueError(f"{key}: {class_path} is the class of something else than {needed}")
    return target  # type: ignore[no-any-return]


def _attributes(cls: type) -> set[str]:
    """What its objects have; every class itself can be called."""
    return {name for each in cls.__mro__ for name in vars(each)}


def is_one(place: str, target: Any) -> bool:
    """Whether it is worth naming to who looks for what the key needs: a function of ours, or a
    class that is more than the one that all others are made of.
    """
    kind, _ = _KINDS.get(place, (object, ""))
    if inspect.isfunction(target):
        return target.__module__.startswith("headrace.")
    if place == "model":
        kind = nn.Sequential
    return inspect.isclass(target) and issubclass(target, kind) and target is not kind


def check_result(key: str, place: str, result: Any) -> Any:
    """What a component of this key gave, if it is what it must be.

    Raises:
        ValueError: it is something else.
    """
    kind, needs = _KINDS.get(place, (object, ""))
    if not isinstance(result, kind):
        text = " ".join(repr(result).split())[:60]
        raise ValueError(f"{key} gave {text}, and must give {needs}")
    return result
