"""A stage's own corrections, one after the other, in the order given."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..errors import InputError
from ..stateful import Stateful
from ..versions import copy_all
from .beside import check_beside
from .correction import Correction, Fill, correct, expand

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..stage import Stage

__all__ = ["Kit"]


class Kit(Stateful):
    """Copies of a pipeline's corrections, for they may keep state, attached to one stage.

    Raises:
        InputError: one is not defined for an optimizer of the stage's, or beside another, whether
            it was written or chosen.
    """

    state = ("corrections", "_before")

    def __init__(self, corrections: Sequence[Correction], stage: "Stage") -> None:
        own = copy.deepcopy(list(corrections))
        self.corrections = expand(own, stage.depth > 0, stage.rule, stage.optimizers)
        check_beside(self.corrections)
        self._weights = stage.trainable
        self._keeps_last = any(correction.keeps_last for correction in self.corrections)
        self._before: dict[str, Tensor] = {}
        self._names = {id(parameter): name for name, parameter in stage.owned.items()}
        self._rates: dict[str, float] = {}
        for correction in self.corrections:
            _attach(correction, stage)

    @property
    def chosen(self) -> tuple[str, ...]:
        """The names of those that others chose in their place."""
        return tuple(correction.name for correction in self.corrections if correction.chosen_by)

    @property
    def synchronous(self) -> int:
        """Updates, from the first one, before which nothing may be late."""
        return max((correction.synchronous for correction in self.corrections), default=0)

    def factor(self, staleness: int) -> float:
        """What the learning rate is multiplied by for a gradient this old: all of theirs."""
        return math.prod(correction.factor(staleness) for correction in self.corrections)

    def change(
        self, gradients: dict[str, Tensor], staleness: int, then: Mapping[str, Tensor]
    ) -> float:
        """As `correct`, for one micro-batch."""
        if not self.corrections:
            return 1.0
        return correct(self.corrections, gradients, [staleness], self._weights, then)

    def look_ahead(self, staleness: int) -> Fill | None:
        """The weights for a forward whose gradient will be this old; None: the newest."""
        for correction in self.corrections:
            if correction.predicts and (fill := correction.look_ahead(staleness)) is not None:
                return fill
        return None

    def backward_weights(self, staleness: int) -> Mapping[str, Tensor] | None:
        """What stands in for the weights in a backward; None: nothing does."""
        for correction in self.corrections:
            if correction.stands_in:
                return correction.backward_weights(staleness)
        return None

    def standing_in(self, staleness: int) -> AbstractContextManager[None]:
        """Hold what stands in for the weights in their place, for a backward."""
        held = self.backward_weights(staleness)
        return nullcontext() if held is None else _holding(self._weights, held)

    def move(self, optimizer: Optimizer, staleness: float) -> None:
        """Have an optimizer move its weights, the first correction around the others."""
        for group in optimizer.param_groups if self._keeps_last else ():
            for parameter in group["params"]:
                self._rates[self._names[id(parameter)]] = float(group["lr"])
        step: Callable[[], None] = optimizer.step
        for correction in reversed(self.corrections):
            step = partial(correction.move, optimizer, staleness, step)
        step()

    def before_update(self) -> None:
        """Keep the weights as they are, where a correction asks what an update has done."""
        if not self._keeps_last:
            return
        if not self._before:
            self._before = {n: torch.empty_like(w) for n, w in self._weights.items()}
        copy_all(self._before, self._weights)

    def after_update(self) -> None:
        """Let each see what the update has done."""
        for correction in self.corrections:
            with torch.no_grad():
                correction.after_update(self._before, self._rates)
        self._rates = {}


def _attach(correction: Correction, stage: "Stage") -> None:
    try:
        correction.attach(stage)
    except InputError as error:
        if not correction.chosen_by:
            raise
        raise InputError(f"{correction.chosen_by} chose {correction.name}: {error}") from None


@contextmanager
def _holding(weights: Mapping[str, Tensor], held: Mapping[str, Tensor]) -> "Iterator[None]":
    """Other values in the weights' own memory, which a graph refers to, within a block."""
    own = {name: weight.detach().clone() for name, weight in weights.items()}
    try:
        for name, value in held.items():
            weights[name].data.copy_(value)
        yield
    finally:
        for name, value in own.items():
            weights[name].data.copy_(value)
