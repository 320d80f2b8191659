"""Learning rates over a run, by its number of updates."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

__all__ = ["cosine_with_warmup"]


def cosine_with_warmup(
    optimizer: Optimizer, total: int, warmup: float = 0.05, final: float = 0.0
) -> LambdaLR:
    """From near 0 up to the optimizer's own rate in a straight line, then down half a cosine.

    Args:
        total: updates in the run.
        warmup: the share of them that climb, in [0, 1).
        final: the last rate, as a share of the highest.

    Raises:
        ValueError: `total` below 1, or a share out of range.
    """
    if total < 1:
        raise ValueError(f"total={total}: give the number of updates in the run")
    if not 0.0 <= warmup < 1.0 or not 0.0 <= final <= 1.0:
        raise ValueError(f"warmup={warmup}, final={final}: give shares, in [0, 1) and [0, 1]")
    climb = round(warmup * total)

    def factor(update: int) -> float:
        if update < climb:
            return (update + 1) / climb
        done = min((update - climb) / (total - climb), 1.0)
        return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * done))

    return LambdaLR(optimizer, factor)
