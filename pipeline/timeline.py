"""Where each stage's time went: spans on one clock, and what can be read off them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from time import perf_counter
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch

__all__ = ["WORKING", "Recorder", "Span", "Timeline", "Work", "chrome_trace"]


class Work(IntEnum):
    """What a stage can be at; SEND_DOWN and SEND_UP go on beside the others, in threads.

    LEARN is a synthesizer's, from what came back. WAIT is for a neighbour's message, DATA is the
    first stage's for its loader.
    """

    FORWARD, BACKWARD, UPDATE, LEARN, WAIT, DATA, SEND_DOWN, SEND_UP = range(8)


WORKING = (Work.FORWARD, Work.BACKWARD, Work.UPDATE, Work.LEARN)

_P = ParamSpec("_P")
_T = TypeVar("_T")


class Span(NamedTuple):
    """A piece of a stage's time.

    Args:
        work: what it went to.
        index: the micro-batch; of an update, the weight version it made; -1 of other messages.
        start, end: seconds on the clock of the timeline.
    """

    work: Work
    index: int  # type: ignore[assignment]  # not the tuple's method
    start: float
    end: float

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end - self.start


class Recorder:
    """One stage's clock: sums and counts of what its time goes to, and spans while it records.

    Spans are torch.profiler's too while it records: `record_function`, under the work's name.
    """

    def __init__(self) -> None:
        self.seconds = [0.0] * len(Work)
        self.counts = [0] * len(Work)
        self._spans: list[Span] | None = None

    def start(self) -> None:
        """Keep spans from now on."""
        self._spans = []

    def stop(self) -> list[Span]:
        """Give the spans since `start`, on this process's clock, and keep no more."""
        spans, self._spans = self._spans or [], None
        return spans

    def run(
        self, work: Work, index: int, act: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs
    ) -> _T:
        """Call a function, and note its time."""
        start = perf_counter()
        if self._spans is None:
            result = act(*args, **kwargs)
        else:
            with torch.profiler.record_function(f"{work.name.lower()} {index}"):
                result = act(*args, **kwargs)
        self.note(work, index, start)
        return result

    def note(self, work: Work, index: int, start: float) -> None:
        """Note that something which began then is over now."""
        end = perf_counter()
        self.seconds[work] += end - start
        self.counts[work] += 1
        if self._spans is not None:
            self._spans.append(Span(work, index, start, end))

    @property
    def working(self) -> float:
        """Seconds of forward, backward, update and learning so far."""
        return sum(self.seconds[work] for work in WORKING)


@dataclass(frozen=True)
class Timeline:
    """The spans of every stage over one window, on the first stage's clock.

    Args:
        stages: of each stage, its spans in the order of their starts; zero is the earliest.
    """

    stages: tuple[tuple[Span, ...], ...]

    @classmethod
    def of(cls, stages: Iterable[Iterable[Span]]) -> "Timeline":
        """Sort the spans and let the earliest start at zero."""
        rows = [sorted(spans, key=lambda span: (span.start, span.end)) for spans in stages]
        zero = min((spans[0].start for spans in rows if spans), default=0.0)
        return cls(
            tuple(
                tuple(s._replace(start=s.start - zero, end=s.end - zero) for s in spans)
                for spans in rows
            )
        )

    @property
    def seconds(self) -> float:
        """The end of the last span."""
        return max((span.end for spans in self.stages for span in spans), default=0.0)

    def window(self, start: float, end: float) -> "Timeline":
        """What lies between two moments, spans cut at the edges, beginning at zero again."""
        return Timeline(
            tuple(
                tuple(
                    s._replace(start=max(s.start, start) - start, end=min(s.end, end) - start)
                    for s in spans
                    if s.end > start and s.start < end
                )
                for spans in self.stages
            )
        )

    def steady(self) -> "Timeline":
        """The window in which every stage is at work: after the last to begin, before the first
        to end.
        """
        works = [[s for s in spans if s.work in WORKING] for spans in self.stages]
        if not all(works):
            return self
        start = max(spans[0].start for spans in works)
        end = min(max(s.end for s in spans) for spans in works)
        return self.window(start, end) if start < end else self

    def share(self, stage: int, *works: Work) -> float:
        """The share of the whole window that a stage spent so."""
        spent = sum(span.seconds for span in self.stages[stage] if span.work in works)
        return spent / self.seconds if self.seconds else 0.0

    def idle(self, stage: int) -> list[tuple[float, float]]:
        """Starts and ends of the pieces of the window in which nothing is recorded of a stage: the
        engine's own work between two spans, or another process had the processor.
        """
        gaps, covered = [], 0.0
        for span in (*self.stages[stage], Span(Work.WAIT, -1, self.seconds, self.seconds)):
            if span.start > covered:
                gaps.append((covered, span.start))
            covered = max(covered, span.end)
        return gaps


def chrome_trace(timelines: Mapping[str, Timeline]) -> dict[str, Any]:
    """Timelines as a Chrome trace, for Perfetto (ui.perfetto.dev) or chrome://tracing.

    Each named timeline is a group of processes, one a stage, of three threads: the stage's work,
    and what it sends down and up.
    """
    events: list[dict[str, Any]] = []
    process = 0
    for name, timeline in timelines.items():
        for stage, spans in enumerate(timeline.stages):
            events += _names(process, f"{name}: stage {stage}")
            events += [_event(process, span) for span in spans]
            events += [_idle(process, *gap) for gap in timeline.idle(stage)]
            process += 1
    return {"traceEvents": events, "displayTimeUnit": "ms"}


_THREADS = {Work.SEND_DOWN: 1, Work.SEND_UP: 2}


def _names(process: int, title: str) -> Sequence[dict[str, Any]]:
    meta = {"ph": "M", "pid": process}
    threads = ("work", "sends down", "sends up")
    return [
        {**meta, "name": "process_name", "args": {"name": title}},
        {**meta, "name": "process_sort_index", "args": {"sort_index": process}},
        *(
            {**meta, "name": "thread_name", "tid": tid, "args": {"name": thread}}
            for tid, thread in enumerate(threads)
        ),
    ]


def _event(process: int, span: Span) -> dict[str, Any]:
    kind = span.work.name.lower().replace("_", " ")
    name = kind if span.index < 0 else f"{kind} {span.index}"
    return _piece(process, _THREADS.get(span.work, 0), kind, name, span.start, span.end)


def _idle(process: int, start: float, end: float) -> dict[str, Any]:
    return _piece(process, 0, "idle", "idle", start, end)


def _piece(
    process: int, thread: int, kind: str, name: str, start: float, end: float
) -> dict[str, Any]:
    place = {"ph": "X", "pid": process, "tid": thread}
    return {"name": name, "cat": kind, **place, "ts": start * 1e6, "dur": (end - start) * 1e6}
