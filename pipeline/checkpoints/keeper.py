"""One process's part in making checkpoints: when, of what, and where to."""

import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..channel import Soon
from ..course import Course
from ..grid import Grid
from ..message import Kind, Message
from ..report import Report
from .checkpoint import Checkpoint, label
from .plan import Checkpoints
from .saver import Part, Saver
from .state import collect

if TYPE_CHECKING:
    from ..engine import Engine, Steps
    from ..replicas.peers import Peers
    from ..replicas.server import Serves
    from ..watch import Watch

__all__ = ["Ended", "Keeper"]


class Ended(Enum):
    """How a call of `train` has come to its end, over all replicas."""

    STOPPED = "by a SIGTERM: it is to be saved, and no replica goes on"
    PAUSED = "to save, of replicas, and to go on"
    DRY = "of replicas, each at the end of its data, which all know now: to be called once more"
    OVER = "as all of it is done"


class Keeper:
    """Hands what the stages of a process have to keep to its `Saver`.

    Args:
        stages: how many are in this process.
        watch: by which processes hear of each other; None for one process alone.
        course: the first stage's through its data.
        has_servers: a server of this job keeps a state of its own for each stage.
        shares: there are replicas: they save between calls, at the same place of a pass.
        head: what the manifest says, but for the files, of a checkpoint in a folder.
    """

    def __init__(
        self,
        grid: Grid,
        stages: int,
        watch: "Watch | None",
        course: Course,
        has_servers: bool,
        shares: bool,
        head: Callable[[Path], Checkpoint],
    ) -> None:
        self._grid, self._stages, self._watch, self._course = grid, stages, watch, course
        self._has_servers, self._shares, self._head = has_servers, shares, head
        ranks = grid.replicas * grid.stages + grid.servers if watch else 1
        self._saver = Saver(grid.rank, ranks, watch)
        self._parts: list[list[Part]] = []
        self._manifest: Checkpoint | None = None
        self._target = Path()
        self._keep: int | None = None
        self._saved_at, self._served, self._meetings = -1, 0, 0
        self._stop_requested = False
        self._mark: Kind | None = None
        self._all_dry = False

    @property
    def target(self) -> Path:
        """Where the latest checkpoint went."""
        return self._target

    @property
    def is_writing(self) -> bool:
        """Whether this process is writing its part of a checkpoint."""
        return self._saver.is_writing

    # When --------------------------------------------------------------------------------------

    def mark(self, plan: Checkpoints | None, peers: "Peers") -> Kind | None:
        """What is to come before the next mini-batch; asked on a first stage, with its peers."""
        self._mark = self._due(plan, peers) if plan else None
        if self._mark is not None:
            self._course.pause()
        if self._mark is Kind.SAVE and plan:
            self.aim(plan.path(self._course.position), plan.keep)
            self.skip()
        return self._mark

    def _due(self, plan: Checkpoints, peers: "Peers") -> Kind | None:
        asked = self._stop_requested or (self._watch is not None and self._watch.stop_requested)
        if peers.stops(asked):
            return Kind.END
        position = self._course.position
        # In a pass replicas may have mini-batches of another number, and one waits for no other.
        count = position.mini_batches if self._shares else position.total
        due = plan.every is not None and count and count % plan.every == 0
        return Kind.SAVE if due and position.total != self._saved_at else None

    def together(self, every: int) -> bool:
        """At the end of a first stage's data: whether all replicas are at the end of theirs. A pass
        may be shorter than what is to lie between two checkpoints: one may be due.
        """
        overdue = self._course.position.total - max(self._saved_at, 0) >= every
        self._mark = Kind.SAVE if overdue else None
        if overdue:
            self._course.pause()
        return self._all_dry

    @contextmanager
    def stoppable(self, plan: Checkpoints | None) -> Iterator[None]:
        """Have a SIGTERM ask for a checkpoint and the end, in the block."""
        if plan is None:
            self.heed()
            yield
        elif self._watch is not None:
            self._watch.saves = True
            try:
                yield
            finally:
                self._watch.saves = False
        elif threading.current_thread() is not threading.main_thread():
            yield
        else:
            before = signal.signal(signal.SIGTERM, self._request)
            try:
                yield
            finally:
                signal.signal(signal.SIGTERM, before)

    def _request(self, number: int, frame: Any) -> None:
        self._stop_requested = True

    def heed(self) -> None:
        """End by a SIGTERM that came too late in a call of `train`, and which no other follows."""
        if self._watch is not None and self._watch.stop_requested:
            self._watch.stop(signal.SIGTERM)
        elif self._stop_requested:
            self._stop_requested = False
            signal.raise_signal(signal.SIGTERM)

    def agree(self, report: Report) -> Ended:
        """What is to come after a call of `train`, which all replicas have ended."""
        words = self._words(self._word(report))
        self._all_dry = words == {Ended.DRY}
        return next(word for word in Ended if word in words)

    def _word(self, report: Report) -> Ended:
        """This replica's, which its first stage knows."""
        if not report.stopped:
            return Ended.OVER
        if not self._shares or self._mark is Kind.END:
            return Ended.STOPPED
        return Ended.PAUSED if self._mark is Kind.SAVE else Ended.DRY

    def _words(self, own: Ended) -> set[Ended]:
        grid, watch = self._grid, self._watch
        if not self._shares or watch is None:
            return {own}
        self._meetings += 1
        key = f"ended/{self._meetings}"
        if grid.stage == 0 and not grid.is_server:
            watch.share(f"{key}/{grid.replica}", own.name)
        return {Ended[watch.learn(f"{key}/{replica}")] for replica in range(grid.replicas)}

    # Where to ----------------------------------------------------------------------------------

    def aim(self, path: Path, keep: int | None) -> None:
        """Where the next checkpoint goes: on ranks after the first, which folder it goes into."""
        self._target, self._keep = path, keep

    def prepare(self, plan: Checkpoints) -> None:
        """Before a call that is to save: see that it can.

        Raises:
            OSError: nothing can be written there.
        """
        self.aim(plan.path(self._course.position), plan.keep)
        if self._grid.rank == 0:
            folder = Path(plan.folder)
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=folder):
                    pass
            except OSError as error:
                raise OSError(
                    error.errno,
                    f"checkpoints cannot be written into {folder}: {error.strerror}; give a folder "
                    "that is yours",
                ) from error

    def skip(self) -> None:
        """There is a checkpoint of this place: none is due."""
        self._saved_at = self._course.position.total

    # Of what -----------------------------------------------------------------------------------

    def keep(self, engine: "Engine", message: Message) -> "Steps":
        """Copy what a stage has to keep; with that of all stages here, have it written."""
        while self._saver.is_busy:
            engine.doing = "waiting until the checkpoint before is written"
            yield Soon()
        grid, stage = self._grid, engine.stage
        state = collect(engine)
        if stage.is_first:
            state["course"] = self._course.state_dict()
            if grid.rank == 0:  # now: stages after it may come to it later
                self._manifest = self._head(self._target)
        weights = stage.state_dict() if grid.replica == 0 else None
        who = label(grid.replica, grid.replicas, stage.index)
        own = [Part.of(who, stage.index, weights, state)]
        if (shard := stage.peers.shard) is not None:
            own.append(self._part_of(shard))
        self._await_server(stage.index)
        self._parts.append(own)
        if len(self._parts) == self._stages:
            parts, self._parts = self._parts, []
            self._start([part for each in parts for part in each])

    def keep_server(self, shard: "Serves") -> None:
        """Copy what a server has to keep, in a process that has no stage, and have it written."""
        part = self._part_of(shard)
        self._served += 1
        self.wait()
        self._start([part])

    def _part_of(self, shard: "Serves") -> Part:
        stage = self._grid.stage
        part = Part.of(f"server-{stage}", stage, None, shard.state_dict())
        if self._watch is not None:  # nobody must push before
            self._watch.share(f"kept/{self._served}/{stage}", "")
        return part

    def _await_server(self, stage: int) -> None:
        if self._watch is not None and self._has_servers:
            self._watch.learn(f"kept/{self._served}/{stage}")
        self._served += 1

    def _start(self, parts: list[Part]) -> None:
        self._saver.start(self._target, parts, self._manifest, self._keep)

    def wait(self) -> None:
        """Until nothing is being written.

        Raises:
            OSError: it could not be, in one process alone.
        """
        while self._saver.is_busy:
            assert self._watch is not None
            self._watch.idle(patient=False)
