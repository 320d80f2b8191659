"""The systems that are compared, by their rows' names; one file for each way of training."""

from collections.abc import Callable

from .alone import Ceiling, OneDevice
from .data_parallel import DataParallel
from .headrace import Flushing, Recorded, Stream
from .system import System
from .torch_pipelining import Interleaved, Straight, ZeroBubble

__all__ = ["DEFAULT_ROWS", "SYSTEMS", "System"]

SYSTEMS: dict[str, Callable[[], System]] = {
    "one-device": OneDevice,
    "ceiling": Ceiling,
    "stream:stash": lambda: Stream("stash"),
    "stream:stash+auto": lambda: Stream("stash", slack="auto"),
    "stream:current": lambda: Stream("current"),
    "stream:replay": lambda: Stream("replay"),
    "stream:predict": lambda: Stream("predict"),
    "stream:stash+recorded": lambda: Recorded("stash"),
    "gpipe": lambda: Flushing("gpipe"),
    "1f1b": lambda: Flushing("1f1b"),
    "torch-gpipe": lambda: Straight("ScheduleGPipe"),
    "torch-1f1b": lambda: Straight("Schedule1F1B"),
    "torch-interleaved": lambda: Interleaved("ScheduleInterleaved1F1B"),
    "torch-zero-bubble": lambda: ZeroBubble("ScheduleInterleavedZeroBubble"),
    "ddp": DataParallel,
}

DEFAULT_ROWS = [name for name in SYSTEMS if name != "stream:stash+recorded"]
