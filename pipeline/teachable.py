"""A small network that is taught, sample by sample, what it should have given."""

import math
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .random_state import RandomState
from .settings import OptimizerFactory, make_optimizers

__all__ = ["Mean", "SyntheticGradient", "Teachable", "adam", "make_seeded"]

LATE = 32
"""How many of the last values a mean is taken of."""


def adam(parameters: Any) -> Optimizer:
    """The optimizer of a synthesizer of which nothing else is said: Adam, at a rate of 3e-3."""
    return torch.optim.Adam(parameters, lr=3e-3, fused=True)


def make_seeded(make: Callable[[], nn.Module], seed: int, like: Tensor) -> nn.Module:
    """Make a network from a seed, on a tensor's device, in its precision or float32 if that is
    lower; the random state in force stays as it is.
    """
    with RandomState.derive(seed, 0, torch.device("cpu")).in_force():
        made = make()
    return made.to(like.device, torch.promote_types(like.dtype, torch.float32))


class Mean:
    """The mean of the last `LATE` finite values; NaN before there is one."""

    def __init__(self) -> None:
        self._values: deque[float] = deque(maxlen=LATE)
        self.value = math.nan

    def add(self, value: float) -> None:
        """Take another one in."""
        if math.isfinite(value):
            self._values.append(value)
            self.value = sum(self._values) / len(self._values)


class Teachable:
    """A network, its optimizer, and how well it has done of late.

    Args:
        network: called with a tensor (N, …) and the target, or None.
        optimizer: a function of its (name, Parameter) pairs.
    """

    def __init__(self, network: nn.Module, optimizer: OptimizerFactory) -> None:
        self.network = network
        self._parameters = list(network.parameters())
        self._dtype = self._parameters[0].dtype if self._parameters else torch.float32
        self._optimizers = make_optimizers(optimizer, list(network.named_parameters()))
        self.loss, self.cosine = Mean(), Mean()

    def guess(self, x: Tensor, target: Any = None) -> Tensor:
        """What it gives for `x` (N, …), without a graph."""
        with torch.no_grad():
            return self._call(x, target)

    def learn(self, x: Tensor, wanted: Tensor, target: Any = None) -> bool:
        """One step on ‖M(x) - wanted‖², summed over a sample and averaged over samples.

        Both are taken as they are: nothing flows back through them.

        Returns:
            Whether the loss is finite; without a step if it is not.
        """
        prediction = self._call(x.detach(), target)
        given, wanted = prediction.detach().flatten(), wanted.detach().to(self._dtype).flatten()
        error = given - wanted
        rows = torch.stack([error, given, wanted])
        (loss, _, _), (_, given2, inner), (_, _, wanted2) = (rows @ rows.T).tolist()
        if not math.isfinite(loss):
            return False
        self.loss.add(loss / len(x))
        self.cosine.add(inner / max(math.sqrt(given2 * wanted2), 1e-30))
        # The loss's gradient with respect to the prediction, 2/N (M(x) - wanted), by hand.
        torch.autograd.backward(prediction, error.mul_(2 / len(x)).view_as(prediction))
        for optimizer in self._optimizers:
            optimizer.step()
        for parameter in self._parameters:
            parameter.grad = None
        return True

    def _call(self, x: Tensor, target: Any) -> Tensor:
        x = x.to(self._dtype) if x.is_floating_point() else x
        result: Tensor = self.network(x, target)
        return result


class SyntheticGradient(Teachable):
    """M: guesses a loss's gradient with respect to a tensor h, from h alone or with the target.

    Decoupled neural interfaces (Jaderberg et al. 2017; Czarnecki et al. 2017). The loss
    is a mean over the N samples of h, so its gradient is small where N is large: M learns and gives
    gradients of one sample, N ∂L/∂h, which are divided by N when they are used.
    """

    def guess(self, x: Tensor, target: Any = None) -> Tensor:
        """∂L/∂h of h (N, …) as it is guessed: of the same shape."""
        return super().guess(x, target).to(x.dtype).div_(len(x))

    def learn(self, x: Tensor, wanted: Tensor, target: Any = None) -> bool:
        """Learn from the gradient ∂L/∂h (N, …) that has arrived for h; as above."""
        return super().learn(x, wanted.to(self._dtype) * len(x), target)
