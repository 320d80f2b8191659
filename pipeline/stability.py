"""The delay law: what a delay leaves of the largest stable learning rate, and how it is said."""

import cmath
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.optim import SGD, Adam, Adamax, NAdam, Optimizer, RAdam

from .corrections import Correction
from .rules import Delayed, Rule
from .rules.delayed import Predict

if TYPE_CHECKING:
    from .stage import Stage

__all__ = [
    "Stability",
    "StabilityWarning",
    "examine",
    "largest_rate",
    "speaks_of",
    "stalest",
]

ADAMS = (Adam, Adamax, NAdam, RAdam)


class StabilityWarning(UserWarning):
    """The gradients' delay asks for a much lower learning rate or momentum than without it."""


def largest_rate(staleness: float, momentum: float = 0.0, nesterov: bool = False) -> float:
    """The largest η·h at which SGD is stable on a quadratic of curvature h, with a constant delay.

    With heavy-ball momentum m, w_{t+1} - w_t = m (w_t - w_{t-1}) - ηh w_{t-τ}, so that

        (z - 1)(z - m) z^τ + ηh z = 0,    and with Nesterov's    (1+m)z - m    in place of the    z.

    One root leaves 1 inwards as ηh leaves 0; stability ends where roots reach z = e^{iθ}. There ηh
    is real and positive, and grows with θ: what counts is the first θ at which the phases fit.
    Without momentum this is 2 sin(π/(2(2τ+1))). Weight decay is left out.

    Args:
        staleness: τ ≥ 0, in updates. A part of one is that share of each update's gradients being
            older by one than the others, which is how micro-batches that share an update are.
        momentum: 0 ≤ m < 1.

    Raises:
        ValueError: another staleness or momentum.
    """
    if not 0 <= staleness < math.inf:
        raise ValueError(f"staleness={staleness!r}: give a number of updates, 0 or more")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum={momentum!r}: give a number from 0 to below 1")
    m, whole = momentum, math.floor(staleness)
    late = staleness - whole

    def parts(angle: float) -> tuple[complex, complex, complex]:
        z = cmath.exp(1j * angle)
        return z - m, (1 + m) * z - m if nesterov else z, 1 - late + late / z

    low, high = 0.0, math.pi
    while low < (middle := (low + high) / 2) < high:
        slow, push, mix = map(cmath.phase, parts(middle))
        if middle / 2 + whole * middle + slow - push - mix < math.pi / 2:
            low = middle
        else:
            high = middle
    slow, push, mix = map(abs, parts(high))
    return 2 * math.sin(high / 2) * slow / (push * mix)


@dataclass(frozen=True)
class Stability:
    """One parameter group's optimizer under a stage's delay, and the same without it.

    Args:
        staleness: τ, in updates, once the stream is warm.
        rate: η, after a scheduler's warm-up; what a growing batch may multiply it by is left out.
        momentum: m; Adam's first beta.
        dampening: what the optimizer multiplies a gradient by is 1 less this; Adam's first beta.
        preconditions: h is of the loss as the optimizer scales it, as it is with Adam.
    """

    stage: int
    staleness: float
    rate: float
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    preconditions: bool = False

    @property
    def effective_rate(self) -> float:
        """η/(1-m), what a constant gradient comes to."""
        return self.rate * (1 - self.dampening) / (1 - self.momentum)

    @property
    def bound(self) -> float:
        """The largest stable η·h with the delay."""
        return self._bound(self.staleness)

    @property
    def undelayed_bound(self) -> float:
        """The largest stable η·h of the same run without delay."""
        return self._bound(0)

    def _bound(self, staleness: float) -> float:
        return largest_rate(staleness, self.momentum, self.nesterov) / (1 - self.dampening)

    @property
    def factor(self) -> float:
        """What the delay divides the largest stable learning rate by."""
        return self.undelayed_bound / self.bound

    @property
    def plain_factor(self) -> float:
        """What plain SGD's largest stable rate without delay, 2/h, is to η/(1-m)'s with it.

        The rates that serve a run without delay are about the same in η/(1-m) whatever its
        momentum, far below that momentum's own edge; so this tells more than `factor` of what the
        delay costs one.
        """
        return 2 * (1 - self.momentum) / ((1 - self.dampening) * self.bound)

    # In words ----------------------------------------------------------------------------------

    @property
    def figures(self) -> str:
        """A line for a run's header."""
        kind = "preconditioned curvature" if self.preconditions else "curvature"
        return (
            f"stability: staleness {_number(self.staleness)} at stage {self.stage} divides the "
            f"largest stable learning rate by {_number(self.factor)}: η/(1-m) = "
            f"{_number(self.effective_rate)} bears a {kind} up to {_number(self.bound / self.rate)}"
            f", and {_number(self.undelayed_bound / self.rate)} without delay"
        )

    @property
    def warning(self) -> str | None:
        """What is to be said before training without knowing the loss's curvature; mostly nothing.

        Nobody knows then how far a run is from its edge. But a rate that was found without delay
        is usually within a factor of ten of it, and tells by its η/(1-m), whatever the momentum.
        So it is said where `plain_factor` is `WARN_AT` or more, and not for Adam and its like:
        the curvature that counts there adapts to the rate.

        Tried with SGD on digits (8 layers of 64, ReLU, He's first weights, mini-batches of 32, 6
        epochs, one seed; test accuracy by η/(1-m), - where it was no better than a guess):

            momentum  staleness  factor  plain_factor     .02   .05    .1    .2    .5
            0              0         1          1         .91   .96   .94   .83    -
            0.9            0         1          .05       .90   .90   .94   .93   .85
            0.9            1        38         2.0        .88   .89   .91   .81   .19
            0              3       4.5         4.5        .88   .78   .78   .60    -
            0.9            3       109         5.7        .82   .80   .39   .19   .13
            0              7       9.6         9.6        .83   .79   .71    -     -
            0.9            7       241          13        .42   .30   .22    -     -
        """
        if self.preconditions or self.plain_factor < WARN_AT:
            return None
        return (
            f"staleness {_number(self.staleness)} at stage {self.stage} divides the largest stable "
            f"learning rate by {_number(self.factor)}, and leaves η/(1-m), here "
            f"{_number(self.effective_rate)}, 1/{_number(self.plain_factor)} of what plain SGD "
            f"bears without delay. If this rate was found without delay, {ADVICE}"
        )

    def verdict(self, curvature: float) -> tuple[bool, str]:
        """Whether the run is stable at this curvature, and that in a line.

        Args:
            curvature: h, along the stage's own weights.
        """
        reached = self.rate * curvature
        facts = (
            f"η·h = {_number(reached)} at stage {self.stage} (curvature {_number(curvature)}), and "
            f"staleness {_number(self.staleness)} allows {_number(self.bound)}, no delay "
            f"{_number(self.undelayed_bound)}"
        )
        if reached <= self.bound:
            return True, f"stable at these weights, whose curvature training may raise: {facts}"
        if reached <= self.undelayed_bound:
            return False, f"stable without delay, unstable with: {facts}; {ADVICE}"
        return False, f"unstable with or without delay: {facts}; lower the learning rate"


