"""What is read is of the kinds of what is there: a number stays one, whoever wrote the file."""

from collections import Counter, deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["check_alike", "check_moments", "check_rates", "check_sums", "whole"]

MOST = 1 << 53
"""Numbers ride with messages as float64, which counts up to here."""

MOMENTS = ("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
"""What torch's optimizers keep of a weight's own shape."""


RATES = ("lr", "initial_lr", "momentum", "weight_decay", "eps")
"""What torch's optimizers multiply with: an overflow would end training in their midst."""

LARGEST = torch.finfo(torch.float32).max


def whole(name: str, value: Any, least: int = 0) -> int:
    """A whole number of at least 0, or as told.

    Raises:
        ValueError: it is none, or more than is ever counted to.
    """
    if type(value) is not int or not least <= value <= MOST:
        raise ValueError(f"{name} is {_shown(value)}, and is to be a whole number >= {least}")
    return value


def check_alike(place: str, now: Any, saved: Any, counts: bool = False) -> None:
    """Refuse a state that something else was written into; what is not there now may be anything.

    Args:
        place: what the state is called.
        now: what the state of by now is.
        counts: whole numbers are counts, and are to be whole and >= 0; nothing may be None.

    Raises:
        ValueError: with the innermost place, its value, and what is to be there.
    """
    if isinstance(now, bool) and counts:
        _require(place, saved, bool, "true or false")
    elif isinstance(now, int) and counts:
        whole(place, saved)
    elif isinstance(now, Counter):
        _require(place, saved, Counter, "counts")
        for key, value in saved.items():
            whole(f"what {place} counts", key), whole(f"{place}/{key}", value)
    elif isinstance(now, Mapping):
        _require(place, saved, Mapping, "a dict")
        for key in now.keys() & saved.keys():
            check_alike(f"{place}/{key}", now[key], saved[key], counts)
    elif isinstance(now, list | tuple | deque):
        _require(place, saved, list | tuple | deque, "a list")
        for k, (one, two) in enumerate(zip(now, saved, strict=False)):
            check_alike(f"{place}/{k}", one, two, counts)
    elif now is not None:
        _check_leaf(place, now, saved)


def _check_leaf(place: str, now: Any, saved: Any) -> None:
    if isinstance(now, bool):  # torch's options of three values: None is to choose
        _require(place, saved, bool | None, "true or false")
    elif isinstance(now, str):
        _require(place, saved, str, "text")
    elif isinstance(now, int | float) or (isinstance(now, Tensor) and not now.dim()):
        none = isinstance(saved, bool) or (isinstance(saved, Tensor) and saved.numel() != 1)
        if none or (isinstance(saved, int) and abs(saved) > MOST):
            raise ValueError(f"{place} is {_shown(saved)}, and is to be a number")
        _require(place, saved, int | float | Tensor, "a number")
    elif isinstance(now, Tensor):
        _require(place, saved, Tensor | None, "a tensor")


def check_rates(place: str, group: Mapping[str, Any]) -> None:
    """Refuse a group of an optimizer that no optimizer can have; a schedule that goes on past its
    end may have come to a rate below 0.

    Raises:
        ValueError: with its place.
    """
    for name in RATES:
        least = -LARGEST if name in ("lr", "initial_lr") else 0.0
        value = group.get(name)
        if isinstance(value, int | float | Tensor) and not least <= float(value) <= LARGEST:
            what = "a finite number" if least else "a finite number >= 0"
            raise ValueError(f"{place}/{name} is {_shown(value)}, and is to be {what}")


def check_moments(place: str, weight: Tensor, saved: Any) -> None:
    """Refuse what an optimizer cannot have kept of a weight.

    Raises:
        ValueError: with its place.
    """
    _require(place, saved, Mapping, "a dict")
    for name in MOMENTS:
        if saved.get(name) is not None:
            _check_shape(f"{place}/{name}", weight, saved[name])
        elif name in saved and name != "momentum_buffer":
            raise ValueError(f"{place}/{name} is None, and is to be a tensor")
    if "step" in saved:
        _check_leaf(f"{place}/step", 0, saved["step"])


def check_sums(place: str, weights: Mapping[str, Tensor], sums: Any) -> None:
    """Refuse a gathered gradient of other shapes.

    Raises:
        ValueError: with its place.
    """
    _require(place, sums, Mapping, "a dict")
    for name in weights.keys() & sums.keys():
        _check_shape(f"{place}/{name}", weights[name], sums[name])


def _check_shape(place: str, weight: Tensor, saved: Any) -> None:
    if not isinstance(saved, Tensor) or saved.shape != weight.shape:
        given = f"a tensor of {[*saved.shape]}" if isinstance(saved, Tensor) else _shown(saved)
        raise ValueError(f"{place} is {given}, and is to be a tensor of {[*weight.shape]}")


def _require(place: str, value: Any, kind: Any, what: str) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"{place} is {_shown(value)}, and is to be {what}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"
