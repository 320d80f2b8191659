"""Who is who: replicas x stages over the ranks, and the parameter servers after them."""

from dataclasses import dataclass

__all__ = ["Grid"]


@dataclass(frozen=True)
class Grid:
    """Rank r·n + j is stage j of replica r; rank R·n + j, if there is one, serves its weights.

    Args:
        rank: this process.
        servers: ranks that serve: n, or 0.
        seat: of a replica that is a job of its own, among the `seats` of those who share weights.
    """

    stages: int
    replicas: int = 1
    servers: int = 0
    rank: int = 0
    seat: int = 0
    seats: int = 1

    @property
    def is_server(self) -> bool:
        """Whether this process serves weights."""
        return self.rank >= self.replicas * self.stages

    @property
    def replica(self) -> int:
        """This process's replica; on a server the number after the last one."""
        return self.rank // self.stages

    @property
    def share(self) -> tuple[int, int]:
        """Which mini-batches are this replica's: (r, R) for r, r+R, r+2R, …"""
        return (self.seat, self.seats) if self.seats > 1 else (self.replica, self.replicas)

    @property
    def stage(self) -> int:
        """This process's stage."""
        return self.rank % self.stages

    @property
    def pipelines(self) -> list[list[int]]:
        """The ranks of each replica, in the stages' order."""
        n = self.stages
        return [[*range(r * n, (r + 1) * n)] for r in range(self.replicas)]

    @property
    def names(self) -> list[str]:
        """What to call each rank, for messages."""
        return [self._name(rank) for rank in range(self.replicas * self.stages + self.servers)]

    def _name(self, rank: int) -> str:
        replica, stage = divmod(rank, self.stages)
        if replica == self.replicas:
            return f"the server of stage {stage} (rank {rank})"
        of = f"replica {replica} of {self.replicas}, " if self.replicas > 1 else ""
        return f"{of}stage {stage} of {self.stages} (rank {rank})"
