"""What a synthesizer may be told besides its input: the micro-batch's target."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Condition", "Conditioned"]


@dataclass(frozen=True)
class Condition:
    """The target as a synthesizer sees it.

    Args:
        classes: of labels, integers in [0, classes); a negative one says nothing.
        features: of targets that are numbers (N, …), flattened.
    """

    classes: int | None = None
    features: int | None = None

    @classmethod
    def of(cls, target: Any, classes: int | None) -> "Condition":
        """What this target is.

        Raises:
            TypeError: it is no single tensor.
            ValueError: labels without `classes`, numbers with them, or a label beyond them.
        """
        if not isinstance(target, Tensor):
            raise TypeError(
                f"conditional=True needs a target that is one tensor, not a {type(target).__name__}"
                ": leave it out"
            )
        if target.is_floating_point():
            if classes is not None:
                raise ValueError(
                    f"classes={classes}, but the target is {target.dtype}, no labels: leave it out"
                )
            return cls(features=math.prod(target.shape[1:]))
        if classes is None:
            raise ValueError(
                f"conditional=True with labels ({target.dtype}) needs the number of classes: "
                f"write classes={int(target.max()) + 1} if that is the largest there is"
            )
        if int(target.max()) >= classes:
            raise ValueError(f"classes={classes}, but there is a label {int(target.max())}")
        return cls(classes=classes)


class Conditioned(nn.Module):
    """What a condition adds to a layer's output: as if its input had the target appended.

    (N, …) labels or numbers -> (N, …, width). Labels of (N,) hold for all positions of a sample.
    Weights start as those of a linear layer of `inputs` and the target together.
    """

    def __init__(self, condition: Condition, inputs: int, width: int) -> None:
        super().__init__()
        size = condition.classes or condition.features or 0
        self.condition = condition
        self.weight = nn.Parameter(torch.empty(size, width))
        bound = 1 / math.sqrt(inputs + size)
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, target: Tensor) -> Tensor:
        if self.condition.classes is None:
            return target.flatten(1).to(self.weight.dtype) @ self.weight
        known = target >= 0
        rows = self.weight[target.clamp(min=0)]
        return rows * known.unsqueeze(-1)
