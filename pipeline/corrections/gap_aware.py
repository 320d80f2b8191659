"""Gap-aware: a gradient counts for less where the weights have gone far (Barkai et al. 2020)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .correction import Correction

if TYPE_CHECKING:
    from ..stage import Stage

__all__ = ["GapAware", "dampen", "follow_squares"]


def follow_squares(ra: Tensor, v: Tensor, gamma: float) -> Tensor:
    """RA ← Γ RA + (1 - Γ) v², element by element."""
    return torch.addcmul(ra * gamma, v, v, value=1 - gamma)


def dampen(gradient: Tensor, now: Tensor, then: Tensor, usual: Tensor) -> Tensor:
    """g / (1 + |w_now - w_then| / C): C is how far an update usually goes, element by element; of a
    sparse g those that it has.
    """
    divisor = 1 + (now.detach() - then.detach()).abs() / usual
    if not gradient.is_sparse:
        return (gradient / divisor).to(gradient.dtype)
    # Not coalesced, which would add up what occurs twice in another order than the optimizer.
    at, values = gradient._indices(), gradient._values()
    return torch.sparse_coo_tensor(
        at,
        (values / divisor[tuple(at)]).to(values.dtype),
        gradient.shape,
        is_coalesced=gradient.is_coalesced(),
        check_invariants=False,
    )


class GapAware(Correction):
    """Divide each element of a gradient by 1 + how many usual updates its weight has moved since.

    C = η_max (√(RA / (1 - Γ^t)) + ε), RA the average of v², and v what the optimizer steps along:
    (w_t - w_{t+1}) / η, which is SGD's momentum buffer, and defined for every optimizer. It needs
    the weights of the forward, which `Delayed('stash')` keeps.

    Args:
        decay: Γ. eps: ε.

    Raises:
        ValueError: a decay outside [0, 1), or an eps that is not above 0.
    """

    at_servers = False
    needs_weights = True
    keeps_last = True

    state = ("_squares", "_highest", "_updates")

    def __init__(self, decay: float = 0.999, eps: float = 1e-8) -> None:
        if not isinstance(decay, int | float) or not 0 <= decay < 1:
            raise ValueError(f"decay={decay!r}: give a number from 0 to below 1")
        if not isinstance(eps, int | float) or not eps > 0:
            raise ValueError(f"eps={eps!r}: give a number above 0")
        self.decay, self.eps = float(decay), float(eps)
        self._weights: Mapping[str, Tensor] = {}
        self._squares: dict[str, Tensor] = {}
        self._highest: dict[str, float] = {}
        self._updates = 0

    def attach(self, stage: "Stage") -> None:
        self._weights = stage.trainable

    def change_all(
        self,
        gradients: dict[str, Tensor],
        now: Mapping[str, Tensor],
        then: Mapping[str, Tensor],
    ) -> None:
        if not self._updates:
            return
        share = 1 - self.decay**self._updates
        for name, gradient in gradients.items():
            if not self._highest.get(name):
                continue  # nothing has moved this weight yet
            usual = (self._squares[name] / share).sqrt_().add_(self.eps).mul_(self._highest[name])
            gradients[name] = dampen(gradient, now[name], then[name], usual)

    def after_update(self, before: Mapping[str, Tensor], rates: Mapping[str, float]) -> None:
        if not any(rates.values()):
            return  # it was skipped
        for name, weight in self._weights.items():
            rate = rates.get(name, 0.0)
            self._highest[name] = max(self._highest.get(name, 0.0), rate)
            v = (before[name] - weight.detach()) / rate if rate else torch.zeros_like(weight)
            held = self._squares.get(name)
            # In half precision the average would not fall, and C vanish.
            wide = v.float() if v.dtype.itemsize < 4 else v
            held = torch.zeros_like(wide) if held is None else held
            self._squares[name] = follow_squares(held, wide, self.decay)
        self._updates += 1
