"""What a correction is asked, by whoever moves weights: a stage, or a parameter server's shard."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor
from torch.optim import Optimizer

from ..stateful import Stateful

if TYPE_CHECKING:
    from ..rules import Rule
    from ..stage import Stage

__all__ = ["Correction", "Fill", "correct", "expand"]

Fill = Callable[[str, Tensor], Tensor]
"""From a weight's name and its value, the value that a forward is to run with."""


class Correction(Stateful):
    """Changes nothing; the others override what they do otherwise.

    A parameter server asks `factor` and `change` alone. A stage has copies of its own of all its
    corrections, so one may keep state there; what training changes of it is named
    in `state`, for checkpoints.
    """

    needs_weights = False
    """Whether it compares the weights of by now with those that the gradient was taken at."""

    at_servers = True
    """Whether it is of use where a parameter server moves the weights."""

    predicts = False
    """Whether forwards are to run with other weights than the newest; see `look_ahead`."""

    stands_in = False
    """Whether backwards are to run with other weights than the newest; see `backward_weights`."""

    takes_momentum = False
    """Whether it changes how an optimizer's momentum steps."""

    turns_moments = False
    """Whether an optimizer's moments are not in the weights' own basis under it."""

    reads_moments = False
    """Whether it goes by an optimizer's moments, as of the weights."""

    keeps_last = False
    """Whether it needs to know what the last update did; see `after_update`."""

    changes_law = True
    """Whether it changes what a delay does to the largest stable learning rate."""

    synchronous = 0
    """Updates, from the first one, before which nothing may be late."""

    chosen_by = ""
    """The name of the correction that chose this one; none where it was written."""

    @property
    def name(self) -> str:
        """As in a configuration: that of its file; of one that is not Headrace's, its class's."""
        home, _, file = type(self).__module__.rpartition(".")
        return file if home == __package__ else type(self).__name__

    @property
    def kind(self) -> str:
        """What it is, in a word: corrections of one kind have the same state."""
        return type(self).__name__

    def check(self, depths: Sequence[int], update_every: int | None) -> None:
        """Refuse a pipeline for which it is not defined.

        Args:
            depths: each stage's micro-batches in flight behind a forward.
            update_every: micro-batches to an update; None where `batch_size` decides.

        Raises:
            ValueError: with the reason and what to write instead.
        """

    def choose(
        self, late: bool, rule: "Rule", optimizers: Sequence[Optimizer]
    ) -> "Sequence[Correction]":
        """What to do on a stage: itself, or new ones in its place.

        Args:
            late: whether any of its gradients is.
        """
        return [self]

    def attach(self, stage: "Stage") -> None:
        """Look at the stage that this copy belongs to, once it has its optimizers.

        Raises:
            InputError: it is not defined for one of them; with what to write instead.
        """

    def catch_up(self, updates: int) -> None:
        """So many updates were made without it: a checkpoint's, of another cut."""

    def factor(self, staleness: int) -> float:
        """What to multiply the learning rate by, for a gradient this many updates old."""
        return 1.0

    def change(self, gradient: Tensor, now: Tensor, then: Tensor) -> Tensor:
        """The gradient as it should be; with `needs_weights`.

        Args:
            now, then: the weight as it is, and as it was when the gradient was taken.
        """
        return gradient

    def change_all(
        self,
        gradients: dict[str, Tensor],
        now: Mapping[str, Tensor],
        then: Mapping[str, Tensor],
    ) -> None:
        """`change` every gradient, by the name of its weight, in place of the dict's."""
        for name, gradient in gradients.items():
            gradients[name] = self.change(gradient, now[name], then[name])

    def look_ahead(self, staleness: int) -> Fill | None:
        """The weights for a forward whose gradient will be this many updates old; with `predicts`.

        None: the newest, as they are.
        """
        return None

    def backward_weights(self, staleness: int) -> Mapping[str, Tensor] | None:
        """What stands in for the weights in a backward, by name; with `stands_in`."""
        return None

    def move(self, optimizer: Optimizer, staleness: float, step: Callable[[], None]) -> None:
        """Have an optimizer move its weights: `step` does.

        Args:
            staleness: of the gradients that were loaded, in updates; their mean.
        """
        step()

    def after_update(self, before: Mapping[str, Tensor], rates: Mapping[str, float]) -> None:
        """An update is done, or was skipped.

        Args:
            before: the weights as they were before it, by name, with `keeps_last`; else empty.
            rates: the learning rate that each was moved with; empty where it was skipped.
        """


def expand(
    corrections: Sequence[Correction], late: bool, rule: "Rule", optimizers: Sequence[Optimizer]
) -> list[Correction]:
    """Those given, or what they `choose` in their place, which then knows who chose it."""
    expanded: list[Correction] = []
    for given in corrections:
        for each in given.choose(late, rule, optimizers):
            if each is not given:
                each.chosen_by = given.name
            expanded.append(each)
    return expanded


def correct(
    corrections: Sequence[Correction],
    gradients: dict[str, Tensor],
    staleness: Sequence[int],
    now: Mapping[str, Tensor],
    then: Mapping[str, Tensor] | None,
) -> float:
    """Let each correction change the gradients, in place of the dict's, and give the factor for the
    learning rate: the product of theirs, each a mean over the gradients that were added up.

    Args:
        staleness: of each micro-batch in the gradients, in updates.
        then: the weights that they were taken at, where a correction needs them.
    """
    for correction in corrections:
        if correction.needs_weights and then is not None:
            correction.change_all(gradients, now, then)
    return math.prod(
        math.fsum(map(correction.factor, staleness)) / len(staleness) for correction in corrections
    )
