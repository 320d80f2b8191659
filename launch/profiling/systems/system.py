"""What a system that trains must offer to be compared."""

from dataclasses import dataclass

from headrace.pipeline.partition import Partition

from ..workload import Batch, Workload

__all__ = ["Facts", "System"]


@dataclass(frozen=True)
class Facts:
    """What this rank's stage knows of itself after a measurement; NaN is what it does not know.

    Args:
        busy: share of the time in forward, backward and update. bubble: waiting for neighbours.
        staleness: of its gradients, in updates.
        depth: micro-batches in flight behind a forward, where the system has such a number.
        graphs: the most that were saved at a time. copies: of the weights.
    """

    busy: float = float("nan")
    bubble: float = float("nan")
    staleness: float = float("nan")
    depth: int | None = None
    graphs: int | None = None
    copies: int | None = None


class System:
    """One way of training the workload.

    Built, warmed up, measured and closed on all ranks; it must not keep anything after that.
    """

    cuts_mini_batches = False
    """Whether the number of micro-batches matters to it."""

    def refuses(self, work: Workload, cut: Partition, micro_batches: int) -> str | None:
        """Why it cannot run, the same on every rank; None if it can."""
        return None

    def build(self, work: Workload, cut: Partition, micro_batches: int) -> None:
        """Make ready to train."""
        raise NotImplementedError

    def train(self, batches: list[Batch]) -> None:
        """Train on these mini-batches."""
        raise NotImplementedError

    def warm_up_steps(self) -> int:
        """Mini-batches until it is at its usual pace."""
        return 3

    def steps(self, count: int) -> int:
        """How many mini-batches to measure of those there are."""
        return count

    def begin(self) -> None:
        """What `facts` is asked about begins now."""

    def facts(self, seconds: float) -> Facts:
        """Tell about the measurement, which took so long."""
        return Facts()

    def rate(self, work: Workload, samples: int, seconds: float) -> float:
        """Samples a second of the whole job, from those of this rank."""
        return samples / seconds

    def close(self) -> None:
        """Let go of everything."""
