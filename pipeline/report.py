"""What a pipeline tells about its training, and the books from which the first stage makes it."""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .batch_size.sampled import Sampled
from .stateful import Stateful

__all__ = [
    "Books",
    "Figures",
    "Progress",
    "Report",
    "Row",
    "ShardStatistics",
    "StageStatistics",
    "known",
]


@dataclass(frozen=True)
class Figures:
    """What a stage's rule tells of its own learning; NaN is what it has not.

    Args:
        synthesizer_loss: ‖M(h) - δ‖², the mean over samples of late.
        cosine: between the synthetic and the arrived gradient, of late: 1 is a perfect synthesizer.
        local_loss: of a stage's own auxiliary head, of late.
    """

    synthesizer_loss: float = math.nan
    cosine: float = math.nan
    local_loss: float = math.nan


@dataclass(frozen=True)
class Report:
    """What a call of `train` did; the same on every rank.

    It covers the micro-batches whose loss has reached the first stage, with the gradient where one
    flows back; under `stream` those still in flight are in the next report.

    Args:
        loss: the mean over samples, less those whose loss was not finite; NaN if there were none.
        updates: of the first stage.
        seconds: on the first stage's clock.
        staleness: of each stage's latest update known to the first stage.
        skipped: updates skipped, over all stages.
        stopped: it ended early, asked to by a SIGTERM.
    """

    loss: float
    samples: int
    micro_batches: int
    updates: int
    seconds: float
    skipped: int
    staleness: tuple[float, ...]
    stopped: bool = False

    @property
    def samples_per_second(self) -> float:
        """Samples reported, per second of the call."""
        return self.samples / self.seconds if self.seconds > 0 else math.nan

    def numbers(self) -> tuple[float, ...]:
        """Write it as numbers, for a header."""
        head = (self.loss, self.samples, self.micro_batches, self.updates, self.seconds)
        return (*head, self.skipped, self.stopped, *self.staleness)

    @classmethod
    def from_numbers(cls, n: Sequence[float]) -> "Report":
        """Read what `numbers` wrote."""
        head = (n[0], int(n[1]), int(n[2]), int(n[3]), n[4], int(n[5]))
        return cls(*head, tuple(n[7:]), bool(n[6]))


@dataclass(frozen=True)
class Progress:
    """What the first stage knows at a log interval.

    Args:
        micro_batch: how many have been fed since the pipeline was built.
        samples: those reported in this call of `train` so far.
        loss: the mean since the last log.
        samples_per_second: since the last log.
        staleness, busy: of each stage; busy is its share of the time since the last log, NaN where
            nothing had been heard of the stage then.
        update: the first stage's weight version.
        learning_rate: the first stage's.
        synthesizer_loss, cosine, local_loss: of each stage (`Figures`), None where it has none.
        lag: of each stage, updates between a synthetic gradient's use and the arrival of the one
            that it stood for; None where there is none.
        batch_size: samples in the first stage's latest update; 0 before there is one.
    """

    micro_batch: int
    samples: int
    loss: float
    samples_per_second: float
    staleness: tuple[float, ...]
    busy: tuple[float, ...]
    update: int
    learning_rate: float
    synthesizer_loss: tuple[float | None, ...] = ()
    cosine: tuple[float | None, ...] = ()
    local_loss: tuple[float | None, ...] = ()
    lag: tuple[float | None, ...] = ()
    batch_size: int = 0


