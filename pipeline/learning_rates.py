"""The learning rates of an optimizer: for one step, and of the updates to come."""

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .errors import InputError, first_line
from .stateful import Stateful

__all__ = ["ComingRates", "multiplied"]


def multiplied(optimizers: Sequence[Optimizer], factor: float) -> AbstractContextManager[None]:
    """Run a block with every learning rate times a factor; 1 leaves them as they are."""
    return nullcontext() if factor == 1 else _multiplied(optimizers, factor)


@contextmanager
def _multiplied(optimizers: Sequence[Optimizer], factor: float) -> Iterator[None]:
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    rates = [group["lr"] for group in groups]
    try:
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate * factor
        yield
    finally:
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate


class ComingRates(Stateful):
    """Ask a scheduler of its own, of an optimizer with nothing to move, that runs ahead.

    Args:
        optimizer: whose rates to tell.
        scheduler: what makes its scheduler; None: its rates stay.

    Raises:
        InputError: the scheduler cannot be made a second time.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        scheduler: Callable[[Optimizer], LRScheduler] | None,
    ) -> None:
        self._optimizer = optimizer
        self._scheduler: LRScheduler | None = None
        self._rates: deque[list[float]] = deque()
        if scheduler is None:
            return
        groups = [
            {key: value for key, value in group.items() if key not in ("initial_lr", "param_names")}
            | {"params": [nn.Parameter(torch.empty(0))], "lr": group.get("initial_lr", group["lr"])}
            for group in optimizer.param_groups
        ]
        self._shadow = torch.optim.SGD(groups)
        try:
            self._scheduler = scheduler(self._shadow)
        except Exception as error:
            raise InputError(
                "weight prediction looks ahead in the learning rates with a second scheduler, and "
                f"scheduler= raised {type(error).__name__}: {first_line(error)}: let it work for "
                "any optimizer, or write form='last_update', which needs no rates"
            ) from error
        self._seen = 0

    def state_dict(self) -> dict[str, Any]:
        """How far it has looked."""
        if self._scheduler is None:
            return {}
        states = {"scheduler": self._scheduler.state_dict(), "shadow": self._shadow.state_dict()}
        return states | {"rates": self._rates, "seen": self._seen}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on from there; from nothing, at the beginning."""
        if self._scheduler is not None and state:
            self._shadow.load_state_dict(state["shadow"])
            self._scheduler.load_state_dict(state["scheduler"])
            self._rates, self._seen = state["rates"], state["seen"]

    def _look_further(self) -> None:
        """See one more rate; no further than asked, for a scheduler may have an end."""
        assert self._scheduler is not None
        if self._seen:
            with warnings.catch_warnings():
                # torch's, for an optimizer that never steps.
                warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
                self._scheduler.step()
        self._seen += 1
        self._rates.append([float(group["lr"]) for group in self._shadow.param_groups])

    def passed(self) -> None:
        """An update is done: its rate is no longer to come."""
        if self._scheduler is not None:
            if not self._rates:
                self._look_further()
            self._rates.popleft()

    def of(self, group: int, updates: int) -> list[float]:
        """The rates of the next `updates` updates, of a parameter group."""
        if self._scheduler is None:
            return [float(self._optimizer.param_groups[group]["lr"])] * updates
        while len(self._rates) < updates:
            self._look_further()
        return [rates[group] for rates in islice(self._rates, updates)]
