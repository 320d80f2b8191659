"""Import paths to objects: `class_path` and `init_args`, checked against the signature."""

import difflib
import importlib
import inspect
import os
import pkgutil
import re
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any

from .expected import check_kind, check_result, is_one

__all__ = ["HOMES", "Component", "build", "call", "check", "did_you_mean", "find"]

# Where a name without a dot is looked up, by configuration key.
HOMES: dict[str, tuple[str, ...]] = {
    "model": ("headrace.models",),
    "loss": ("torch.nn", "headrace.models", "torch.nn.functional"),
    "optimizer": ("headrace.launch.optimizers", "torch.optim"),
    "scheduler": ("headrace.launch.schedulers", "torch.optim.lr_scheduler"),
    "data.train": ("headrace.launch.data",),
    "data.test": ("headrace.launch.data",),
    "metrics": ("headrace.launch.metrics",),
    "pipeline.rule": ("headrace.pipeline.rules",),
    "pipeline.rule.synthesizer": ("headrace.pipeline.synthesizers",),
    "pipeline.rule.input_synthesizer": ("headrace.pipeline.synthesizers",),
    "pipeline.rule.optimizer": ("torch.optim",),
    "pipeline.corrections": ("headrace.pipeline.corrections",),
    "pipeline.corrections.factor": ("headrace.pipeline.corrections.learning_rate",),
    "pipeline.replicas": ("headrace.pipeline.replicas",),
    "pipeline.batch_size": ("headrace.pipeline.batch_size",),
}

# What a rule or correction calls itself: how many arguments it gives (shapes, parameters, …).
DEFERRED = {
    "pipeline.rule.synthesizer": 3,
    "pipeline.rule.input_synthesizer": 3,
    "pipeline.rule.optimizer": 1,
    "pipeline.rule.head": 2,
    "pipeline.corrections.factor": 1,
}


@dataclass(frozen=True)
class Component:
    """A class or function by import path, and the keyword arguments it is called with."""

    class_path: str
    init_args: dict[str, Any] = field(default_factory=dict)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The nearest known names as a question in parentheses, or nothing."""
    near = difflib.get_close_matches(str(name), list(known), n=2)
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def find(key: str, class_path: str) -> Callable[..., Any]:
    """The class or function that `class_path` names for the configuration key `key`.

    Raises:
        ValueError: nothing has that name that may be what the key needs; the line says what was
            looked for, and where.
    """
    target = _import(key, class_path) if "." in class_path else _short(key, class_path)
    return check_kind(key, _place(key), class_path, target)


def _short(key: str, name: str) -> Any:
    homes = [importlib.import_module(home) for home in HOMES.get(_place(key), ())]
    if key.startswith("pipeline.") and homes:
        found = _in_own_file(homes[0], name)
        if found is not None:
            return found
    for home in homes:
        found = getattr(home, name, None)
        if found is not None and not isinstance(found, ModuleType):
            return found
    known = _known(key, homes)
    has = f", which has {', '.join(known)}" if 0 < len(known) <= 20 else ""
    where = f" in {' or '.join(HOMES[_place(key)])}" if homes else ""
    near = did_you_mean(name, known)
    raise ValueError(f"{key}: no {name!r}{where}{has}{near}; your own is written module.name")


def _known(key: str, homes: list[ModuleType]) -> list[str]:
    """The names that may be written: those of files, where a file is a thing and its name."""
    if key.startswith("pipeline.") and homes and hasattr(homes[0], "__path__"):
        files = [each.name for each in pkgutil.iter_modules(homes[0].__path__)]
        able = [name for name in files if is_one(_place(key), _in_own_file(homes[0], name))]
        if able:
            return able
    place, names = _place(key), set[str]()
    for home in homes:
        public = getattr(home, "__all__", vars(home))
        names |= {name for name in public if is_one(place, getattr(home, name))}
    return sorted(names)


def _place(key: str) -> str:
    """A key without the numbers of list items: `pipeline.rule[0].synthesizer`."""
    return re.sub(r"\[\d+\]", "", key)


def _in_own_file(package: ModuleType, name: str) -> Any:
    """`delayed` is the class Delayed of the package's file delayed.py: no list to keep."""
    try:
        module = importlib.import_module(f"{package.__name__}.{name}")
    except ModuleNotFoundError:
        return None
    wanted = name.replace("_", "")
    return next((v for n, v in vars(module).items() if n.lower() == wanted), None)


def _import(key: str, class_path: str) -> Any:
    """Import the longest prefix that is a module, then follow attributes."""
    parts = class_path.split(".")
    if not all(part.isidentifier() for part in parts):
        raise ValueError(f"{key}: {class_path!r} is no import path; write module.name")
    for length in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:length])
        try:
            target: Any = importlib.import_module(name)
        except Exception as error:
            # A module that is there, but needs one that is not, is another matter.
            missing = error.name if isinstance(error, ModuleNotFoundError) else None
            if missing and f"{name}.".startswith(f"{missing}."):
                continue
            raise ValueError(f"{key}: importing {name} failed: {_one_line(error)}") from error
        for part in parts[length:]:
            if not hasattr(target, part):
                near = did_you_mean(part, [n for n in dir(target) if not n.startswith("_")])
                raise ValueError(f"{key}: {name} has no {part!r}{near}")
            target, name = getattr(target, part), f"{name}.{part}"
        return target
    raise ValueError(
        f"{key}: there is no module {parts[0]!r}, neither installed nor in {os.getcwd()}"
    )


