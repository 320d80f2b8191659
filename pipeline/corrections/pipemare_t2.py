"""PipeMare's T2: in the backward, an estimate of the weights of the forward (Yang et al. 2021)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import InputError
from .correction import Correction

if TYPE_CHECKING:
    from ..stage import Stage

__all__ = ["PipeMareT2", "follow", "look_back"]


def follow(drift: Tensor, now: Tensor, before: Tensor, gamma: float) -> Tensor:
    """δ ← γ δ + (1 - γ) (w_{t+1} - w_t): a moving average of what an update does."""
    return torch.lerp(now - before, drift, gamma)


def look_back(weight: Tensor, drift: Tensor, staleness: int) -> Tensor:
    """u = w - τ δ: about where the weights were τ updates ago."""
    return torch.add(weight, drift, alpha=-staleness)


class PipeMareT2(Correction):
    """Run backwards through the old activations with u = w - τ δ, not with the newest weights.

    It is for `Delayed('current')`, which keeps no weights: one copy of them, for δ, replaces the
    one a version that `Delayed('stash')` keeps.

    Args:
        decay: D; δ's average forgets all but this share of an update in τ updates,
            γ = D^(1/τ). (About e^-2 in the paper, from memory.)

    Raises:
        ValueError: it is not between 0 and 1.
    """

    at_servers = False
    stands_in = True
    keeps_last = True

    state = ("_drift",)

    def __init__(self, decay: float = 0.135) -> None:
        if not isinstance(decay, int | float) or not 0 < decay < 1:
            raise ValueError(f"decay={decay!r}: give a number between 0 and 1")
        self.decay = float(decay)
        self._weights: Mapping[str, Tensor] = {}
        self._drift: dict[str, Tensor] = {}
        self._stage: Stage | None = None

    def attach(self, stage: "Stage") -> None:
        if stage.depth and stage.recopies_weights:
            raise InputError(
                "pipemare_t2: under torch.compile or autocast a backward may use copies of the "
                "forward's weights, for which nothing can stand in: leave one of the two out"
            )
        if stage.depth and stage.settings.batch_size is not None:
            raise InputError(
                "pipemare_t2 must know how many micro-batches an update has, which tells how many "
                "updates a gradient is late, and batch_size= is in samples: write update_every= in "
                "place of batch_size=, or rule=Delayed(weights='stash') without pipemare_t2"
            )
        self._weights, self._stage = stage.trainable, stage

    def backward_weights(self, staleness: int) -> Mapping[str, Tensor] | None:
        if staleness == 0 or not self._drift:
            return None
        return {
            name: look_back(weight.detach(), self._drift[name], staleness)
            for name, weight in self._weights.items()
        }

    def after_update(self, before: Mapping[str, Tensor], rates: Mapping[str, float]) -> None:
        gamma = self._gamma()
        for name, weight in self._weights.items():
            held = self._drift.get(name)
            held = torch.zeros_like(weight) if held is None else held
            self._drift[name] = follow(held, weight.detach(), before[name], gamma)

    def _gamma(self) -> float:
        if self._stage is None or not self._stage.depth:
            return 0.0
        late = self._stage.depth / self._stage.settings.update_every  # slack='auto' deepens it
        return float(self.decay ** (1 / late))
