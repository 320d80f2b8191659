"""What a correction is asked, by whoever moves weights: a stage, or a parameter server's shard."""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

__all__ = ["Correction", "correct"]


class Correction:
    """Changes nothing; the others override what they do otherwise."""

    needs_weights = False
    """Whether it compares the weights of by now with those that the gradient was taken at."""

    def factor(self, staleness: int) -> float:
        """What to multiply the learning rate by, for a gradient this many updates old."""
        return 1.0

    def change(self, gradient: Tensor, now: Tensor, then: Tensor) -> Tensor:
        """The gradient as it should be; with `needs_weights`.

        Args:
            now, then: the weight as it is, and as it was when the gradient was taken.
        """
        return gradient


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
            for name, gradient in gradients.items():
                gradients[name] = correction.change(gradient, now[name], then[name])
    return math.prod(
        math.fsum(map(correction.factor, staleness)) / len(staleness) for correction in corrections
    )
