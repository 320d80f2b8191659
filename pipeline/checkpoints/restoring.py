"""Be what a checkpoint is of: each stage and each server its part."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..grid import Grid
from ..partition import Partition
from .checkpoint import Checkpoint, CheckpointError, fitting, label
from .state import recut, restore

if TYPE_CHECKING:
    from ..course import Course
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
        tunes: the slack is what the run chose (`slack='auto'`), and not the user's.
    """

    def __init__(
        self,
        found: Checkpoint,
        kinds: dict[str, Any],
        grid: Grid,
        watch: "Watch | None",
        has_servers: bool,
        number: int,
        tunes: bool,
    ) -> None:
        self._found, self._grid, self._kinds = found, grid, kinds
        self._watch, self._has_servers, self._number = watch, has_servers, number
        self._tunes, self.is_same = tunes, False
        alike = found.replicas == grid.replicas and not grid.is_server
        self._replica = grid.replica if alike else 0
        self._states: dict[int, Any] = {}
        # Of a first stage's course through its data there are fewer turns where there are replicas.
        self._share = found.replicas / grid.replicas

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
        return self._found.state(label(self._replica, self._found.replicas, stage))

    def restore_course(self, course: "Course") -> None:
        """Bring a first stage to its place in the data; it knows.

        Raises:
            CheckpointError: it does not fit.
        """
        self._states[0] = self._state(0)
        with fitting(self._file(0), "the way through the data"):
            course.load_state_dict(self._states[0]["course"], self._share)

    def __call__(self, engine: "Engine") -> None:
        """Restore a stage.

        Raises:
            CheckpointError: it does not fit.
        """
        stage, found = engine.stage, self._found
        whom = f"stage {stage.index} of this pipeline"
        files = [stage.index] if self.is_same else range(found.stages)
        own = stage.layers.state_dict()
        weights = found.weights(own.keys(), files)
        check_shapes(found, own, weights)
        with fitting(found.folder / "weights", whom):
            stage.load_state_dict(weights)
        if self.is_same:
            with fitting(self._file(stage.index), whom):
                depths = found.depths if self._tunes else engine.depths
                restore(engine, self._states[stage.index], depths)
        else:
            with fitting(found.folder / "state", whom):
                recut(engine, [*self._states.values()])
        if (shard := stage.peers.shard) is not None:
            self.restore_server(shard)
        if self._watch is not None and self._has_servers:
            self._watch.learn(f"restored/{self._number}/{stage.index}")

    def restore_server(self, shard: "Serves") -> None:
        """Restore a stage's server."""
        who = f"server-{self._grid.stage}"
        if self.is_same and self._found.has(who):
            state = self._found.state(who)
            with fitting(self._found.folder / f"state/{who}.json", f"stage {self._grid.stage}"):
                shard.load_state_dict(state)
        if self._watch is not None:  # nobody must push before
            self._watch.share(f"restored/{self._number}/{self._grid.stage}", "")

    def _file(self, stage: int) -> Path:
        found = self._found
        return found.folder / f"state/{label(self._replica, found.replicas, stage)}.json"

    def explain(self, depths: Sequence[int]) -> str:
        """What carries over, where not all does, or is otherwise now; nothing where all is alike.

        Args:
            depths: of each stage, as they are.
        """
        found, now = self._found, self._grid.stages
        if self.is_same:
            if [*depths] == found.depths:
                return ""
            then = ", ".join(map(str, found.depths))
            return (
                f"headrace: {found.folder} had {then} micro-batches in flight behind its stages' "
                f"forwards, and this pipeline has {', '.join(map(str, depths))}, by its own slack"
            )
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


def check_shapes(
    found: Checkpoint, own: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> None:
    """Refuse the checkpoint of a model of other widths.

    Raises:
        CheckpointError: a weight has another shape.
    """
    for name in (name for name in own if name in weights):
        then, now = [*weights[name].shape], [*own[name].shape]
        if then != now:
            raise CheckpointError(
                f"{found.folder} has {name} of the shape {then}, and this model has it of {now}: "
                "its weights do not fit either; build the model that it was saved of"
            )


def _some(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 6 else f"{names[0]} to {names[-1]} ({len(names)})"
