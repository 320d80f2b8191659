"""Which faults, when and to which jobs: drawn from a seed, the same for the same arguments."""

import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from .damage import Cut, Delete, Flip, NoManifest, Partial
from .disk import Fill
from .fault import Fault, Moment
from .halt import Delay, Halt, HaltForGood, Pause
from .kill import Kill, KillReplica, KillServer, KillTwo
from .orphan import Orphan
from .poison import Poison, PoisonGradient
from .preempt import Preempt
from .workload import EVERY, POISONED, WORKLOADS

__all__ = ["KINDS", "ORDER", "Trial", "draw"]

KINDS: dict[str, tuple[type[Fault], int]] = {
    "kill": (Kill, 8),
    "two": (KillTwo, 4),
    "replica": (KillReplica, 4),
    "server": (KillServer, 8),
    "pause": (Pause, 6),
    "delay": (Delay, 3),
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
    "gradient": (PoisonGradient, 0),
}
"""By name, and how many of each in a bag to draw from, but a workload's first bag, which has one of
each; those with none open a job of their own, of the same name."""

IN_A_JOB = 6
ORDER = (
    *("1f1b", "allreduce", "stream", "downpour", "nan", "1f1b"),
    *("stream", "gradient", "allreduce", "full", "downpour"),
)
STARTING = 0.25
"""The share of faults that come while ranks start, of those that can."""


@dataclass
class Trial:
    """One job, and what befalls it, in order."""

    workload: str
    faults: list[Fault]
    poisoned: int | None = None


def draw(
    count: int,
    seed: int,
    kinds: Collection[str] = tuple(KINDS),
    most: int = IN_A_JOB,
    jobs: Sequence[str] = ORDER,
) -> Iterator[Trial]:
    """So many faults, in jobs that these kinds of faults are for.

    Args:
        most: faults in a job.
        jobs: which, in turn, and again.

    Raises:
        ValueError: there is no such job.
    """
    draws = random.Random(seed)
    poisoned = draws.choice(POISONED)
    workloads = [name for name in jobs if _opens(name, kinds)]
    if not workloads:
        raise ValueError(f"no job of {','.join(jobs)} is one for {','.join(kinds)}")
    bags: dict[str, list[type[Fault]]] = {}
    number = 0
    while count:
        name = workloads[number % len(workloads)]
        chosen = [KINDS[name][0]] if name in KINDS else []
        size = min(count, most) if _suited(name, kinds) else 1
        while len(chosen) < size:
            if not (bag := bags.get(name)):
                bag = bags[name] = _fill(name, kinds, draws, evenly=name not in bags)
            chosen.append(bag.pop())
        starts = [k == 0 or not issubclass(chosen[k - 1], Pause) for k in range(size)]
        faults = [_make(kind, k, draws, starts[k]) for k, kind in enumerate(chosen)]
        yield Trial(name, faults, poisoned if WORKLOADS[name].poison else None)
        count, number = count - size, number + 1


def _opens(workload: str, kinds: Collection[str]) -> bool:
    """Whether one of these faults can be the first of such a job."""
    return workload in kinds if workload in KINDS else bool(_suited(workload, kinds))


def _suited(workload: str, kinds: Collection[str]) -> list[tuple[type[Fault], int]]:
    """The faults that can follow in such a job."""
    found = [KINDS[kind] for kind in kinds]
    return [(fault, n) for fault, n in found if n and fault.suits(WORKLOADS[workload])]


def _fill(
    workload: str, kinds: Collection[str], draws: random.Random, evenly: bool
) -> list[type[Fault]]:
    """A bag of the faults that are for a workload; evenly, one of each."""
    bag: list[type[Fault]] = []
    for fault, many in _suited(workload, kinds):
        bag += [fault] * (1 if evenly else many)
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
