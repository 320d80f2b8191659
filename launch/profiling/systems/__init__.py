"""The systems that are compared, by their rows' names; one file for each way of training."""

from collections.abc import Callable, Sequence

from ...components import Component
from ...config import Config
from .alone import Ceiling, OneDevice
from .data_parallel import DataParallel
from .headrace import Configured, Delayed, Flushing, Recorded, Unlocked
from .system import System
from .torch_pipelining import Interleaved, Straight, ZeroBubble

__all__ = ["DEFAULT_ROWS", "SYSTEMS", "System", "default_rows", "observed"]

SYSTEMS: dict[str, Callable[[], System]] = {
    "one-device": OneDevice,
    "ceiling": Ceiling,
    "stream:stash": lambda: Delayed("stash"),
    "stream:stash+auto": lambda: Delayed("stash", slack="auto"),
    "stream:current": lambda: Delayed("current"),
    "stream:replay": lambda: Delayed("replay"),
    "stream:predict": lambda: Delayed("predict"),
    "stream:configured": Configured,
    "stream:synthetic": lambda: Unlocked("synthetic", lag=2),
    "stream:synthetic+free": lambda: Unlocked("synthetic", lag="free"),
    "stream:synthetic+unlock": lambda: Unlocked("synthetic", lag="free", inputs="synthetic"),
    "stream:local": lambda: Unlocked("local"),
    "stream:stash+recorded": lambda: Recorded("stash"),
    "gpipe": lambda: Flushing("gpipe"),
    "1f1b": lambda: Flushing("1f1b"),
    "torch-gpipe": lambda: Straight("ScheduleGPipe"),
    "torch-1f1b": lambda: Straight("Schedule1F1B"),
    "torch-interleaved": lambda: Interleaved("ScheduleInterleaved1F1B"),
    "torch-zero-bubble": lambda: ZeroBubble("ScheduleInterleavedZeroBubble"),
    "ddp": DataParallel,
}

DEFAULT_ROWS = [
    name
    for name in SYSTEMS
    if name not in ("stream:configured", "stream:stash+recorded", "stream:local")
    and not name.startswith("stream:synthetic")
]
"""Those that any network can run: what a synthesizer or a head must look like depends on it."""


def default_rows(config: Config) -> list[str]:
    """What is compared if nothing is said: with a rule that has no row, the configured stream."""
    rule = config.pipeline.rule
    own = rule is not None and not (
        isinstance(rule, Component) and rule.class_path in ("delayed", "exact")
    )
    return [*(["stream:configured"] if own else []), *DEFAULT_ROWS]


def observed(rows: Sequence[str]) -> str:
    """The row whose timeline is shown: the first of a stream, or else stashing's."""
    streams = [row for row in rows if row.startswith("stream:")]
    return streams[0].partition("+recorded")[0] if streams else "stream:stash"
