"""What one update accumulates: the gradients of its micro-batches, weighted by their samples."""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from .batch_size.sampled import Sampled, variance
from .stateful import Stateful

__all__ = ["Gradient", "all_finite", "squared_norm"]


@dataclass
class Gradient(Stateful):
    """A sum over micro-batches of their means weighted by samples, divided once when it is used.

    The first weighs 1, and so does any other of as many samples: adding it is one pass over memory.
    A single micro-batch's mean is kept, and given back, bit for bit.

    A correction may count a micro-batch for less, by a factor: then the mean is one by samples
    times factors, and `rate` is what the learning rate is to be multiplied by.

    Args:
        samples: of all that was added.
        first: samples times factor of the first micro-batch.
        weight: samples times factor of all.
        versions: the weight version of each micro-batch's forward.
        measures: keep what tells how much the samples' gradients differ.
        squares: Σ weight · ‖mean‖² over the micro-batches. counted: how many they are.
    """

    state: ClassVar = (
        "sums",
        "samples",
        "first",
        "weight",
        "versions",
        "finite",
        "squares",
        "counted",
    )

    sums: dict[str, Tensor] = field(default_factory=dict)
    samples: int = 0
    first: float = 0
    weight: float = 0
    versions: list[int] = field(default_factory=list)
    finite: bool = True
    measures: bool = False
    squares: Tensor | float = 0.0
    counted: int = 0

    def add(
        self,
        means: dict[str, Tensor],
        samples: int,
        versions: list[int],
        finite: bool = True,
        factor: float = 1,
    ) -> None:
        """Add a mean gradient, by weight name; one that is not finite spoils all.

        The tensors are changed in place from now on.

        Args:
            versions: of the weights that it was taken at, one for each micro-batch in it.
        """
        self.finite = self.finite and finite
        self.samples += samples
        self.versions += versions
        if not factor:
            return
        if self.measures:  # now: the tensors change from here on
            self.squares = self.squares + samples * factor * squared_norm(means)
            self.counted += 1
        self.weight += samples * factor
        self.first = self.first or samples * factor
        weight = samples * factor / self.first
        for name, mean in means.items():
            held = self.sums.get(name)
            if held is None:
                self.sums[name] = mean if weight == 1 else mean.mul_(weight)
            elif mean.is_sparse == held.is_sparse:
                held.add_(mean, alpha=weight)
            else:  # torch adds a sparse one to a dense one, and not the other way round
                dense, sparse = (held, mean * weight) if mean.is_sparse else (mean * weight, held)
                self.sums[name] = dense + sparse

    @property
    def rate(self) -> float:
        """The mean factor over all samples."""
        return self.weight / self.samples if self.samples else 1.0

    def mean(self) -> dict[str, Tensor]:
        """The mean gradient over all samples added; call it once."""
        if self.weight != self.first:
            for value in self.sums.values():
                value.mul_(self.first / self.weight)
        return self.sums

    def sampled(self) -> Sampled:
        """The samples' variance and the mean's square, once `mean` was called; waits for the
        device.
        """
        mean = float(squared_norm(self.sums))
        # A factor common to all micro-batches weighs none of them more.
        total = variance(float(self.squares), self.weight, mean, self.counted) / (self.rate or 1.0)
        return Sampled(total, mean)


def squared_norm(tensors: dict[str, Tensor]) -> Tensor | float:
    """Σ ‖t‖² over tensors by name, in float64; 0-d, or 0 where there is none."""
    total: Tensor | float = 0.0
    for tensor in tensors.values():
        values = tensor.coalesce().values() if tensor.is_sparse else tensor
        values = torch.view_as_real(values) if values.is_complex() else values
        total = total + torch.linalg.vector_norm(values, dtype=torch.float64).square()
    return total


def all_finite(tensors: list[Tensor]) -> bool:
    """Whether no element is infinite or NaN; one pass over memory, and one wait for the device."""
    totals = [_sum(tensor) for tensor in tensors]
    if all(total.device.type == "cpu" for total in totals):
        return all(map(math.isfinite, totals))
    return bool(torch.stack([total.to(torch.float64) for total in totals]).isfinite().all())


def _sum(tensor: Tensor) -> Tensor:
    values = tensor.detach() if tensor.requires_grad else tensor
    values = values.coalesce().values() if values.is_sparse else values
    values = torch.view_as_real(values) if values.is_complex() else values
    return values.sum(dtype=torch.float32 if values.dtype is torch.float16 else None)
