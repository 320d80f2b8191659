"""Delayed gradients: a stage updates on the gradient of a micro-batch it ran forward a while ago.

The delay is the schedule's; the four policies differ in the weights that the forward and the
backward of one micro-batch use (Chen et al. 2012; PipeDream, Narayanan et al. 2019; Features
Replay, Huo et al. 2018; SpecTrain, Chen et al. 2018).
"""

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..corrections.weight_prediction import extrapolate
from ..versions import Version, Versions, copy_all
from .rule import Rule

if TYPE_CHECKING:
    from ..schedule import Schedule
    from ..stage import Stage

__all__ = ["Current", "Delayed", "Predict", "Predictor", "Replay", "Stash", "extrapolate"]

Predictor = Callable[[Tensor, Tensor, int], Tensor]
"""From a weight, its value one update ago and the staleness to come: the weight by then."""


class Current(Rule):
    """Newest weights forward; backward through the old activations with the weights of by then."""

    reads_newest = True

    def attach(self, stage: "Stage") -> None:
        cause = "torch.compile" if stage.compiled else "autocast"
        if stage.depth and stage.recopies_weights:
            warnings.warn(
                f"weights='current' on stage {stage.index}: under {cause} the backward may use "
                "copies of the weights made in the forward, so it behaves like weights='stash' "
                "there; leave it out, or write weights='stash' to say so",
                stacklevel=2,
            )


class Stash(Rule):
    """Backward with the very weights of the forward: one copy for each version in flight.

    They are the newest, or what a correction predicts from them.
    """

    keeps_weights = True
    looks_ahead = True

    def __init__(self) -> None:
        self.versions = Versions()

    @property
    def copies(self) -> int:
        return len(self.versions.copies)

    def weights(self, stage: "Stage", index: int) -> Version | None:
        if stage.depth == 0:
            return None
        staleness = stage.closed - stage.version
        fill = stage.kit.look_ahead(staleness)
        if fill is None:
            return self.versions.take((stage.version, 0), stage.trainable)
        return self.versions.take((stage.version, staleness), stage.trainable, fill)


class Replay(Rule):
    """Forward again with the newest weights once the gradient is there; least memory."""

    recomputes = True


class Predict(Rule):
    """Forward and backward with the weights extrapolated to where the gradient will be applied."""

    keeps_weights = True
    state = ("before",)

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self.versions = Versions()
        self.before: dict[str, Tensor] = {}

    @property
    def copies(self) -> int:
        return len(self.versions.copies) + bool(self.before)

    def weights(self, stage: "Stage", index: int) -> Version | None:
        if stage.depth == 0:
            return None
        staleness = stage.closed - stage.version
        if not self.before or staleness == 0:
            return self.versions.take((stage.version, 0), stage.trainable)

        def predict(name: str, weight: Tensor) -> Tensor:
            return self.predictor(weight, self.before[name], staleness)

        return self.versions.take((stage.version, staleness), stage.trainable, predict)

    def before_update(self, stage: "Stage") -> None:
        if stage.depth == 0:
            return
        if not self.before:
            self.before = {n: torch.empty_like(w) for n, w in stage.trainable.items()}
        copy_all(self.before, stage.trainable)


class Delayed(Rule):
    """Update on delayed gradients, under `stream`.

    Args:
        weights: 'stash', 'current', 'replay' or 'predict'.
        predictor: for 'predict'; None is `extrapolate`.

    Raises:
        ValueError: another word for weights, or a predictor that would not be used.
    """

    state = ("policy",)

    def __init__(self, weights: str = "stash", predictor: Predictor | None = None) -> None:
        policies: dict[str, Callable[[], Rule]] = {
            "stash": Stash,
            "current": Current,
            "replay": Replay,
            "predict": lambda: Predict(predictor or extrapolate),
        }
        if weights not in policies:
            raise ValueError(f"weights={weights!r}: write one of {', '.join(policies)}")
        if predictor is not None and weights != "predict":
            raise ValueError(f"predictor= has no meaning with weights={weights!r}: leave it out")
        self.policy = policies[weights]()
        self.recomputes = self.policy.recomputes
        self.keeps_weights = self.policy.keeps_weights
        self.looks_ahead = self.policy.looks_ahead
        self.reads_newest = self.policy.reads_newest

    def check(self, schedule: "Schedule", stages: int) -> None:
        if schedule.flushes:
            raise ValueError(
                f"rule delayed under schedule {schedule.name!r}: nothing is stale under a flush; "
                "write rule=Exact(), or schedule='stream'"
            )

    @property
    def kind(self) -> str:
        return type(self.policy).__name__

    @property
    def copies(self) -> int:
        return self.policy.copies

    def attach(self, stage: "Stage") -> None:
        self.policy.attach(stage)

    def weights(self, stage: "Stage", index: int) -> Version | None:
        return self.policy.weights(stage, index)

    def before_update(self, stage: "Stage") -> None:
        self.policy.before_update(stage)