@dataclass(frozen=True)
class StageStatistics:
    """One stage since the pipeline was built.

    Args:
        staleness: how many gradients were applied at each staleness, in updates.
        busy: the share of the time in `train` spent in forward, backward, update and learning;
            this share and the next two since `reset_shares`, and NaN before any training.
        waiting: the share spent waiting for a neighbour's message.
        data: the share that the first stage spent waiting for its loader.
        in_flight: the most micro-batches that were between their forward and their backward.
        copies: of the weights, kept for the micro-batches in flight.
        lag: of a stage that waits for no gradient: how many of those that its synthesizer learned
            from came how late, in its updates since that micro-batch's forward.
        synthesizer_loss, cosine, local_loss: of its rule (`Figures`), None where it has none.
        replica: whose stage it is.
    """

    stage: int
    updates: int
    skipped: int
    staleness: dict[int, int]
    busy: float
    waiting: float
    data: float
    learning_rate: float
    in_flight: int
    copies: int
    lag: dict[int, int] = field(default_factory=dict)
    synthesizer_loss: float | None = None
    cosine: float | None = None
    local_loss: float | None = None
    replica: int = 0

    def numbers(self) -> list[float]:
        """Write it as numbers, for a tensor."""
        head = (self.stage, self.updates, self.skipped, self.busy, self.waiting, self.data)
        learning = (self.synthesizer_loss, self.cosine, self.local_loss)
        return [
            *head,
            *(self.learning_rate, self.in_flight, self.copies),
            *(math.nan if value is None else value for value in learning),
            len(self.staleness),
            *_pairs(self.staleness),
            *_pairs(self.lag),
        ]

    @classmethod
    def from_numbers(cls, n: Sequence[float]) -> "StageStatistics":
        """Read what `numbers` wrote."""
        stage, updates, skipped, busy, waiting, data, rate, in_flight, copies, *rest = n
        synthesizer_loss, cosine, local_loss, bins, *pairs = rest
        return cls(
            stage=int(stage),
            updates=int(updates),
            skipped=int(skipped),
            staleness=_read_pairs(pairs[: 2 * int(bins)]),
            busy=busy,
            waiting=waiting,
            data=data,
            learning_rate=rate,
            in_flight=int(in_flight),
            copies=int(copies),
            lag=_read_pairs(pairs[2 * int(bins) :]),
            synthesizer_loss=known(synthesizer_loss),
            cosine=known(cosine),
            local_loss=known(local_loss),
        )

    @property
    def lag_mean(self) -> float | None:
        """The mean lag; None where nothing came that could be late."""
        return _mean(self.lag) if self.lag else None

    @property
    def staleness_mean(self) -> float:
        """The mean staleness over all gradients applied."""
        return _mean(self.staleness)

    @property
    def staleness_max(self) -> int:
        """The largest staleness of a gradient applied."""
        return max(self.staleness, default=0)


@dataclass(frozen=True)
class ShardStatistics:
    """A stage's parameter server since it began.

    Args:
        updates: of its weights.
        learning_rate: its first parameter group's; None where it has no optimizer.
        staleness: how many micro-batches' gradients were applied at each staleness, in its updates
            since their forward.
        pushed: gradients that came from each replica.
    """

    stage: int
    updates: int
    learning_rate: float | None
    staleness: dict[int, int]
    pushed: dict[int, int]

    def numbers(self) -> list[float]:
        """Write it as numbers, for a header."""
        rate = math.nan if self.learning_rate is None else self.learning_rate
        head = (self.stage, self.updates, rate, len(self.staleness))
        return [*head, *_pairs(self.staleness), *_pairs(self.pushed)]

    @classmethod
    def from_numbers(cls, n: Sequence[float]) -> "ShardStatistics":
        """Read what `numbers` wrote."""
        stage, updates, rate, bins, *pairs = n
        split = 2 * int(bins)
        staleness, pushed = _read_pairs(pairs[:split]), _read_pairs(pairs[split:])
        return cls(int(stage), int(updates), known(rate), staleness, pushed)

    @property
    def staleness_mean(self) -> float:
        """The mean staleness over all gradients applied."""
        return _mean(self.staleness)


class Row(NamedTuple):
    """A stage's figures as they ride up to the first stage with each gradient, a number each.

    Args:
        clock: seconds, on the stage's own clock, at which they were taken.
        variance, squared_norm: of its latest update (`batch_size.Sampled`); NaN is what it has not.
    """

    staleness: float = 0.0
    busy_seconds: float = 0.0
    clock: float = 0.0
    skipped: float = 0.0
    lag: float = math.nan
    synthesizer_loss: float = math.nan
    cosine: float = math.nan
    local_loss: float = math.nan
    variance: float = math.nan
    squared_norm: float = math.nan

    @classmethod
    def read(cls, numbers: Sequence[float]) -> "list[Row]":
        """Read the rows of consecutive stages."""
        width = len(cls._fields)
        return [cls(*numbers[k : k + width]) for k in range(0, len(numbers), width)]


def known(value: float) -> float | None:
    """A number, or None for the NaN that stands for none."""
    return None if math.isnan(value) else value


def _mean(counts: Mapping[int, int]) -> float:
    """Of a histogram; 0 for an empty one."""
    total = sum(counts.values())
    return sum(value * count for value, count in counts.items()) / total if total else 0.0


def _pairs(counts: Mapping[int, int]) -> list[int]:
    """A histogram as numbers: value, count, value, count, …"""
    return [*chain.from_iterable(sorted(counts.items()))]


def _read_pairs(numbers: Sequence[float]) -> dict[int, int]:
    return {int(v): int(c) for v, c in zip(numbers[::2], numbers[1::2], strict=True)}


