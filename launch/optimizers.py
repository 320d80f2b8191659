"""Optimizers of several parts: each stage's matrices by one, everything else by another."""

from collections.abc import Sequence

from torch import nn
from torch.optim import Muon, NAdam, Optimizer

__all__ = ["muon"]


def muon(
    params: list[tuple[str, nn.Parameter]],
    lr: float = 0.01,
    momentum: float = 0.95,
    weight_decay: float = 0.1,
    *,
    others: Sequence[str | int] = (),
    others_lr: float | None = None,
    others_betas: tuple[float, float] = (0.98, 0.999),
) -> list[Optimizer]:
    """Muon for the matrices of hidden layers (Jordan et al. 2024), NAdam for all else.

    Args:
        lr, momentum, weight_decay: Muon's.
        others: names of layers (the first part of a parameter's name) whose matrices are NAdam's
            as well: embeddings and the output layer, by custom.
        others_lr, others_betas: NAdam's; None is `lr`.
    """
    named = {str(layer) for layer in others}
    matrices = [
        (name, p) for name, p in params if p.dim() == 2 and name.partition(".")[0] not in named
    ]
    theirs = {name for name, _ in matrices}
    rest = [(name, p) for name, p in params if name not in theirs]
    made: list[Optimizer] = []
    if matrices:
        made.append(Muon(matrices, lr=lr, momentum=momentum, weight_decay=weight_decay))
    if rest:
        rate = lr if others_lr is None else others_lr
        made.append(NAdam(rest, lr=rate, betas=others_betas, decoupled_weight_decay=True))
    return made
