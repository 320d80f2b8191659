"""The peak of memory that a system takes on this rank, over what was there before."""

import ctypes
import gc
import re
from contextlib import suppress
from pathlib import Path

import torch

__all__ = ["PeakMemory"]


class PeakMemory:
    """Bytes from its making on: the allocator's on a GPU, else the process's resident ones.

    Shared pages count on every process that has touched them. NaN where the system does not tell.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            self._before: float = torch.cuda.memory_allocated(device)
        else:
            with suppress(OSError, AttributeError):  # another C library keeps what was freed
                ctypes.CDLL(None).malloc_trim(0)
            with suppress(OSError):  # the peak falls back to what is there now
                Path("/proc/self/clear_refs").write_text("5")
            self._before = _resident("VmRSS")

    def bytes(self) -> float:
        """The peak so far."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before
        return max(0.0, _resident("VmHWM") - self._before)


def _resident(name: str) -> float:
    with suppress(OSError):
        found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        if found is not None:
            return float(found[1]) * 1024
    return float("nan")
