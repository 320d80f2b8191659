"""Which faults, when and to which jobs: drawn from a seed, the same for the same arguments."""

import random
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from .damage import Cut, Delete, Flip, NoManifest, Partial
from .disk import Fill
from .fault import Fault, Moment
from .halt import Halt, HaltForGood, Pause
from .kill import Kill, KillTwo
from .orphan import Orphan
from .poison import Poison
from .preempt import Preempt
from .workload import BATCH, EVERY, SAMPLES, WORKLOADS

__all__ = ["KINDS", "Trial", "draw"]

KINDS: dict[str, tuple[type[Fault], int]] = {
    "kill": (Kill, 8),
    "two": (KillTwo, 4),
    "pause": (Pause, 6),
    "halt": (Halt, 3),
    "halted": (HaltForGood, 1),
    "preempt": (Preempt, 6),
    "torchrun": (Orphan, 5),
    "cut": (Cut, 3),
    "flip": (Flip, 3),
    "delete": (Delete, 2),
    "manifest": (NoManifest, 2),
    "half": (Partial, 2),
    "full": (Fill, 0),
    "nan": (Poison, 0),
}
"""By name, and how many of each in a bag to draw from, but the first bag, which has one of each;
those with none open a job of their own."""

IN_A_JOB = 6
ORDER = ("1f1b", "stream", "1f1b", "nan", "stream", "full")
STARTING = 0.25
"""The share of faults that come while ranks start, of those that can."""


@dataclass
class Trial:
    """One job, and what befalls it, in order."""

    workload: str
    faults: list[Fault]
    poisoned: int | None = None


def draw(
    count: int, seed: int, kinds: Collection[str] = tuple(KINDS), most: int = IN_A_JOB
) -> Iterator[Trial]:
    """So many faults, in jobs of all workloads that these kinds of faults are for.

    Args:
        most: faults in a job.
    """
    draws = random.Random(seed)
    poisoned = draws.randrange(20 * BATCH, SAMPLES)
    follow = any(KINDS[kind][1] for kind in kinds)
    workloads = [name for name in ORDER if (name in kinds if name in KINDS else follow)]
    bags: dict[str, list[type[Fault]]] = {}
    number = 0
    while count:
        name = workloads[number % len(workloads)]
        size = min(count, most) if follow else 1
        chosen = [KINDS[name][0]] if name in KINDS else []
        while len(chosen) < size:
            if not (bag := bags.get(name)):
                bag = bags[name] = _fill(name, kinds, draws, evenly=not bags)
            chosen.append(bag.pop())
        starts = [k == 0 or chosen[k - 1] is not Pause for k in range(size)]
        faults = [_make(kind, k, draws, starts[k]) for k, kind in enumerate(chosen)]
        yield Trial(name, faults, poisoned if name == "nan" else None)
        count, number = count - size, number + 1


def _fill(
    workload: str, kinds: Collection[str], draws: random.Random, evenly: bool
) -> list[type[Fault]]:
    """A bag of the faults that are for a workload; evenly, one of each."""
    bag: list[type[Fault]] = []
    for kind in kinds:
        fault, many = KINDS[kind]
        if not (fault.moves_drain and WORKLOADS[workload].drains):
            bag += [fault] * (min(many, 1) if evenly else many)
    draws.shuffle(bag)
    return bag


def _make(kind: type[Fault], place: int, draws: random.Random, starts: bool) -> Fault:
    """The faults of a job are three checkpoints apart: a damaged one is passed by then.

    Args:
        starts: ranks start before it, at the job's beginning or after the fault before.
    """
    own = random.Random(draws.getrandbits(32))
    starting = starts and kind.while_starting and draws.random() < STARTING
    if starting:
        return kind(own, Moment(0, draws.uniform(0, 4), starting=True))
    after = 2 * EVERY + place * 40 + draws.randrange(EVERY)
    return kind(own, Moment(after, draws.uniform(0, 0.3)))
