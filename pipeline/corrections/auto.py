"""What to do about late gradients, chosen by the optimizer: what did best in docs/staleness.md."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch.optim import SGD, Adam, Muon, NAdam, Optimizer

from .basis_rotation import BasisRotation, rotates
from .correction import Correction
from .gap_aware import GapAware
from .spike_compensation import SpikeCompensation
from .weight_prediction import WeightPrediction

if TYPE_CHECKING:
    from ..rules import Rule

__all__ = ["Auto"]


class Auto(Correction):
    """Choose by a stage's optimizers, where the rule is `Delayed('stash')`; elsewhere do nothing.

    Muon's weights are predicted by their last update, and its spikes compensated. Gradients of SGD
    with momentum are dampened by the gap, and its spikes compensated, if it is not Nesterov's.
    Adam, AdamW and NAdam move matrices in a rotated basis; where a weight decay that is added to
    the gradient or amsgrad does not allow that, weights are predicted by their moments. SGD without
    momentum is best let be, and so is any other optimizer.
    """

    at_servers = False
    changes_law = False

    def choose(
        self, late: bool, rule: "Rule", optimizers: Sequence[Optimizer]
    ) -> Sequence[Correction]:
        if not late or not rule.looks_ahead or not optimizers:
            return []
        if any(isinstance(optimizer, Muon) for optimizer in optimizers):
            return [WeightPrediction(of="Muon"), SpikeCompensation()]
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        if all(isinstance(optimizer, SGD) for optimizer in optimizers):
            if not all(group["momentum"] for group in groups):
                return []
            plain = not any(group["nesterov"] or group["dampening"] for group in groups)
            return [GapAware(), SpikeCompensation()] if plain else [GapAware()]
        if all(isinstance(optimizer, Adam | NAdam) for optimizer in optimizers):
            turns = all(rotates(group) for group in groups)
            return [BasisRotation() if turns else WeightPrediction("momentum")]
        return []