class Books(Stateful):
    """The first stage's account of losses; they stay on the device until the log interval."""

    state = ("_numbers", "_fed", "_sums", "_seconds", "_skipped", "_version")

    def __init__(self, stages: int) -> None:
        self._numbers: tuple[float, ...] = Row() * stages
        self.log: Callable[[Progress], None] | None = None
        self.log_every = 50
        self._fed = 0
        self._losses: list[Tensor] = []
        self._samples: list[int] = []
        self._out: deque[int] = deque()  # samples of those fed whose loss is not known yet
        self._sums = [0.0, 0, 0, 0]  # loss, samples with a finite one, samples, micro-batches
        self._skipped = 0.0
        self._seconds = 0.0  # of calls that were stopped
        self._start: float | None = None  # of the call that is under way
        self._last = time.perf_counter()
        self._version = 0
        self._rows = self.rows

    @property
    def rows(self) -> list[Row]:
        """Every stage's figures, as the latest micro-batch brought them."""
        return Row.read(self._numbers)

    @property
    def sampled(self) -> Sampled:
        """Over all stages, as the latest micro-batch brought it; NaN while one has told nothing."""
        rows = self.rows
        return Sampled(sum(row.variance for row in rows), sum(row.squared_norm for row in rows))

    def begin(self) -> None:
        """A call of `train` begins; what was drained in between counts for it."""
        self._start = self._last = time.perf_counter()
        self._rows = self.rows

    def note(
        self,
        loss: Tensor,
        numbers: tuple[float, ...],
        version: int,
        rate: float,
        batch_size: int = 0,
    ) -> None:
        """The next micro-batch's loss (0-d, on the device) has come back, with the numbers."""
        self._losses.append(loss.detach())
        self._samples.append(self._out.popleft())
        self._numbers = numbers
        if not self._rows[0].clock:
            self._rows = self.rows  # the first ever: shares are counted from here
        if len(self._losses) == self.log_every:
            self._log(version, rate, batch_size)

    def fed(self, samples: int) -> None:
        """A micro-batch has gone in."""
        self._fed += 1
        self._out.append(samples)

    def _log(self, version: int, rate: float, batch_size: int) -> None:
        loss, samples = self._read()
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        rows = self.rows
        shares = tuple(
            # What a stage far below does is known later than the first losses.
            (new.busy_seconds - old.busy_seconds) / max(new.clock - old.clock, 1e-9)
            if old.clock
            else math.nan
            for old, new in zip(self._rows, rows, strict=True)
        )
        self._rows = rows
        staleness = tuple(row.staleness for row in rows)
        if self.log:
            rate_of_samples = samples / seconds
            self.log(
                Progress(
                    self._fed,
                    int(self._sums[2]),
                    loss,
                    rate_of_samples,
                    staleness,
                    shares,
                    version,
                    rate,
                    synthesizer_loss=tuple(known(row.synthesizer_loss) for row in rows),
                    cosine=tuple(known(row.cosine) for row in rows),
                    local_loss=tuple(known(row.local_loss) for row in rows),
                    lag=tuple(known(row.lag) for row in rows),
                    batch_size=batch_size,
                )
            )

    def _read(self) -> tuple[float, int]:
        """Read the losses noted since the last time: the one wait for the device."""
        samples = sum(self._samples)
        if not samples:
            return math.nan, 0
        values = torch.stack([loss.double() for loss in self._losses]).tolist()
        pairs = [(v, s) for v, s in zip(values, self._samples, strict=True) if math.isfinite(v)]
        total, counted = math.fsum(v * s for v, s in pairs), sum(s for _, s in pairs)
        for k, value in enumerate((total, counted, samples, len(values))):
            self._sums[k] += value
        self._losses, self._samples = [], []
        return total / counted if counted else math.nan, samples

    def state_dict(self) -> dict[str, Any]:
        """What it knows; it reads the losses from the device."""
        self._read()
        return super().state_dict() | {"_seconds": self._so_far}

    @property
    def _so_far(self) -> float:
        running = 0.0 if self._start is None else time.perf_counter() - self._start
        return self._seconds + running

    def close(self, version: int, stopped: bool = False) -> Report:
        """The call of `train` ends: report what came back since the last report. One that is
        stopped will be gone on with, and is in the report of then.
        """
        self._read()
        self.log = None
        loss, counted, samples, micro_batches = self._sums
        rows = self.rows
        before, skipped = self._skipped, sum(row.skipped for row in rows)
        updates, seconds = version - self._version, self._so_far
        self._seconds, self._start = seconds if stopped else 0.0, None
        if not stopped:
            self._sums = [0.0, 0, 0, 0]
            self._skipped, self._version = skipped, version
        return Report(
            loss=loss / counted if counted else math.nan,
            samples=int(samples),
            micro_batches=int(micro_batches),
            updates=updates,
            seconds=seconds,
            skipped=int(skipped - before),
            staleness=tuple(row.staleness for row in rows),
            stopped=stopped,
        )
