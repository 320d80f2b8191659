"""Weight prediction: forward with the weights as they will be when the gradient is applied.

SpecTrain (Chen et al. 2018), linear weight prediction (Kosson et al. 2021), and the sum of what the
momentum alone will still move (FTPipe, Eliad et al. 2021), for SGD, Adam, AdamW and NAdam.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer

from ..errors import InputError
from ..learning_rates import ComingRates
from ..stateful import get, put
from .correction import Correction, Fill

if TYPE_CHECKING:
    from ..stage import Stage

__all__ = ["WeightPrediction", "ahead_of_adam", "ahead_of_nadam", "ahead_of_sgd", "extrapolate"]

FORMS = ("last_update", "linear", "momentum")


def extrapolate(weight: Tensor, before: Tensor, staleness: float) -> Tensor:
    """ŵ = w + τ (w_t - w_{t-1}): the last update, τ times over (SpecTrain, from weights)."""
    return torch.lerp(before, weight, 1.0 + staleness)


def ahead_of_sgd(
    weight: Tensor, v: Tensor, rates: Sequence[float], m: float, nesterov: bool = False
) -> Tensor:
    """ŵ = w - v Σ_k η_k m^k: what SGD's momentum v ← m v will still move, k = 1 … τ.

    With m = 1 and equal rates it is the linear ŵ = w - η τ v. Nesterov's step is m v + g: one m
    more.

    Args:
        rates: η_k, of the updates to come.
    """
    distance = math.fsum(rate * m ** (k + nesterov) for k, rate in enumerate(rates, 1))
    return torch.add(weight, v, alpha=-distance)


def ahead_of_adam(
    weight: Tensor,
    mean: Tensor,
    square: Tensor,
    step: int,
    rates: Sequence[float],
    betas: tuple[float, float],
    eps: float,
    decay: float = 0.0,
    linear: bool = False,
) -> Tensor:
    """ŵ = w Π_k (1 - η_k λ) - Σ_k η_k β1^k M / (1 - β1^{t+k}) / (√V̂ + ε): k = 1 … τ.

    Linear: each of the updates to come has the direction M̂ / (√V̂ + ε) of the last.

    Args:
        mean, square: Adam's M and V after `step` updates.
        decay: λ, decoupled (AdamW); each step's decay acts on what the ones before left.
    """
    beta1, beta2 = betas
    distance, shrink = 0.0, 1.0
    for k, rate in enumerate(rates, 1):
        power, count = (0, step) if linear else (k, step + k)
        shrink *= 1 - rate * decay
        distance = distance * (1 - rate * decay) + rate * beta1**power / (1 - beta1**count)
    scale = (square / (1 - beta2**step)).sqrt_().add_(eps)
    return torch.addcdiv(weight * shrink, mean, scale, value=-distance)


def ahead_of_nadam(
    weight: Tensor,
    mean: Tensor,
    square: Tensor,
    step: int,
    product: float,
    rates: Sequence[float],
    betas: tuple[float, float],
    eps: float,
    momentum_decay: float,
    decay: float = 0.0,
    linear: bool = False,
) -> Tensor:
    """As `ahead_of_adam`, of NAdam: step t + k moves η_k μ_{t+k+1} β1^k M / (1 - Π_{i ≤ t+k+1} μ_i)
    with μ_i = β1 (1 - .96^{i ψ} / 2), once there are no new gradients (Dozat 2016, as in torch).

    Args:
        product: Π_{i ≤ t} μ_i.
        momentum_decay: ψ.
    """
    beta1, beta2 = betas

    def mu(i: int) -> float:
        return float(beta1 * (1 - 0.5 * 0.96 ** (i * momentum_decay)))

    distance, shrink, products = 0.0, 1.0, product
    for k, rate in enumerate(rates, 1):
        products *= mu(step + k)
        moved = mu(step + k + 1) * beta1**k / (1 - products * mu(step + k + 1))
        if linear:
            moved = 1 / (1 - product * mu(step + 1))
        shrink *= 1 - rate * decay
        distance = distance * (1 - rate * decay) + rate * moved
    scale = (square / (1 - beta2**step)).sqrt_().add_(eps)
    return torch.addcdiv(weight * shrink, mean, scale, value=-distance)


@dataclass(frozen=True)
class _Home:
    """Where a weight is moved: its parameter, optimizer, and the number of its group."""

    parameter: Tensor
    optimizer: Optimizer
    group: int


class WeightPrediction(Correction):
    """Run a micro-batch forward, and backward, with weights extrapolated over its staleness τ.

    It stands on `Delayed('stash')`, which keeps those weights for the backward.

    Args:
        form: 'last_update' (the last update τ times over; with any optimizer), 'linear' (the
            direction of the optimizer's momentum, τ times over) or 'momentum' (what its momentum
            alone will still move); the last two with SGD, Adam, AdamW and NAdam, at the learning
            rates that the scheduler will set, times what the samples of each update make of them.
        strength: how much of that way to go.
        of: the class of the optimizer whose weights to predict, as in 'Muon', where a stage has
            several; None: all weights.

    Raises:
        ValueError: another form, a strength that is no number above 0, or `of` no name.
    """

    at_servers = False
    predicts = True

    def __init__(
        self, form: str = "last_update", strength: float = 1.0, of: str | None = None
    ) -> None:
        if form not in FORMS:
            raise ValueError(f"form={form!r}: write one of {', '.join(FORMS)}")
        if not isinstance(strength, int | float) or not 0 < strength < math.inf:
            raise ValueError(f"strength={strength!r}: give a number above 0, 1 for all of the way")
        if not isinstance(of, str | None):
            raise ValueError(f"of={of!r}: give the name of an optimizer's class, as in of='Muon'")
        self.form, self.strength, self.of = form, float(strength), of
        self.keeps_last = form == "last_update"
        self.reads_moments = not self.keeps_last
        self._last: Mapping[str, Tensor] = {}
        self._left: set[str] = set()
        self._homes: dict[str, _Home] = {}
        self._rates: dict[Optimizer, ComingRates] = {}
        self._factor: Callable[[int], float] = lambda staleness: 1.0
        self._batch_factors: Callable[[], list[float]] = list

    @property
    def kind(self) -> str:
        return f"{type(self).__name__} {self.form}"

    def state_dict(self) -> dict[str, Any]:
        return {"last": get(self._last), "rates": get([*self._rates.values()])}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        self._last = put(self._last, state["last"], device)
        put([*self._rates.values()], state["rates"], device)

    def catch_up(self, updates: int) -> None:
        for coming in self._rates.values():
            for _ in range(updates):
                coming.passed()

    def attach(self, stage: "Stage") -> None:
        self._left = _moved_by_others(stage, self.of)
        if self.keeps_last or stage.depth == 0:
            return
        names = {id(parameter): name for name, parameter in stage.owned.items()}
        for optimizer in stage.optimizers:
            if not isinstance(optimizer, SGD | Adam | NAdam):  # AdamW is an Adam
                raise InputError(
                    f"weight_prediction with form={self.form!r} knows SGD, Adam, AdamW and NAdam, "
                    f"and this is {type(optimizer).__name__}: write form='last_update', which is "
                    "defined for every optimizer"
                )
            if isinstance(optimizer, SGD) and not all(
                group["momentum"] for group in optimizer.param_groups
            ):
                raise InputError(
                    f"weight_prediction with form={self.form!r} goes by the momentum, and this SGD "
                    "has none: write a momentum above 0, or form='last_update'"
                )
            self._rates[optimizer] = ComingRates(optimizer, stage.settings.scheduler)
            for number, group in enumerate(optimizer.param_groups):
                for parameter in group["params"]:
                    home = _Home(parameter, optimizer, number)
                    self._homes[names[id(parameter)]] = home
        self._factor, self._batch_factors = stage.discount, stage.coming_batch_factors

    def look_ahead(self, staleness: int) -> Fill | None:
        if staleness == 0 or (self.keeps_last and not self._last):
            return None
        if self.keeps_last:
            far = self.strength * staleness
            return lambda name, weight: (
                weight if name in self._left else extrapolate(weight, self._last[name], far)
            )
        discount = self.strength * self._factor(staleness)
        factors = [discount * factor for factor in self._batch_factors()]
        return lambda name, weight: (
            weight if name in self._left else self._by_momentum(name, weight, factors)
        )

    def _by_momentum(self, name: str, weight: Tensor, factors: Sequence[float]) -> Tensor:
        """Over as many updates as there are factors of their rates."""
        home = self._homes.get(name)
        state = home.optimizer.state.get(home.parameter) if home else None
        if home is None or not state:
            return weight  # not moved yet, or by nobody
        group = home.optimizer.param_groups[home.group]
        coming = self._rates[home.optimizer].of(home.group, len(factors))
        rates = [factor * rate for factor, rate in zip(factors, coming, strict=True)]
        return self._with_rates(home.optimizer, group, state, weight, rates)

    def _with_rates(
        self,
        optimizer: Optimizer,
        group: dict[str, Any],
        state: dict[str, Any],
        weight: Tensor,
        rates: list[float],
    ) -> Tensor:
        linear = self.form == "linear"
        if isinstance(optimizer, SGD):
            v = state.get("momentum_buffer")
            if v is None:
                return weight
            m, nesterov = float(group["momentum"]), bool(group["nesterov"])
            return ahead_of_sgd(weight, v, rates, *((1.0, False) if linear else (m, nesterov)))
        decoupled = isinstance(optimizer, AdamW) or bool(group.get("decoupled_weight_decay"))
        decay = float(group["weight_decay"]) if decoupled else 0.0
        betas, eps, step = group["betas"], float(group["eps"]), int(state["step"])
        square = state.get("max_exp_avg_sq", state["exp_avg_sq"])
        mean = state["exp_avg"]
        if isinstance(optimizer, NAdam):
            product, psi = float(state["mu_product"]), float(group["momentum_decay"])
            return ahead_of_nadam(
                weight, mean, square, step, product, rates, betas, eps, psi, decay, linear
            )
        return ahead_of_adam(weight, mean, square, step, rates, betas, eps, decay, linear)

    def after_update(self, before: Mapping[str, Tensor], rates: Mapping[str, float]) -> None:
        self._last = before
        for coming in self._rates.values():
            coming.passed()


def _moved_by_others(stage: "Stage", kind: str | None) -> set[str]:
    """The names of the weights that no optimizer of the class `kind` moves.

    Raises:
        InputError: there is no such optimizer.
    """
    if kind is None or not stage.optimizers:
        return set()
    kinds = [type(optimizer).__name__ for optimizer in stage.optimizers]
    if kind not in kinds and not hasattr(torch.optim, kind):  # another stage may have it
        raise InputError(
            f"weight_prediction of={kind!r} is no optimizer of torch; stage {stage.index} has "
            f"{' and '.join(kinds)}: write the name of an optimizer's class, as in of='Muon'"
        )
    ours = {
        id(parameter)
        for optimizer in stage.optimizers
        if type(optimizer).__name__ == kind
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    return {name for name, parameter in stage.owned.items() if id(parameter) not in ours}
