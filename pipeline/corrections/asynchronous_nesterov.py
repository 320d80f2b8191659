"""Asynchronous Nesterov: the look-ahead takes a correction's place (Ajanthan et al. 2025).

With d = γ (w_t - w_{t-1}) a gradient is taken at w + d, and w_{t+1} = w_t + d - η (1 - γ) g. In the
variable w + d, which is what torch keeps, that is SGD with Nesterov's momentum γ at the rate
η (1 - γ): so the method is a choice of optimizer, and there is nothing to do but to make it.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch.optim import SGD, NAdam, Optimizer

from ..errors import InputError
from .correction import Correction

if TYPE_CHECKING:
    from ..stage import Stage

__all__ = ["AsynchronousNesterov"]


class AsynchronousNesterov(Correction):
    """Make SGD's momentum Nesterov's, each gradient weighing 1 - γ; NAdam is so already.

    With NAdam the paper has betas (.99, .999), momentum_decay .004 and a decoupled weight decay of
    .01; its first beta is to be .9 at least. On every stage, late or not.
    """

    at_servers = False
    takes_momentum = True

    def __init__(self) -> None:
        self._discount = 1.0

    def attach(self, stage: "Stage") -> None:
        if stage.optimizers and all(isinstance(each, NAdam) for each in stage.optimizers):
            _check_nadam(stage.optimizers)
        elif stage.optimizers:
            self._discount = 1 - _momentum(stage.optimizers)
            for optimizer in stage.optimizers:
                for group in optimizer.param_groups:
                    group["nesterov"] = True

    def factor(self, staleness: int) -> float:
        return self._discount


def _check_nadam(optimizers: Sequence[Optimizer]) -> None:
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        if group["betas"][0] < 0.9:
            raise InputError(
                f"asynchronous_nesterov looks ahead by the momentum, and this NAdam has betas "
                f"{tuple(group['betas'])}: write betas [0.99, 0.999]"
            )


def _momentum(optimizers: Sequence[Optimizer]) -> float:
    """The one momentum of them all."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    momenta = {float(group.get("momentum", 0)) for group in groups}
    known = all(isinstance(optimizer, SGD) for optimizer in optimizers)
    if not known or len(momenta) != 1 or 0.0 in momenta:
        kinds = " and ".join(type(optimizer).__name__ for optimizer in optimizers)
        raise InputError(
            "asynchronous_nesterov is SGD with one momentum above 0, or NAdam, and this is "
            f"{kinds}: write optimizer NAdam with betas [0.99, 0.999], or SGD with momentum 0.9"
        )
    if any(group["dampening"] for group in groups):
        raise InputError(
            "asynchronous_nesterov knows no dampening: leave it out of SGD's arguments"
        )
    return momenta.pop()
