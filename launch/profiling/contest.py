"""Let systems train in turn, round after round, and note what each did."""

import io
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict, dataclass, field

from headrace.pipeline.errors import first_line
from headrace.pipeline.partition import Partition

from .memory import PeakMemory
from .systems import SYSTEMS
from .systems.system import Facts, System
from .workload import Workload

__all__ = ["Entry", "best", "hold"]


@dataclass
class Entry:
    """One system at one number of micro-batches.

    Args:
        micro_batches: None where the number does not matter to it.
        refused: why it did not run.
        rates: samples a second, of each round.
        facts, memory: of each rank in the latest round; bytes.
    """

    system: str
    micro_batches: int | None
    refused: str | None = None
    rates: list[float] = field(default_factory=list)
    facts: list[Facts] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """The median samples a second; NaN if it did not run."""
        return statistics.median(self.rates) if self.rates else math.nan

    def ratio(self, other: "Entry | None") -> float:
        """The median over rounds of its rate over another's in the same round."""
        if other is None or not self.rates or not other.rates:
            return math.nan
        return statistics.median(a / b for a, b in zip(self.rates, other.rates, strict=True))


def hold(
    work: Workload,
    cut: Partition,
    rows: Iterable[str],
    micro_batches: Iterable[int],
    rounds: int,
    watch: Callable[[Entry, int], None] = lambda entry, k: None,
    between: Callable[[], None] = lambda: None,
) -> list[Entry]:
    """Measure all rows, `rounds` times over; the same entries on every rank.

    Args:
        watch: called before each measurement. between: called in each round.
    """
    entries = [
        Entry(row, m) for row in rows for m in (_counts(SYSTEMS[row](), work, micro_batches))
    ]
    for entry in entries:
        entry.refused = SYSTEMS[entry.system]().refuses(work, cut, entry.micro_batches or 1)
    for k in range(rounds):
        for entry in entries:
            if entry.refused is None:
                watch(entry, k)
                # What a pipeline says of itself, it says once.
                with nullcontext() if k == 0 else redirect_stdout(io.StringIO()):
                    _measure_or_say(work, cut, entry)
        between()
    return entries


def _counts(system: System, work: Workload, counts: Iterable[int]) -> list[int | None]:
    return [*counts] if system.cuts_mini_batches else [None]


def _measure_or_say(work: Workload, cut: Partition, entry: Entry) -> None:
    """Say which row an error is of, unless a pipeline of it has said more."""
    try:
        _measure(work, cut, entry)
    except Exception as error:
        if not getattr(error, "headrace_reported", False):
            what = f"{type(error).__name__}: {first_line(error)}"
            sys.stderr.write(f"headrace: row {entry.system} failed on rank {work.rank}: {what}\n")
            sys.stderr.flush()
        raise


def _measure(work: Workload, cut: Partition, entry: Entry) -> None:
    """Build, warm up, measure, close."""
    memory = PeakMemory(work.device)
    system = SYSTEMS[entry.system]()
    system.build(work, cut, entry.micro_batches or 1)
    batches = work.batches
    warm = [batches[k % len(batches)] for k in range(system.warm_up_steps())]
    measured = batches[: system.steps(len(batches))]
    system.train(warm)
    system.begin()
    work.barrier()
    start = time.perf_counter()
    system.train(measured)
    if work.device.type == "cuda":
        work.barrier()
    seconds = time.perf_counter() - start
    samples = sum(map(work.count_samples, measured))
    entry.rates.append(work.gather(system.rate(work, samples, seconds))[0])
    entry.facts = [Facts(**each) for each in work.gather(asdict(system.facts(seconds)))]
    system.close()
    entry.memory = work.gather(memory.bytes())


def best(entries: Iterable[Entry]) -> list[Entry]:
    """Of each system the entry with the highest rate, in the order in which they came."""
    chosen: dict[str, Entry] = {}
    for entry in entries:
        held = chosen.get(entry.system)
        if held is None or not held.rates or entry.rate > held.rate:
            chosen[entry.system] = entry if held is None or entry.rates else held
    return list(chosen.values())
