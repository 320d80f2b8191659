"""Choose the slack: the fewest extra micro-batches in flight that hide the links."""

import math
from collections.abc import Sequence
from itertools import pairwise

from .schedule import Backward, Forward, Schedule, Update, depths, play

__all__ = ["choose_slack", "period"]

LARGEST = 8
TOLERANCE = 1.02


def period(seconds: Sequence[float], hops: Sequence[float], slack: Sequence[int]) -> float:
    """The time between two micro-batches of a stream in its steady state, by simulation.

    Args:
        seconds: each stage's work for one micro-batch, of which a third is the forward.
        hops: the links' one-way times, in seconds.
        slack: of each hop.
    """
    stages = len(seconds)
    depth = depths(stages, slack)
    count = 6 * depth[0] + 40
    stream = Schedule("stream", flushes=False)
    orders = [
        [a for a in play(stream.actions(d, 1, 0, 0), count) if not isinstance(a, Update)]
        for d in depth
    ]
    end: dict[tuple[type, int, int], float] = {}
    clock, place = [0.0] * stages, [0] * stages
    ends_of_first = []
    while any(place[j] < len(orders[j]) for j in range(stages)):
        for j in range(stages):
            while place[j] < len(orders[j]):
                action = orders[j][place[j]]
                kind = type(action)
                source, hop = (j - 1, j - 1) if kind is Forward else (j + 1, j)
                start = clock[j]
                if 0 <= source < stages:
                    arrival = end.get((kind, source, action.index))
                    if arrival is None:
                        break
                    start = max(start, arrival + hops[hop])
                share = 1 / 3 if kind is Forward else 2 / 3
                clock[j] = end[kind, j, action.index] = start + share * seconds[j]
                place[j] += 1
                if kind is Backward and j == 0:
                    ends_of_first.append(clock[j])
    return _steady_period(ends_of_first[: count - depth[0]], depth[0] + 1)


def _steady_period(ends: Sequence[float], longest: int) -> float:
    """The mean step of a sequence that ends in a pattern: behind slow links they come in bursts."""
    steps = [b - a for a, b in pairwise(ends)]
    for length in range(1, longest + 1):
        pairs = zip(steps[-2 * longest :], steps[-2 * longest - length : -length], strict=True)
        if all(math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-12) for a, b in pairs):
            return sum(steps[-length:]) / length
    half = len(ends) // 2
    return (ends[-1] - ends[half]) / (len(ends) - 1 - half)


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
