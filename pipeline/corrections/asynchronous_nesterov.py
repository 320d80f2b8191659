"""Asynchronous Nesterov: the look-ahead takes a correction's place (Ajanthan et al. 2025).

With d = γ (w_t - w_{t-1}) a gradient is taken at w + d, and w_{t+1} = w_t + d - η (1 - γ) g. In the
variable w + d, which is what torch keeps, that is SGD with Nesterov's momentum γ at the rate
η (1 - γ): so the method is a choice of optimizer, and there is nothing to do but to make it.
"""

from typing import TYPE_CHECKING

from torch.optim import SGD, NAdam

from ..errors import InputError
from .correction import Correction

if TYPE_CHECKING:
    from ..stage import Stage

__all__ = ["AsynchronousNesterov"]


class AsynchronousNesterov(Correction):
    """Make SGD's momentum Nesterov's, each gradient weighing 1 - γ; NAdam is so already.

    With NAdam the paper has betas (.99, .999), momentum_decay .004 and a decoupled weight decay of
    .01: what is asked of it here is momentum of .9 at least. On every stage, late or not.
    """

    at_servers = False

    def __init__(self) -> None:
        self._discount = 1.0

    def attach(self, stage: "Stage") -> None:
        for optimizer in stage.optimizers:
            if isinstance(optimizer, NAdam):
                continue
            groups = optimizer.param_groups
            momenta = {float(group.get("momentum", 0)) for group in groups}
            if not isinstance(optimizer, SGD) or len(momenta) != 1 or 0.0 in momenta:
                raise InputError(
                    "asynchronous_nesterov is SGD with one momentum above 0, or NAdam, and this is "
                    f"{type(optimizer).__name__}: write optimizer NAdam with betas [0.99, 0.999], "
                    "or SGD with momentum 0.9"
                )
            if any(group["dampening"] for group in groups):
                raise InputError(
                    "asynchronous_nesterov knows no dampening: leave it out of SGD's arguments"
                )
            for group in groups:
                group["nesterov"] = True
            self._discount = 1 - momenta.pop()

    def factor(self, staleness: int) -> float:
        return self._discount
