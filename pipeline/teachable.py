"""A small network that is taught, sample by sample, what it should have given."""

import math
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .errors import InputError, first_line
from .nest import describe
from .random_state import RandomState
from .settings import OptimizerFactory, make_optimizers
from .stateful import Stateful

__all__ = ["Mean", "SyntheticGradient", "Teachable", "adam", "make_seeded"]

LATE = 32
"""How many of the last values a mean is taken of."""


def adam(parameters: Any) -> Optimizer:
    """The optimizer of a synthesizer of which nothing else is said: Adam, at a rate of 3e-3."""
    return torch.optim.Adam(parameters, lr=3e-3, fused=True)


def make_seeded(make: Callable[[], nn.Module], seed: int, like: Tensor) -> nn.Module:
    """Make a network from a seed, on a tensor's device, in its precision or float32 if that is
    lower; the random state in force stays as it is.

    Raises:
        InputError: it raises, or gives no module.
    """
    try:
        with RandomState.derive(seed, 0, torch.device("cpu")).in_force():
            made = make()
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise InputError(f"{kind}{first_line(error)}") from error
    if not isinstance(made, nn.Module):
        raise InputError(f"what makes it gave a {type(made).__name__}: give an nn.Module")
    return made.to(like.device, torch.promote_types(like.dtype, torch.float32))


class Mean(Stateful):
    """The mean of the last `LATE` finite values; NaN before there is one."""

    state = ("_values", "value")

    def __init__(self) -> None:
        self._values: deque[float] = deque(maxlen=LATE)
        self.value = math.nan

    def add(self, value: float) -> None:
        """Take another one in."""
        if math.isfinite(value):
            self._values.append(value)
            self.value = sum(self._values) / len(self._values)


class Teachable(Stateful):
    """A network, its optimizer, and how well it has done of late.

    Args:
        network: called with a tensor (N, …) and the target, or None.
        optimizer: a function of its (name, Parameter) pairs.
        seed: of what the network draws (dropout).

    Raises:
        InputError, TypeError, ValueError: the optimizer cannot be made.
    """

    state = ("network", "_optimizers", "_random", "loss", "cosine")

    def __init__(self, network: nn.Module, optimizer: OptimizerFactory, seed: int = 0) -> None:
        self.network = network
        self._parameters = list(network.parameters())
        self._dtype = self._parameters[0].dtype if self._parameters else torch.float32
        self._optimizers = make_optimizers(optimizer, list(network.named_parameters()))
        device = self._parameters[0].device if self._parameters else torch.device("cpu")
        self._random = RandomState.derive(seed, 1, device)
        self._copies_input: bool | None = None
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
        if prediction.shape != wanted.shape:
            raise InputError(
                f"{self.name} gave {describe(prediction)} where {describe(wanted)} is wanted: it "
                "must give a tensor of that shape"
            )
        given, wanted = prediction.detach().flatten(), wanted.detach().to(self._dtype).flatten()
        error = given - wanted
        rows = torch.stack([error, given, wanted])
        (loss, _, _), (_, given2, inner), (_, _, wanted2) = (rows @ rows.T).tolist()
        if not math.isfinite(loss):
            return False
        self.loss.add(loss / len(x))
        self.cosine.add(inner / max(math.sqrt(given2 * wanted2), 1e-30))
        if not prediction.requires_grad:  # it has nothing to learn with
            return True
        # The loss's gradient with respect to the prediction, 2/N (M(x) - wanted), by hand.
        torch.autograd.backward(prediction, error.mul_(2 / len(x)).view_as(prediction))
        for optimizer in self._optimizers:
            optimizer.step()
        for parameter in self._parameters:
            parameter.grad = None
        return True

    @property
    def name(self) -> str:
        """For messages."""
        return f"the synthesizer {type(self.network).__name__}"

    def _call(self, x: Tensor, target: Any) -> Tensor:
        x = x.to(self._dtype) if x.is_floating_point() else x
        # What works in place must not change the stage's output: the first call tells.
        handed = x if self._copies_input is False else x.clone()
        before = handed._version
        with self._random.in_force():
            try:
                result = self.network(handed, target)
            except TypeError as error:
                if "positional argument" not in str(error):
                    raise
                raise InputError(
                    f"{self.name} cannot be called with (tensor, target): {first_line(error)}; "
                    "its forward takes both, the target None unless conditional"
                ) from error
        if not isinstance(result, Tensor) or not result.is_floating_point():
            got = describe(result) if isinstance(result, Tensor) else type(result).__name__
            raise InputError(f"{self.name} gave {got}: it must give a tensor of numbers")
        if self._copies_input is None:
            self._copies_input = handed._version != before
        return result


class SyntheticGradient(Teachable):
    """M: guesses a loss's gradient with respect to a tensor h, from h alone or with the target.

    Decoupled neural interfaces (Jaderberg et al. 2017; Czarnecki et al. 2017). The loss
    is a mean over the N samples of h, so its gradient is small where N is large: M learns and gives
    gradients of one sample, N ∂L/∂h, which are divided by N when they are used.
    """

    def guess(self, x: Tensor, target: Any = None) -> Tensor:
        """∂L/∂h of h (N, …) as it is guessed: of the same shape.

        Raises:
            InputError: the network gives something else.
        """
        gradient = super().guess(x, target)
        if gradient.shape != x.shape:
            raise InputError(
                f"{self.name} gave {describe(gradient)} for an output {describe(x)}: it must give "
                "a tensor of the same shape"
            )
        return gradient.to(x.dtype) / len(x)

    def learn(self, x: Tensor, wanted: Tensor, target: Any = None) -> bool:
        """Learn from the gradient ∂L/∂h (N, …) that has arrived for h; as above."""
        return super().learn(x, wanted.to(self._dtype) * len(x), target)
