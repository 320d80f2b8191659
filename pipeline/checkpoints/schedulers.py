"""Learning-rate schedulers by the parameter groups whose rates they set, on whatever cut."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .checkpoint import CheckpointError
from .schema import check_alike

__all__ = ["load_schedulers", "scheduler_states"]

OF_GROUPS = {"base_lrs", "max_lrs", "min_lrs", "lr_lambdas", "_last_lr"}
"""Lists of torch's schedulers that have one entry for each group."""

NESTED = "_schedulers"
"""Those that a SequentialLR or a ChainedScheduler is made of."""

Home = tuple[Mapping[str, Any], int]
"""What was saved of the scheduler that set a group's rate, and the group's number there."""


def scheduler_states(schedulers: Iterable[LRScheduler]) -> list[dict[str, Any]]:
    """Each scheduler's class and its state, in the order of their optimizers."""
    return [{"kind": type(each).__name__, "state": each.state_dict()} for each in schedulers]


def load_schedulers(
    schedulers: Sequence[LRScheduler],
    optimizers: Sequence[Optimizer],
    weights: Mapping[str, nn.Parameter],
    saved: Sequence[Mapping[str, Any]],
) -> None:
    """Give schedulers what was saved for the groups of their optimizers.

    Args:
        schedulers: one for each optimizer, or none.
        saved: of each stage, what `optimizer_states` and `scheduler_states` gave.

    Raises:
        CheckpointError: schedulers of other classes set the rates.
        ValueError: something in it is of another kind.
    """
    before = [each["kind"] for stage in saved for each in stage["schedulers"]]
    if optimizers and bool(before) != bool(schedulers):
        raise _other(before, schedulers)
    if not schedulers:
        return
    names = {id(weight): name for name, weight in weights.items()}
    homes = _homes(saved)
    for scheduler, optimizer in zip(schedulers, optimizers, strict=True):
        kind = type(optimizer).__name__
        firsts = [[names[id(p)] for p in group["params"][:1]] for group in optimizer.param_groups]
        _load(scheduler, [homes[kind, first[0]] if first else None for first in firsts])


def _homes(saved: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], Home]:
    """Where the rate of a weight was set, by its optimizer's class and its name."""
    return {
        (optimizer["kind"], name): (scheduler, g)
        for stage in saved
        for optimizer, scheduler in zip(stage["optimizers"], stage["schedulers"], strict=True)
        for g, group in enumerate(optimizer["groups"])
        for name in group["names"]
    }


def _load(scheduler: LRScheduler, homes: Sequence[Home | None]) -> None:
    """Give a scheduler what was saved, from the home of each group; one with no weights has none,
    and keeps the entries that it has.
    """
    kind = type(scheduler).__name__
    theirs = [home[0]["kind"] for home in homes if home]
    if any(each != kind for each in theirs):
        raise _other(theirs, [scheduler])
    if theirs:
        own = scheduler.state_dict()
        state = _gathered(own, [home and (home[0]["state"], home[1]) for home in homes])
        check_alike(f"schedulers/{kind}", own, state)
        scheduler.load_state_dict(copy.deepcopy(state))  # more than one may come from a home


def _gathered(own: Mapping[str, Any], homes: Sequence[Home | None]) -> dict[str, Any]:
    """The state of a scheduler, its lists put together from those of the groups' homes."""
    state = dict(next(home[0] for home in homes if home))
    for key in OF_GROUPS & own.keys() & state.keys():
        state[key] = [
            home[0][key][home[1]] if home else mine
            for home, mine in zip(homes, own[key], strict=True)
        ]
    if NESTED in own:
        state[NESTED] = [
            _gathered(mine, [home and (home[0][NESTED][k], home[1]) for home in homes])
            for k, mine in enumerate(own[NESTED])
        ]
    return state


def _other(theirs: Sequence[str], own: Sequence[LRScheduler]) -> CheckpointError:
    before = ", ".join(dict.fromkeys(theirs)) or "none"
    now = ", ".join(dict.fromkeys(type(each).__name__ for each in own)) or "none"
    served = "" if theirs and own else " (parameter servers keep theirs to themselves)"
    return CheckpointError(
        f"the checkpoint has the learning-rate scheduler {before}, and this pipeline {now}"
        f"{served}: go on as it was saved, or load its weights alone: "
        "load_state_dict(load_weights(…))"
    )
