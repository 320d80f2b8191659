"""Be what a checkpoint is of: each stage and each server its part."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..grid import Grid
from ..partition import Partition
from .checkpoint import Checkpoint, CheckpointError, label
from .state import recut, restore

if TYPE_CHECKING:
    from ..engine import Engine
    from ..replicas.server import Serves
    from ..watch import Watch

__all__ = ["Restoring", "check_layers", "find"]

OTHER = {
    "rules": "another rule",
    "corrections": "other corrections",
    "replicas": "another way of sharing weights",
    "cut": "another cut",
}


class Restoring:
    """A checkpoint on its way into the stages of this process, which may be yet to be cut.

    Args:
        kinds: of the pipeline that is to go on from it.
        watch, has_servers: as for a `Keeper`.
        number: of the checkpoints loaded before.
    """

    def __init__(
        self,
        found: Checkpoint,
        kinds: dict[str, Any],
        grid: Grid,
        watch: "Watch | None",
        has_servers: bool,
        number: int,
    ) -> None:
        self._found, self._grid, self._kinds = found, grid, kinds
        self._watch, self._has_servers, self._number = watch, has_servers, number
        self.is_same = False
        self._states: dict[int, Any] = {}
        # Of a first stage's course through its data there are fewer turns where there are replicas.
        self.share = found.replicas / grid.replicas

    def fit(self, cut: Partition, stages: Sequence[int]) -> None:
        """Read what a cut asks for.

        Args:
            stages: those in this process.

        Raises:
            CheckpointError: a file is damaged.
        """
        found = self._found
        layers = [[layer.name for layer in stage] for stage in cut.stages]
        self.is_same = layers == found.layers and self._kinds == found.kinds
        wanted = stages if self.is_same or not stages else range(found.stages)
        self._states = {j: self._state(j) for j in wanted}

    def _state(self, stage: int) -> Any:
        if stage in self._states:
            return self._states[stage]
        found, grid = self._found, self._grid
        alike = found.replicas == grid.replicas and not grid.is_server
        return found.state(label(grid.replica if alike else 0, found.replicas, stage))

    @property
    def course(self) -> Any:
        """The state of the first stage's course through its data; it knows."""
        self._states[0] = self._state(0)
        return self._states[0]["course"]

    def __call__(self, engine: "Engine") -> None:
        """Restore a stage.

        Raises:
            CheckpointError: it does not fit.
            ValueError: it is of another optimizer.
        """
        stage, found = engine.stage, self._found
        try:
            files = [stage.index] if self.is_same else range(found.stages)
            stage.load_state_dict(found.weights(stage.layers.state_dict().keys(), files))
            if self.is_same:
                restore(engine, self._states[stage.index], found.depths)
            else:
                recut(engine, [*self._states.values()])
        except (KeyError, TypeError, IndexError, AttributeError, RuntimeError) as error:
            raise CheckpointError(
                f"{found.folder} does not fit stage {stage.index} of this pipeline "
                f"({type(error).__name__}: {' '.join(str(error).split())}): it was written for "
                "other layers, or by another version; load_state_dict(load_weights(…)) takes what "
                "it has of weights"
            ) from error
        if (shard := stage.peers.shard) is not None:
            self.restore_server(shard)
        if self._watch is not None and self._has_servers:
            self._watch.learn(f"restored/{self._number}/{stage.index}")

    def restore_server(self, shard: "Serves") -> None:
        """Restore a stage's server."""
        who = f"server-{self._grid.stage}"
        if self.is_same and self._found.has(who):
            shard.load_state_dict(self._found.state(who))
        if self._watch is not None:  # nobody must push before
            self._watch.share(f"restored/{self._number}/{self._grid.stage}", "")

    def explain(self) -> str:
        """What carries over, where not all does."""
        found, now = self._found, self._grid.stages
        if found.stages != now:
            many = "stage" if found.stages == 1 else "stages"
            what = f"{found.stages} {many}, this pipeline {now}"
        else:
            kinds = self._kinds
            differs = next((key for key in kinds if kinds[key] != found.kinds.get(key)), "cut")
            what = f"{OTHER[differs]} than this pipeline"
        return (
            f"headrace: {found.folder} has {what}: weights, optimizers, learning rates and the "
            "place in the data carry over; the state of rules, corrections and stages' random "
            "numbers begins anew"
        )


def find(path: Any, watch: "Watch | None", rank: int, number: int) -> Checkpoint:
    """The checkpoint at a path, which may be a folder of several: the first rank says which.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    if watch is None:
        return Checkpoint.open(path)
    key = f"load/{number}"
    if rank == 0:
        found = Checkpoint.open(path)
        watch.share(key, str(found.folder))
        return found
    try:
        return Checkpoint.open(watch.learn(key, watch.patience))
    except TimeoutError:
        raise RuntimeError(
            "this rank called load(), and the first rank does not: every rank must make the same "
            "calls in the same order"
        ) from None


def check_layers(found: Checkpoint, own: list[str]) -> None:
    """Refuse the checkpoint of another model.

    Raises:
        CheckpointError: its layers have other names.
    """
    theirs = [name for stage in found.layers for name in stage]
    if theirs != own:
        raise CheckpointError(
            f"{found.folder} is of a model with the layers {_some(theirs)}, and this one has "
            f"{_some(own)}"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 6 else f"{names[0]} to {names[-1]} ({len(names)})"
