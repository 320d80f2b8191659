"""What the command line asks of a profile."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.pipeline import Link

__all__ = ["Options"]


@dataclass(frozen=True)
class Options:
    """`headrace.launch.throughput --help` says more.

    Args:
        steps: None is about a second's.
        out: None is a new folder.
        link: emulated; None is the machine's own.
        fixes: the file to write the advised configuration into a copy of. overrides: the keys on
            the command line, which go into it as well.
    """

    rows: Sequence[str]
    rounds: int
    steps: int | None
    micro_batches: Sequence[int]
    out: Path | None
    link: Link | None
    predicts: bool
    fixes: Path | None
    overrides: Mapping[str, Any]
    timeline: str
    torch_profiler: bool
