"""Optimizers by the names of what they move, so that another cut of the model finds its part."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from .checkpoint import CheckpointError
from .schema import check_alike, check_moments

__all__ = ["load_optimizers", "optimizer_states"]

OWN = ("params", "param_names", "names")


def optimizer_states(
    optimizers: Iterable[Optimizer], weights: Mapping[str, nn.Parameter]
) -> list[dict[str, Any]]:
    """Each optimizer's class, its groups with the names of their weights, its state by name."""
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
    state = {order[k]: value for k, value in plain["state"].items()}
    return {"kind": type(optimizer).__name__, "groups": groups, "state": state}


def load_optimizers(
    optimizers: Iterable[Optimizer],
    weights: Mapping[str, nn.Parameter],
    saved: Sequence[Sequence[Mapping[str, Any]]],
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
    saved: Sequence[Mapping[str, Any]],
    kinds: Sequence[str],
) -> None:
    kind = type(optimizer).__name__
    homes = {name: (one, g) for one in saved for g in one["groups"] for name in g["names"]}
    state, groups, number = {}, [], 0
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
        kept |= {key: value for key, value in theirs.items() if key not in OWN}
        groups.append(kept | {"params": [*range(number, number + len(own))]})
        if "param_names" in group:
            groups[-1]["param_names"] = list(group["param_names"])
        number += len(own)
    optimizer.load_state_dict({"state": state, "param_groups": groups})
