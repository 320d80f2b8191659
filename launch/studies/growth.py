"""Whether a process grows: what it holds, looked at now and then, and the trend of that."""

import gc
import mmap
import os
import statistics
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from itertools import combinations
from pathlib import Path

import torch

__all__ = ["Limits", "Sample", "growth", "slowdown", "take", "theil_sen", "what_grew"]


@dataclass(frozen=True)
class Sample:
    """A process at one moment.

    Args:
        micro_batches: trained on so far.
        memory: resident bytes.
        objects: Python's, of those that refer to others.
        device_memory: bytes of tensors on its GPU; 0 without one.
        threads, files: of the process; files that are open, sockets among them.
        segments: of shared memory that it maps.
        processor, wall: seconds a micro-batch since the sample before.
    """

    micro_batches: int
    memory: int
    objects: int
    device_memory: int
    threads: int
    files: int
    segments: int
    processor: float
    wall: float

    WIDTH = 9

    def numbers(self) -> tuple[float, ...]:
        """Write it as numbers, for a tensor."""
        return astuple(self)

    @classmethod
    def from_numbers(cls, numbers: Sequence[float]) -> "Sample":
        """Read what `numbers` wrote."""
        *counts, processor, wall = numbers
        i, memory, objects, device_memory, threads, files, segments = map(int, counts)
        return cls(i, memory, objects, device_memory, threads, files, segments, processor, wall)


@dataclass(frozen=True)
class Limits:
    """How much is no growth, over a run.

    Args:
        memory: bytes of the process or of its GPU; Python and the system keep some back, and join
            pages to huge ones, 2 MiB at a time.
        objects: Python's.
        slowdown: of the last fifth's time a micro-batch over the second fifth's.
    """

    memory: int = 4 << 20
    objects: int = 200
    slowdown: float = 1.25


TRENDS = {"memory": "resident bytes", "objects": "objects", "device_memory": "GPU bytes"}
CONSTANTS = {"threads": "threads", "files": "open files", "segments": "shared-memory segments"}


def take(micro_batches: int, processor: float, wall: float) -> Sample:
    """Look at this process, on Linux; the times are seconds a micro-batch."""
    gc.collect()  # else it depends on when that last came by itself
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    maps = Path("/proc/self/maps").read_text().splitlines()
    return Sample(
        micro_batches=micro_batches,
        memory=pages * mmap.PAGESIZE,
        objects=len(gc.get_objects()),
        device_memory=torch.cuda.memory_allocated(),
        threads=len(os.listdir("/proc/self/task")),
        files=len(os.listdir("/proc/self/fd")),
        segments=sum("/memfd:headrace" in line or "/dev/shm/" in line for line in maps),
        processor=processor,
        wall=wall,
    )


def theil_sen(x: Sequence[float], y: Sequence[float]) -> float:
    """The median of the slopes between all pairs of points, which a jump or two do not move.

    Source: Sen, Estimates of the regression coefficient based on Kendall's tau, JASA 1968.
    """
    points = zip(x, y, strict=True)
    return statistics.median((d - b) / (c - a) for (a, b), (c, d) in combinations(points, 2))


def growth(samples: Sequence[Sample], name: str) -> float:
    """Of a figure after the first fifth of the samples: its slope times the micro-batches."""
    warm = _warm(samples)
    x = [sample.micro_batches for sample in warm]
    return theil_sen(x, [getattr(sample, name) for sample in warm]) * (x[-1] - x[0])


def slowdown(samples: Sequence[Sample]) -> float:
    """Processor time a micro-batch in the last fifth over that in the second.

    The quickest sample of each: what else the machine does only ever adds.
    """
    fifth = len(samples) // 5
    early, late = samples[fifth : 2 * fifth], samples[-fifth:]
    return min(s.processor for s in late) / min(s.processor for s in early)


def what_grew(samples: Sequence[Sample], limits: Limits) -> list[str]:
    """Name what grew over a run of at least 10 samples, and by how much; nothing, if all is well.

    Bytes and objects may have a trend within the limits; what is counted has one value throughout.
    """
    warm = _warm(samples)
    first, last = warm[0].micro_batches, warm[-1].micro_batches
    found = []
    for name, words in TRENDS.items():
        limit = limits.objects if name == "objects" else limits.memory
        if (grown := growth(samples, name)) > limit:
            found.append(
                f"{words}: {grown:,.0f} more from micro-batch {first:,} to {last:,}; {limit:,} is "
                "the limit"
            )
    for name, words in CONSTANTS.items():
        values = [getattr(sample, name) for sample in warm]
        if len(set(values)) > 1:
            found.append(
                f"{words}: from {min(values)} to {max(values)} between micro-batch {first:,} and "
                f"{last:,}; one number is expected"
            )
    if (ratio := slowdown(samples)) > limits.slowdown:
        found.append(
            f"processor time a micro-batch: {ratio:.2f} times that of the run's second fifth in "
            f"its last; {limits.slowdown:g} is the limit"
        )
    return found


def _warm(samples: Sequence[Sample]) -> Sequence[Sample]:
    return samples[len(samples) // 5 :]
