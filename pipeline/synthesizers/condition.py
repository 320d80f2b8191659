"""What a synthesizer may be told besides its input: the micro-batch's target."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Condition", "Conditioned", "check_numbers"]


def check_numbers(least: dict[str, int], **numbers: Any) -> None:
    """Refuse what is not a whole number, or too small."""
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least[name]:
            raise ValueError(f"{name}={value!r}: give a whole number >= {least[name]}")


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
    def of(cls, target: Any, classes: int | None, shape: Sequence[int]) -> "Condition":
        """What this target is.

        Args:
            shape: of the tensor (N, …) that it is to be told beside.

        Raises:
            TypeError: it is no single tensor.
            ValueError: labels without `classes`, numbers with them, a label beyond them, or a shape
                that does not go with the tensor's.
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
            if len(target) != shape[0]:
                raise ValueError(
                    f"a target of {len(target)} samples beside an output of {shape[0]}: dimension "
                    "0 must be the samples in both"
                )
            return cls(features=math.prod(target.shape[1:]))
        positions = (shape[:-1], (shape[0], *shape[2:])) if len(shape) > 2 else ()
        fitting = [tuple(each) for each in (shape[:1], *positions)]
        if tuple(target.shape) not in fitting:
            raise ValueError(
                f"labels of shape {tuple(target.shape)} beside an output of shape {tuple(shape)}: "
                f"they must be of shape {' or '.join(map(str, dict.fromkeys(fitting)))}, one for a "
                "sample or one for a place; reshape them, or leave conditional out"
            )
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
            return target.reshape(len(target), -1).to(self.weight.dtype) @ self.weight
        known = target >= 0
        rows = self.weight[target.clamp(min=0).long()]
        return rows * known.unsqueeze(-1)
