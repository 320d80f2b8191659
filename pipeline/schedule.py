"""Schedules: the order of work on one stage, as data; nothing here knows of torch.

A schedule yields what to do next: `Forward(i)`, `Backward(i)`, `Update()`, `Learn(i)`. It is a
generator that is told, in answer to each `Forward`, what came: a micro-batch that closes an update
(`True`), one that does not (`False`), or nothing more (`None`), which drains it. All are one loop
with three differences: how many micro-batches stay in flight behind a forward, whether a
mini-batch's end drains, and whether a stage waits for gradients at all. Three stages, one slot an
action (`draw` makes these):

    gpipe     F0 F1 F2 F3 .  .  .  .  B0 B1 B2 B3
              .  F0 F1 F2 F3 .  .  B0 B1 B2 B3 .
              .  .  F0 F1 F2 F3 B0 B1 B2 B3 .  .

    1f1b      F0 F1 F2 .  .  B0 F3 B1 .  B2 .  B3
              .  F0 F1 .  B0 F2 B1 F3 B2 .  B3 .
              .  .  F0 B0 F1 B1 F2 B2 F3 B3 .  .

    stream    F0 F1 F2 .  .  B0 F3 B1 F4 B2 F5 B3 F6 B4 F7 …    the next mini-batch's forward
              .  F0 F1 .  B0 F2 B1 F3 B2 F4 B3 F5 B4 F6 B5 …    fills what a flush leaves idle,
              .  .  F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5 F6 …    and every B is followed by an update

    unlocked  F0 B0 F1 B1 F2 B2 L0 F3 B3 L1 F4 B4 L2 F5 …       a stage that waits for no gradient:
              .  F0 B0 F1 B1 F2 B2 L0 F3 B3 L1 F4 B4 L2 …       Lk takes in what came back for k,
              .  .  F0 B0 F1 B1 F2 B2 F3 B3 F4 B4 F5 B5 …       `ahead` (here 2) later
"""

import math
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass

__all__ = [
    "SCHEDULES",
    "Action",
    "Backward",
    "Forward",
    "Learn",
    "Schedule",
    "Stretch",
    "Update",
    "depths",
    "draw",
]


@dataclass(frozen=True, slots=True)
class Forward:
    """Run micro-batch `index` forward, if there is one."""

    index: int


@dataclass(frozen=True, slots=True)
class Backward:
    """Take in what came back for micro-batch `index`, and run it backward."""

    index: int


@dataclass(frozen=True, slots=True)
class Update:
    """Move the weights."""


@dataclass(frozen=True, slots=True)
class Learn:
    """Have taken in what came back for micro-batch `index` and all before it.

    A stage that takes it in as it comes looks for more then; before the first, there may be some.
    """

    index: int


Action = Forward | Backward | Update | Learn
Actions = Generator[Action, bool | None, None]


def depths(
    stages: int, slack: int | Sequence[int], waits: Sequence[bool] | None = None
) -> tuple[int, ...]:
    """Micro-batches in flight behind a forward: d_j = d_{j+1} + 1 + s_j, and 0 at the last stage.

    Args:
        waits: whether each stage waits for its gradients; one that does not has none in flight.
            None: all do.

    Raises:
        ValueError: a slack that is negative, or a list that is not one number per hop.
    """
    hops = stages - 1
    slacks = [slack] * hops if isinstance(slack, int) else list(slack)
    if len(slacks) != hops or any(not isinstance(s, int) or s < 0 for s in slacks):
        raise ValueError(
            f"slack={slack!r}: give a whole number >= 0, or one for each of the {hops} hops "
            f"between {stages} stages, as in {[1] * hops}"
        )
    result = [0]
    for s, wait in zip(reversed(slacks), reversed((waits or [True] * stages)[:hops]), strict=True):
        result.append(result[-1] + 1 + s if wait else 0)
    return tuple(reversed(result))


