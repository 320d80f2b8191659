"""How two ranks tell each other where to find what they are to be connected by."""

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Introduction"]


class Introduction:
    """Two ranks that talk over a gloo group of their own, until they need it no more.

    The calling thread waits for the other rank. gloo could carry a pipeline's messages too, but its
    send returns when the receiver has taken the tensor, a round trip later; and its thread would
    wake a hundred times a second.
    """

    def __init__(self, group: dist.ProcessGroup, peer: int) -> None:
        self._group, self._peer = group, peer

    def tell(self, *numbers: int) -> None:
        """Send some numbers."""
        dist.send(torch.tensor(numbers, dtype=torch.int64), self._peer, group=self._group)

    def hear(self, count: int) -> list[int]:
        """Receive so many."""
        numbers: Tensor = torch.zeros(count, dtype=torch.int64)
        dist.recv(numbers, self._peer, group=self._group)
        return numbers.tolist()

    def close(self) -> None:
        """End the group."""
        dist.destroy_process_group(self._group)
