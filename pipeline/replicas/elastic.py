"""Elastic averaging: replicas that explore, drawn to a common centre (Zhang et al. 2015)."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..message import Kind, Message
from ..report import ShardStatistics
from ..settings import Settings
from .client import Client
from .peers import Peers, Steps
from .replicas import Meeting
from .request import check_whole
from .served import Served, check_number
from .server import pack

if TYPE_CHECKING:
    from ..engine import Engine
    from ..stage import Stage

__all__ = ["Centre", "Elastic"]


class Elastic(Served):
    """Every few updates a replica and the centre move towards each other (asynchronous EASGD):
    d = α(x - x̃); x ← x - d; x̃ ← x̃ + d.

    Between them each replica trains by itself, with an optimizer and scheduler of its own. What is
    evaluated and saved is the centre, and the replicas go on from there.

    Args:
        every: updates of a replica's from one exchange to the next (τ in the paper).
        alpha: α; None is 0.9/R (the paper's β = 0.9).

    For the other arguments see `Served`.

    Raises:
        ValueError: a number that is too small, or an alpha outside of (0, 1].
    """

    def __init__(
        self,
        count: int | None = None,
        *,
        every: int = 10,
        alpha: float | None = None,
        prefetch: int = 1,
        beside: bool = False,
        checkpoint: str | Path | None = None,
        checkpoint_every: int = 1000,
        address: str | None = None,
    ) -> None:
        super().__init__(
            count,
            beside=beside,
            prefetch=prefetch,
            checkpoint=checkpoint,
            checkpoint_every=checkpoint_every,
            address=address,
        )
        check_number("every", every)
        if alpha is not None and not 0 < alpha <= 1:
            raise ValueError(f"alpha={alpha!r}: give a number above 0, up to 1, or None")
        self.every, self.alpha = every, alpha

    def make_shard(
        self,
        stage: int,
        weights: dict[str, Any],
        settings: Settings,
        replicas: int,
        present: bool = True,
    ) -> "Centre":
        return Centre(stage, weights, 0.9 / replicas if self.alpha is None else self.alpha)

    def join(self, meeting: Meeting) -> Peers:
        client = _Drawn(self.connect(meeting), self.every, self.every, self.prefetch)
        client.is_first = meeting.grid.replica == 0
        return client


class Centre:
    """A stage's centre x̃; its clock counts exchanges.

    Args:
        weights: by name; copied, onto the CPU.
        alpha: α.
    """

    def __init__(self, stage: int, weights: Mapping[str, Tensor], alpha: float) -> None:
        self.stage, self._alpha = stage, alpha
        self.weights = {name: w.detach().cpu().clone() for name, w in weights.items()}
        self.version = 0
        self.latest: dict[int, float] = {}
        self.buffers: list[Tensor] = []
        self.staleness: Counter[int] = Counter()
        self.pushed: Counter[int] = Counter()
        self._apart: dict[int, dict[str, Tensor]] = {}
        self._fetching: list[int] = []

    @property
    def learning_rates(self) -> list[float]:
        """It has no optimizer."""
        return []

    @property
    def names(self) -> list[str]:
        """Of the weights, in the order in which they travel."""
        return list(self.weights)

    def enter(self, replica: int) -> None:
        """Nobody waits for anybody."""

    def leave(self, replica: int) -> None:
        """Nobody waits for anybody."""

    def check(self, tensors: Mapping[str, Tensor], samples: int) -> None:
        """Look at a replica's weights before the centre moves towards them.

        Raises:
            ValueError: they are not all there.
        """
        check_whole("PUSH", tensors, self.weights)

    def take(
        self, replica: int, tensors: dict[str, Tensor], samples: int, versions: list[int]
    ) -> None:
        """Move towards a replica's weights; what it is to move by is what `give` gives."""
        age = self.version - versions[0]
        self.staleness[age] += 1
        self.latest[replica] = age
        self.pushed[replica] += 1
        self._apart[replica] = {
            name: (tensors[name] - weight).mul_(self._alpha)
            for name, weight in self.weights.items()
        }
        for name, difference in self._apart[replica].items():
            self.weights[name] += difference
        self.version += 1

    def fetch(self, replica: int) -> None:
        """A replica waits for its part of the exchange."""
        self._fetching.append(replica)

    def answers(self) -> list[int]:
        """All who wait."""
        due, self._fetching = self._fetching, []
        return due

    def give(self, replica: int) -> dict[str, Tensor]:
        """What a replica is to move by: d; one that offered nothing stays where it is."""
        apart = self._apart.pop(replica, None)
        return apart or {name: torch.zeros_like(weight) for name, weight in self.weights.items()}

    def hand_out(self, replicas: Iterable[int]) -> dict[str, Tensor]:
        """The centre, for replicas that go on from there."""
        return self.snapshot()

    def finish(self) -> None:
        """Nothing is ever left over."""

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of the weights."""
        return {name: weight.clone() for name, weight in self.weights.items()}

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Take other weights."""
        self.weights = {name: weights[name].clone() for name in self.weights}

    @property
    def statistics(self) -> ShardStatistics:
        """Its figures."""
        staleness, pushed = dict(self.staleness), dict(self.pushed)
        return ShardStatistics(self.stage, self.version, None, staleness, pushed)

    def state_dict(self) -> dict[str, Any]:
        """All that it would need to go on, copied."""
        buffers = [buffer.clone() for buffer in self.buffers]
        return {"weights": self.snapshot(), "buffers": buffers, "version": self.version}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.load(state["weights"])
        self.buffers = list(state["buffers"])
        self.version = int(state["version"])


class _Drawn(Client):
    """Trains by itself; offers its weights, and moves by what comes back."""

    def _begin(self, engine: "Engine") -> Steps:
        if self.outside:  # others may have been there before
            yield from self.agree(engine)

    def push(self, stage: "Stage") -> None:
        weights = {name: weight.detach().clone() for name, weight in stage.owned.items()}
        numbers = (0.0, float(self.version))
        body = pack(weights, list(weights))
        self._connection.outbox.send(Message(Kind.PUSH, numbers=numbers, body=body))

    def take_in(self, stage: "Stage", tensors: list[Tensor]) -> None:
        with torch.no_grad():
            for weight, difference in zip(stage.owned.values(), tensors, strict=True):
                weight.sub_(difference.to(weight.device))
