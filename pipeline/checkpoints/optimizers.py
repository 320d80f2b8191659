"""Optimizers by the names of what they move, so that another cut of the model finds its part."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..stateful import put
from .checkpoint import CheckpointError
from .schema import check_alike, check_moments, check_rates

__all__ = ["load_optimizers", "optimizer_states"]

OWN = ("params", "param_names", "names")

Saved = Mapping[str, Any]
"""What `optimizer_states` gave of one optimizer."""


def optimizer_states(
    optimizers: Iterable[Optimizer], weights: Mapping[str, nn.Parameter]
) -> list[dict[str, Any]]:
    """Each optimizer's class, its groups with the names of their weights, its state by name, what
    it keeps of no weight, and what its class adds.
    """
    names = {id(weight): name for name, weight in weights.items()}
    return [_state(optimizer, names) for optimizer in optimizers]


def _state(optimizer: Optimizer, names: Mapping[int, str]) -> dict[str, Any]:
    plain = optimizer.state_dict()
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    groups = [
        {key: value for key, value in group.items() if key not in OWN}
        | {"names": [order[k] for k in group["params"]]}
        for group in plain["param_groups"]
    ]
    numbers = range(len(order))
    return {
        "kind": type(optimizer).__name__,
        "groups": groups,
        "state": {order[k]: value for k, value in plain["state"].items() if k in numbers},
        "common": {k: value for k, value in plain["state"].items() if k not in numbers},
        "added": _added(plain),
    }


def _added(plain: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in plain.items() if key not in ("state", "param_groups")}


def load_optimizers(
    optimizers: Iterable[Optimizer],
    weights: Mapping[str, nn.Parameter],
    saved: Sequence[Sequence[Saved]],
) -> None:
    """Give optimizers what was saved for the names of their weights.

    Args:
        saved: of each stage, what `optimizer_states` gave.

    Raises:
        CheckpointError: an optimizer of this class did not move one of the weights.
        ValueError: something in it is of another kind.
    """
    names = {id(weight): name for name, weight in weights.items()}
    for optimizer in optimizers:
        kind = type(optimizer).__name__
        alike = [each for stage in saved for each in stage if each["kind"] == kind]
        _load(optimizer, names, alike, [each["kind"] for stage in saved for each in stage])


def _load(
    optimizer: Optimizer,
    names: Mapping[int, str],
    saved: Sequence[Saved],
    kinds: Sequence[str],
) -> None:
    kind = type(optimizer).__name__
    homes = {name: (one, g) for one in saved for g in one["groups"] for name in g["names"]}
    state: dict[Any, Any] = {}
    groups, number = [], 0
    for k, group in enumerate(optimizer.param_groups):
        own = [names[id(parameter)] for parameter in group["params"]]
        for name, weight in zip(own, group["params"], strict=True):
            if name not in homes:
                raise CheckpointError(
                    f"the checkpoint has no {kind} of {name!r}, but "
                    f"{', '.join(dict.fromkeys(kinds)) or 'no optimizer'} of others: write the "
                    "optimizer that it was saved with, or load its weights alone"
                )
            if name in homes[name][0]["state"]:
                moments = homes[name][0]["state"][name]
                check_moments(f"optimizers/{kind}/state/{name}", weight, moments)
                state[number + own.index(name)] = moments
        theirs = homes[own[0]][1] if own else {}
        kept = {key: value for key, value in group.items() if key not in OWN}
        check_alike(f"optimizers/{kind}/groups/{k}", kept, theirs)
        check_rates(f"optimizers/{kind}/groups/{k}", theirs)
        kept |= {key: value for key, value in theirs.items() if key not in OWN}
        groups.append(kept | {"params": [*range(number, number + len(own))]})
        if "param_names" in group:
            groups[-1]["param_names"] = list(group["param_names"])
        number += len(own)
    moved = {names[id(p)]: p for group in optimizer.param_groups for p in group["params"]}
    state |= _carried(kind, "common", homes, moved)
    added = _carried(kind, "added", homes, moved)
    check_alike(f"optimizers/{kind}", _added(optimizer.state_dict()), added)
    optimizer.load_state_dict({"state": state, "param_groups": groups, **added})


def _carried(
    kind: str, part: str, homes: Mapping[str, tuple[Saved, Any]], moved: Mapping[str, nn.Parameter]
) -> dict[Any, Any]:
    """What is of no weight: that of the optimizer that moved the same ones; where they are cut
    otherwise, numbers that all optimizers had alike that moved any.

    Raises:
        CheckpointError: something else is there.
    """
    before = [*{id(homes[name][0]): homes[name][0] for name in moved}.values()]
    same = len(before) == 1 and {n for g in before[0]["groups"] for n in g["names"]} == {*moved}
    values = [{**each.get(part, {})} for each in before]
    for key in {key for each in values for key in each} if not same else ():
        plain = [_number(each.get(key)) for each in values]
        if plain[0] is None or plain != plain[:1] * len(plain):
            raise CheckpointError(
                f"the checkpoint's {kind} keeps {key!r}, which is of no one weight, and no number "
                "that all stages have alike, so that no other cut can have it: go on with the cut "
                "that it was saved with, or load its weights alone"
            )
    device = next((weight.device for weight in moved.values()), torch.device("cpu"))
    first = values[0] if values else {}  # of which each optimizer here gets a copy
    return {key: put(None, copy.deepcopy(value), device) for key, value in first.items()}


def _number(value: Any) -> float | str | None:
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    return value if isinstance(value, int | float | str) else None
