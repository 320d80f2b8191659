"""Choose the slack: the fewest extra micro-batches in flight that hide the links."""

from collections.abc import Sequence

from . import throughput
from .link import Link
from .schedule import SCHEDULES
from .throughput import StageWork

__all__ = ["choose_slack", "period"]

LARGEST = 8
TOLERANCE = 1.02


def period(seconds: Sequence[float], hops: Sequence[float], slack: Sequence[int]) -> float:
    """The time between two micro-batches of a stream in its steady state (`throughput.period`).

    Args:
        seconds: each stage's work for one micro-batch, of which a third is the forward.
        hops: the links' one-way times, in seconds.
        slack: of each hop.
    """
    stages = [StageWork(work / 3, work * 2 / 3) for work in seconds]
    return throughput.period(SCHEDULES["stream"], stages, [Link(hop) for hop in hops], slack)


def choose_slack(seconds: Sequence[float], hops: Sequence[float]) -> tuple[list[int], str]:
    """The smallest slack of each hop whose simulated period is within 2% of the slowest stage's.

    Where the links do not allow that, within 2% of what `LARGEST` everywhere would give.

    Args:
        seconds: each stage's work for one micro-batch. hops: the links' one-way times, in seconds.

    Returns:
        The slack of each hop, and a sentence that says why.
    """
    slowest = max(seconds)
    goal = TOLERANCE * max(slowest, period(seconds, hops, [LARGEST] * len(hops)))
    slack = [0] * len(hops)
    for uniform in range(LARGEST + 1):
        slack = [uniform] * len(hops)
        if period(seconds, hops, slack) <= goal:
            break
    for hop in range(len(hops)):
        while slack[hop]:
            less = [s - (k == hop) for k, s in enumerate(slack)]
            if period(seconds, hops, less) > goal:
                break
            slack = less
    reached = period(seconds, hops, slack)
    without = period(seconds, hops, [0] * len(hops))
    milliseconds = ", ".join(f"{1e3 * hop:.2f}" for hop in hops)
    why = (
        f"slack {slack}: the slowest stage takes {1e3 * slowest:.2f} ms a micro-batch, the hops "
        f"{milliseconds} ms one way; predicted {1e3 * reached:.2f} ms a micro-batch, "
        f"{1e3 * without:.2f} ms without slack"
    )
    if reached > TOLERANCE * slowest:
        why += f"; {LARGEST} is the most that is tried: the links limit this pipeline"
    return slack, why
