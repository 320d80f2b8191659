"""One stage's weights on a parameter server, and what the replicas do to them; no process in it.

A shard is told of each push and fetch in the order they come, and says which fetches may be
answered. Who carries what is somebody else's affair: `server` over sockets, or a simulation.
"""

import copy
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..corrections import correct
from ..gradient import Gradient
from ..learning_rates import multiplied
from ..report import ShardStatistics
from ..settings import Settings, make_optimizers, make_schedulers

__all__ = ["Protocol", "Shard"]


@dataclass(frozen=True)
class Protocol:
    """When gradients are applied, and who waits for whom.

    Args:
        gradients: that make one update (c in Zhang et al. 2016).
        waits: a fetch waits until the replica's own gradient has been applied (hard sync); an
            update then waits for no more gradients than there are replicas that train.
        bound: gradients that a replica may have pushed more than the slowest one; its fetches wait
            (stale-synchronous parallel, Ho et al. 2013). None: any number.
        warm_up: updates that the first replica makes alone.
        warm_up_factor: of the learning rate, after them.
    """

    gradients: int = 1
    waits: bool = False
    bound: int | None = None
    warm_up: int = 0
    warm_up_factor: float = 1.0


class Shard:
    """A stage's weights, their optimizer, and a clock that counts its updates.

    Args:
        weights: by name; copied, onto the CPU.
        settings: whose optimizer, scheduler and corrections move the weights.
        replicas: those that train from the beginning.
    """

    def __init__(
        self,
        stage: int,
        weights: Mapping[str, Tensor],
        settings: Settings,
        protocol: Protocol,
        replicas: Iterable[int],
    ) -> None:
        self.stage, self.protocol, self.corrections = stage, protocol, settings.corrections
        self.weights = {n: nn.Parameter(w.detach().cpu().clone()) for n, w in weights.items()}
        self.optimizers = make_optimizers(settings.optimizer, list(self.weights.items()))
        self.schedulers = make_schedulers(settings.scheduler, self.optimizers)
        self.version = 0
        self.staleness: Counter[int] = Counter()
        self.latest: dict[int, float] = {}
        self.buffers: list[Tensor] = []
        self.pushed: Counter[int] = Counter()
        self.training = set(replicas)
        self._lead: dict[int, int] = dict.fromkeys(self.training, 0)
        self._first = min(self.training, default=0)
        self._gradient, self._held = Gradient(), Counter[int]()
        self._fetching: list[int] = []
        self._warmed = False
        self._kept: dict[int, dict[str, Tensor]] = {}
        self._uses: dict[int, int] = {}
        self._copy, self._copied = self.snapshot(), 0

    # Who takes part ----------------------------------------------------------------------------

    def enter(self, replica: int) -> None:
        """A replica trains from here on; a new one counts as no slower than the slowest."""
        if replica not in self.training and self.training:
            slowest = min(map(self._standing, self.training))
            self._lead[replica] = max(self._standing(replica), slowest) - self.pushed[replica]
        self.training.add(replica)

    def leave(self, replica: int) -> None:
        """A replica trains no more, or not for the moment: nobody waits for it."""
        self.training.discard(replica)
        self._uses.pop(replica, None)
        self._fetching = [each for each in self._fetching if each != replica]
        self._apply_if_due()

    # What they do ------------------------------------------------------------------------------

    def check(self, gradients: Mapping[str, Tensor], samples: int) -> None:
        """Look at a pushed gradient before it is taken in.

        Raises:
            ValueError: it is the mean over nothing.
        """
        if samples < 1:
            raise ValueError(f"PUSH of a gradient over {samples} samples, and 1 is the least")

    def take(
        self,
        replica: int,
        gradients: dict[str, Tensor],
        samples: int,
        versions: Sequence[int],
    ) -> None:
        """Take a pushed gradient in, and move the weights if enough have come.

        Args:
            gradients: the mean over the samples, by name; or the sum of several updates' means.
            versions: of the weights that each micro-batch's forward ran with, in this shard's
                count.
        """
        ages = [self.version - version for version in versions]
        self.staleness.update(ages)
        self.latest[replica] = sum(ages) / len(ages)
        then = self._kept.get(versions[0])
        factor = correct(self.corrections, gradients, ages, self.weights, then)
        self._gradient.add(gradients, samples, list(versions), factor=factor)
        self.pushed[replica] += 1
        self._held[replica] += 1
        if replica in self.training:  # and not still on its way when its sender was lost
            self._uses[replica] = versions[-1]
        self._forget()
        self._apply_if_due()

    def fetch(self, replica: int) -> None:
        """A replica asks for the weights; `answers` tells when it may have them."""
        self._fetching.append(replica)

    def answers(self) -> list[int]:
        """The replicas whose fetch may be answered now, in turn: each with the weights as they are.

        It counts as answered.
        """
        due = [replica for replica in self._fetching if self._may_have(replica)]
        self._fetching = [replica for replica in self._fetching if replica not in due]
        if due:
            self.hand_out(due)
        return due

    def hand_out(self, replicas: Iterable[int]) -> dict[str, Tensor]:
        """The weights as they are, for replicas that will compute gradients at them."""
        if any(correction.needs_weights for correction in self.corrections):
            self._kept[self.version] = self.give(self._first)
            for replica in replicas:
                self._uses.setdefault(replica, self.version)
        return self.give(self._first)

    def give(self, replica: int) -> dict[str, Tensor]:
        """The weights for a replica, copied once a version."""
        if self._copied != self.version:
            self._copy, self._copied = self.snapshot(), self.version
        return self._copy

    @property
    def names(self) -> list[str]:
        """Of the weights, in the order in which they travel."""
        return list(self.weights)

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of the weights."""
        return {name: weight.detach().clone() for name, weight in self.weights.items()}

    def finish(self) -> None:
        """Apply what is left over, where too few gradients came for an update."""
        if self._gradient.versions:
            self._apply()

    @property
    def warms_up(self) -> bool:
        """Whether the first replica is still alone: until it has made its updates, or is done."""
        away = self._first not in self.training
        done = self.version >= self.protocol.warm_up or (away and self.pushed[self._first] > 0)
        self._warmed = self._warmed or done
        return not (self._warmed or away)

    @property
    def learning_rates(self) -> list[float]:
        """Of every parameter group."""
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        return [float(group["lr"]) * self._factor for group in groups]

    @property
    def statistics(self) -> ShardStatistics:
        """Its figures."""
        rate = self.learning_rates[0] if self.optimizers else None
        staleness, pushed = dict(self.staleness), dict(self.pushed)
        return ShardStatistics(self.stage, self.version, rate, staleness, pushed)

    @property
    def _factor(self) -> float:
        after = self.protocol.warm_up and not self.warms_up
        return self.protocol.warm_up_factor if after else 1.0

    def _may_have(self, replica: int) -> bool:
        protocol = self.protocol
        if self.warms_up:
            return replica == self._first
        if protocol.waits and self._held[replica]:
            return False
        if protocol.bound is None:
            return True
        slowest = min(map(self._standing, self.training), default=self._standing(replica))
        return self._standing(replica) - slowest <= protocol.bound

    def _standing(self, replica: int) -> int:
        """Where a replica is, for the bound: what it has pushed, and what it was spared."""
        return self.pushed[replica] + self._lead.get(replica, 0)

    def _apply_if_due(self) -> None:
        many = 1 if self.warms_up else self.protocol.gradients
        if self.protocol.waits:  # for those that are there
            many = min(many, max(1, len(self.training)))
        if self._held.total() >= many:
            self._apply()

    def _apply(self) -> None:
        done, self._gradient = self._gradient, Gradient()
        self._held.clear()
        for name, value in done.mean().items():
            self.weights[name].grad = value
        with multiplied(self.optimizers, done.rate * self._factor):
            for optimizer in self.optimizers:
                optimizer.step()
        for weight in self.weights.values():
            weight.grad = None
        for scheduler in self.schedulers:
            scheduler.step()
        self.version += 1
        if self.version == self.protocol.warm_up:  # the bound counts from here
            first = max(map(self._standing, self.training), default=0)
            self._lead = {each: first - self.pushed[each] for each in self.training}

    def _forget(self) -> None:
        """Let go of the versions that no replica's gradient will refer to any more."""
        if self._kept and self._uses and len(self._uses) >= len(self.training):
            oldest = min(self._uses.values())
            self._kept = {v: kept for v, kept in self._kept.items() if v >= oldest}

    # Its state ---------------------------------------------------------------------------------

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Take other weights.

        Raises:
            ValueError: they are another model's.
        """
        theirs = {name: tuple(weight.shape) for name, weight in weights.items()}
        ours = {name: tuple(weight.shape) for name, weight in self.weights.items()}
        if theirs != ours:
            raise ValueError(f"weights {theirs}, where {ours} are wanted")
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(weights[name])
        self._copied = -1
        if self.version in self._kept:
            self._kept[self.version] = self.give(self._first)

    def state_dict(self) -> dict[str, Any]:
        """All that it would need to go on, copied."""
        return {
            "weights": self.snapshot(),
            "kinds": [type(each).__name__ for each in self.optimizers],
            "optimizers": copy.deepcopy([each.state_dict() for each in self.optimizers]),
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
            "buffers": [buffer.clone() for buffer in self.buffers],
            "version": self.version,
            "staleness": dict(self.staleness),
            "pushed": dict(self.pushed - self._held),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave.

        Raises:
            ValueError: it is of other weights, or another optimizer.
        """
        kinds = [type(each).__name__ for each in self.optimizers]
        if state["kinds"] != kinds:
            raise ValueError(f"the state of {state['kinds']}, where {kinds} is wanted")
        self.load(state["weights"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(copy.deepcopy(saved))
        for scheduler, saved in zip(self.schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(saved)
        self.buffers = list(state["buffers"])
        self.version = int(state["version"])
        self.staleness = Counter(state["staleness"])
        self.pushed = Counter(state["pushed"])
        self._lead = {each: -self.pushed[each] for each in self.training}