@dataclass(frozen=True)
class Schedule:
    """A named order of work.

    Args:
        flushes: nothing stays in flight from one mini-batch to the next, so gradients are exact.
        unbounded: all micro-batches of a mini-batch go forward before the first goes back.
    """

    name: str
    flushes: bool
    unbounded: bool = False

    def depths(
        self, stages: int, slack: int | Sequence[int], waits: Sequence[bool] | None = None
    ) -> tuple[int, ...]:
        """Each stage's micro-batches in flight behind a forward; slack is the stream's alone."""
        return depths(stages, 0 if self.flushes else slack, waits)

    def actions(self, depth: float, start: int, ahead: int | None = None) -> Actions:
        """The actions of one stretch: a mini-batch, or the stream from one drain to the next.

        Under a flush only a mini-batch's last micro-batch closes an update.

        Args:
            depth: micro-batches in flight behind a forward.
            start: the stretch's first micro-batch, counted since training began.
            ahead: micro-batches sent on at most of which nothing has come back yet, on a stage
                that waits for no gradient; None on one that does.
        """
        if ahead is not None:
            depth = 0
        elif self.unbounded:
            depth = math.inf
        forward = backward = start
        marks: deque[bool] = deque()  # of those in flight
        closes, more = False, True
        while more or backward < forward:
            if more and forward - backward <= depth:
                mark = yield Forward(forward)
                if mark is None:
                    more = False
                else:
                    marks.append(mark)
                    forward += 1
            else:
                yield Backward(backward)
                backward += 1
                closes = marks.popleft()
                if closes and not self.flushes:
                    yield Update()
                if ahead is not None:
                    yield Learn(backward - 1 - ahead)
        if ahead is not None:
            yield Learn(backward - 1)
        if closes and self.flushes:
            yield Update()


SCHEDULES = {
    "gpipe": Schedule("gpipe", flushes=True, unbounded=True),
    "1f1b": Schedule("1f1b", flushes=True),
    "stream": Schedule("stream", flushes=False),
}


class Stretch:
    """A schedule's actions from nothing in flight to nothing in flight, so far as they came."""

    def __init__(self, actions: Actions) -> None:
        self._actions = actions
        next(actions)  # the first is a Forward

    def after(self, mark: bool | None) -> Iterator[Action]:
        """Answer the Forward that is due, and give the actions up to the next one."""
        try:
            action = self._actions.send(mark)
            while not isinstance(action, Forward):
                yield action
                action = next(self._actions)
        except StopIteration:
            return


def play(actions: Actions, marks: Iterable[bool]) -> Iterator[Action]:
    """List a stretch's actions when exactly these micro-batches come: whether each closes an
    update.
    """
    action, remaining = next(actions), iter(marks)
    while True:
        mark = next(remaining, None) if isinstance(action, Forward) else None
        if mark is not None or not isinstance(action, Forward):
            yield action
        try:
            action = actions.send(mark)
        except StopIteration:
            return


def draw(schedule: Schedule, stages: int, micro_batches: int, slack: int = 0) -> str:
    """Draw one stretch as a staircase, a row a stage and a slot an action (updates take none).

    A forward waits for the stage before, a backward for the stage after.
    """
    depth = schedule.depths(stages, slack)
    queues = [[*play(schedule.actions(d, 0), [False] * micro_batches)] for d in depth]
    rows: list[list[str]] = [[] for _ in range(stages)]
    done: set[tuple[type, int, int]] = set()
    while any(queues):
        slot = []
        for j, queue in enumerate(queues):
            ready = False
            if queue:
                action = queue[0]
                kind, i = type(action), getattr(action, "index", 0)
                source = j - 1 if kind is Forward else j + 1
                ready = not 0 <= source < stages or (kind, source, i) in done
            if ready:
                slot.append((kind, j, i))
                queue.pop(0)
            rows[j].append(f"{'F' if kind is Forward else 'B'}{i}" if ready else ".")
        done.update(slot)
    width = max(len(cell) for row in rows for cell in row) + 1
    return "\n".join("".join(cell.ljust(width) for cell in row).rstrip() for row in rows)
