"""Choose the slack: the fewest extra micro-batches in flight that hide the links."""

import math
from collections.abc import Sequence

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
    count = 4 * depth[0] + 40
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
    half, most = count // 2, count - depth[0] - 1
    return (ends_of_first[most] - ends_of_first[half]) / (most - half)


def choose_slack(seconds: Sequence[float], hops: Sequence[float]) -> tuple[list[int], str]:
    """The smallest slack of each hop whose simulated period is within 2% of the slowest stage's.

    Args:
        seconds: each stage's work for one micro-batch. hops: the links' one-way times, in seconds.

    Returns:
        The slack of each hop, and a sentence that says why.
    """
    slowest = max(seconds)
    goal = TOLERANCE * slowest
    slack = [0] * len(hops)
    for uniform in range(LARGEST + 1):
        slack = [uniform] * len(hops)
        if period(seconds, hops, slack) <= goal:
            break
    for hop in range(len(hops)):
        while slack[hop] and period(seconds, hops, [*slack[:hop], slack[hop] - 1, *slack[hop + 1 :]]) <= goal:
            slack[hop] -= 1
    reached = period(seconds, hops, slack)
    without = period(seconds, hops, [0] * len(hops))
    milliseconds = ", ".join(f"{1e3 * hop:.2f}" for hop in hops)
    why = (
        f"slack {slack}: the slowest stage takes {1e3 * slowest:.2f} ms a micro-batch, the hops "
        f"{milliseconds} ms one way; predicted {1e3 * reached:.2f} ms a micro-batch, "
        f"{1e3 * without:.2f} ms without slack"
    )
    if reached > goal and math.isfinite(reached):
        why += f"; {LARGEST} is the most that is tried: the links limit this pipeline"
    return slack, why