def check(key: str, component: Component) -> Component:
    """Find the component, and compare its arguments with the signature, without calling it.

    Returns the component with text that means a number (`"1e-3"`) turned into that number.

    Raises:
        ValueError: it cannot be found or called, an argument is unknown, or one is missing.
    """
    target = find(key, component.class_path)
    arguments = {n: _check_nested(f"{key}.{n}", v) for n, v in component.init_args.items()}
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):  # some built-in functions have none
        return Component(component.class_path, arguments)
    known = _settable(parameters.values(), _passed_by_position(key, target))
    if key == "scheduler" and "total" in known:
        arguments.setdefault("total", "total")
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name in arguments:
        if name not in known and not open_ended:
            raise ValueError(
                f"{key}.init_args: {component.class_path} has no argument {name!r}"
                f"{did_you_mean(name, known)}; it takes {', '.join(known) or 'none'}"
            )
    missing = [n for n, p in known.items() if p.default is p.empty and n not in arguments]
    if missing:
        raise ValueError(f"{key}.init_args: {component.class_path} needs {', '.join(missing)}")
    return Component(
        component.class_path,
        {n: _number(v) if _is_number(known.get(n)) else v for n, v in arguments.items()},
    )


def _passed_by_position(key: str, target: Callable[..., Any]) -> int:
    """How many arguments are the engine's: parameters, an optimizer, or output and target."""
    if key == "loss":  # a class is built; a function is the loss itself
        return 0 if isinstance(target, type) else 2
    return 1 if key in ("optimizer", "scheduler") else DEFERRED.get(_place(key), 0)


def _settable(parameters: Iterable[inspect.Parameter], skip: int) -> dict[str, inspect.Parameter]:
    """The parameters that a keyword can set, less the first `skip`."""
    named = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    return {p.name: p for p in named[skip:] if p.kind is not p.POSITIONAL_ONLY}


def _is_number(parameter: inspect.Parameter | None) -> bool:
    """Whether the parameter says of itself that it is a number, by annotation or default."""
    if parameter is None:
        return False
    if parameter.annotation is not parameter.empty:
        annotation = getattr(parameter.annotation, "__name__", "") + f" {parameter.annotation}"
        words = set(re.findall(r"\w+", annotation))
        return bool(words & {"int", "float"}) and "str" not in words
    return isinstance(parameter.default, int | float) and not isinstance(parameter.default, bool)


def _number(value: Any) -> Any:
    if isinstance(value, str):
        for read in (int, float):
            try:
                return read(value)
            except ValueError:
                continue
    return value


def _nested(value: Any) -> Component | None:
    """An argument that is a component itself, by its full import path."""
    if isinstance(value, dict) and {"class_path"} <= set(value) <= {"class_path", "init_args"}:
        return Component(value["class_path"], value.get("init_args") or {})
    return None


def _check_nested(key: str, value: Any) -> Any:
    if _place(key) in DEFERRED and isinstance(value, str):
        value = {"class_path": value}
    if isinstance(value, list):
        return [_check_nested(key, each) for each in value]
    if (component := _nested(value)) is None:
        return value
    checked = check(key, component)
    return {"class_path": checked.class_path, "init_args": checked.init_args}


def _build_nested(key: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_build_nested(key, each) for each in value]
    component = _nested(value)
    if component is None:
        return value
    built = build(key, component)
    return built if _place(key) in DEFERRED else call(key, built)


def build(key: str, component: Component) -> Callable[..., Any]:
    """The component's class or function with its arguments bound, not called yet."""
    arguments = {n: _build_nested(f"{key}.{n}", v) for n, v in component.init_args.items()}
    return partial(find(key, component.class_path), **arguments)


def call(key: str, function: Callable[..., Any]) -> Any:
    """Call it; what it raises becomes one line.

    Raises:
        ValueError: the function raised, its own exception being the cause; or gave something else
            than the key needs.
    """
    try:
        result = function()
    except Exception as error:
        raise ValueError(f"{key}: {_one_line(error)}") from error
    return check_result(key, _place(key), result)


def _one_line(error: Exception) -> str:
    """An exception in one line: our own messages as they are, others with type and place."""
    text = " ".join(str(error).split())
    frames = traceback.extract_tb(error.__traceback__)
    file = frames[-1].filename if frames else ""
    ours = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    if os.path.abspath(file).startswith(ours + os.sep):
        return text
    if not frames or "importlib" in file or isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {text}"
    return f"{type(error).__name__}: {text} ({os.path.basename(file)}:{frames[-1].lineno})"