WARN_AT = 5.0
"""Of `Stability.plain_factor`; three updates' delay with momentum 0.9 have 5.7."""

ADVICE = (
    "lower the learning rate or the momentum, or write corrections=[LearningRate()], "
    "update_every= larger, or rule=Delayed('predict')"
)
"""Each helps where it was tried: at momentum 0.9 and η/(1-m) = 0.1 in the table of `warning`,
staleness 3, from .39 to .82 (a fifth of the rate), .77 (no momentum, the same rate), .76, .69, .73;
at staleness 7 from .22 to .42, .63, .53, .52, .28."""


def stalest(stages: Iterable["Stage"]) -> Stability | None:
    """What the delay does to the stalest of these stages that trains, once the stream is warm.

    None where the law does not say: nothing is stale; something is done about it already (a
    correction that `changes_law`, weight prediction); or no optimizer is SGD or one of Adam's.
    """
    found = [
        examine(stage.index, stage.depth / stage.settings.update_every, stage.optimizers)
        for stage in stages
        if speaks_of(stage.rule, stage.kit.corrections)
    ]
    known = [law for law in found if law is not None]
    return max(known, key=lambda law: law.staleness, default=None)


def speaks_of(rule: Rule | None, corrections: Sequence[Correction]) -> bool:
    """Whether the law does: not of what is done about staleness. None is the schedule's own."""
    predicts = isinstance(rule, Delayed) and isinstance(rule.policy, Predict)
    return not predicts and not any(correction.changes_law for correction in corrections)


def examine(stage: int, staleness: float, optimizers: Iterable[Optimizer]) -> Stability | None:
    """The parameter group that is closest to its edge; None: nothing is stale, or none is known."""
    laws = [
        law
        for optimizer in optimizers
        for group in optimizer.param_groups
        if staleness and (law := _law(stage, staleness, optimizer, group)) is not None
    ]
    return max(laws, key=lambda law: law.rate / law.bound, default=None)


def _law(
    stage: int, staleness: float, optimizer: Optimizer, group: dict[str, Any]
) -> Stability | None:
    # A scheduler's warm-up begins low, and ends at one of these.
    rate = max(float(group[key]) for key in ("lr", "initial_lr", "max_lr") if key in group)
    if isinstance(optimizer, SGD):
        m, damping, nesterov = group["momentum"], group["dampening"], group["nesterov"]
    elif isinstance(optimizer, ADAMS):
        m, damping, nesterov = float(group["betas"][0]), float(group["betas"][0]), False
    else:
        return None
    if not (0 < rate < math.inf and 0 <= m < 1 and damping < 1):
        return None
    adapts = isinstance(optimizer, ADAMS)
    return Stability(
        stage, staleness, rate, m, damping if m else 0.0, nesterov, preconditions=adapts
    )


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
