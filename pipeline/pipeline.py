"""Pipeline: what a user builds around an nn.Sequential."""

import atexit
import itertools
import json
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from .arguments import (
    check_choices,
    check_corrections,
    check_counts,
    check_fits_depths,
    check_fitting,
    check_growth,
    check_kinds,
    check_notes,
    check_plan,
    check_rules,
    check_shared,
    check_timeout,
    lay_out,
)
from .batch_size import Growth
from .blueprint import Blueprint
from .channel import Links
from .checkpoints import Checkpoint, Checkpoints, Position, load_weights
from .checkpoints.keeper import Ended, Keeper
from .checkpoints.plan import check_folder, check_number
from .checkpoints.restoring import Restoring, check_layers, find
from .corrections import Correction
from .course import Course
from .driver import TOLD, Alone, Apart, Driver, Serving
from .engine import Call, Engine, Metrics
from .errors import InputError, first_line, told
from .feed import Source, begin, deal, feed, read
from .grid import Grid
from .link import Link
from .loss import Loss
from .message import Message
from .nest import Nest
from .partition import Balance, Partition, check_model
from .replicas import Allreduce, Replicas
from .report import Progress, Report, ShardStatistics, StageStatistics
from .rules import Delayed, Exact, Rule
from .schedule import SCHEDULES
from .settings import OptimizerFactory, SchedulerFactory, Settings
from .stability import Stability, StabilityWarning, stalest
from .timeline import Timeline
from .watch import Pulse, Watch
from .world import World, choose_device, meet

__all__ = ["Pipeline", "Recording"]

TUNE_AT = 16
"""The micro-batch before which `slack='auto'` measures."""

_jobs = itertools.count()


class Recording:
    """What `Pipeline.record` gives: its timeline is there once the block is over."""

    def __init__(self) -> None:
        self._timeline: Timeline | None = None

    @property
    def timeline(self) -> Timeline:
        """Every stage's spans."""
        if self._timeline is None:
            raise RuntimeError("the timeline is there once the with-block of record() is over")
        return self._timeline


class Pipeline:
    """An nn.Sequential cut into stages, trained as a stream.

    Under torchrun each rank runs one stage, and every rank makes the same calls in the same order;
    alone, one process runs all `stages` stages in turn, with the same numbers. A loader gives
    (input, target) pairs, each a tensor or a nest of tensors (N, …); only the first stage reads it.

    Args:
        model: built from the same seed on every rank. Its layers keep their names everywhere.
        loss_fn: from an output and a target, the mean over dimension 0.
        optimizer: a function of a stage's (name, Parameter) pairs that gives an optimizer, or
            several; not called for a stage with nothing to train.
        scheduler: a function of an optimizer that gives its LRScheduler, stepped once an update.
        schedule: 'stream', which never flushes; '1f1b' or 'gpipe', which do at every mini-batch.
        rule: None is `Delayed('stash')` under 'stream' and `Exact()` under the others. A list has
            one for each stage.
        corrections: what to do about a gradient's staleness, in order; `[Auto()]` chooses.
        replicas: copies of the whole pipeline on mini-batches of their own, and how they share
            their weights: `Allreduce()`, `Hogwild()`, `Downpour()`, `Elastic()` (torchrun only).
        balance: 'time' (measured on the first micro-batch), 'parameters', each stage's number of
            layers, or the name of each stage's first layer.
        stages: None is the number of ranks, or 1 alone; with replicas, write it.
        slack: extra micro-batches in flight per hop, which hide slow links and add staleness: a
            number, one for each hop, or 'auto' (measured; torchrun only).
        micro_batches: how many a mini-batch is cut into.
        update_every: micro-batches to an update under 'stream', mini-batches under the others.
        batch_size: how many samples an update has instead, and how that grows while the stream
            flows on: `Steps()`, `Geometric()`, `VarianceTest()`. The loader's mini-batches and
            `micro_batches` stay: an update ends with the micro-batch (under the others: mini-batch)
            with which its samples are there.
        clip_grad_norm: the largest 2-norm of a gradient: per stage under 'stream', over the whole
            model under the others.
        autocast: a dtype, as in torch.autocast.
        compile: True, or keywords of torch.compile, which each stage's layers go through.
        device: None is a GPU for each rank where there are enough, else the CPU.
        seed: of the random state of the stages after the first (which lives on the global one),
            and of layers on the meta device; None is torch.initial_seed().
        on_nonfinite: 'stop' at the first loss or gradient that is not finite, or 'skip' its update.
        timeout: seconds of silence after which the job ends, until the first update and after it;
            the first are also how much later than another a rank may build its pipeline.
        emulated_link: makes every link between neighbours this slow, to see what one would do
            (torchrun only).

    Raises:
        TypeError, ValueError: an argument that cannot work; the message says what to write.
        InputError: the ranks cannot meet.
    """

    def __init__(
        self,
        model: nn.Sequential,
        loss_fn: Loss,
        optimizer: OptimizerFactory,
        *,
        scheduler: SchedulerFactory | None = None,
        schedule: str = "stream",
        rule: Rule | Sequence[Rule] | None = None,
        corrections: Sequence[Correction] = (),
        replicas: Replicas | None = None,
        balance: Balance = "time",
        stages: int | None = None,
        slack: int | Sequence[int] | Literal["auto"] = 0,
        micro_batches: int = 1,
        update_every: int = 1,
        batch_size: Growth | None = None,
        clip_grad_norm: float | None = None,
        autocast: torch.dtype | None = None,
        compile: bool | Mapping[str, Any] = False,
        device: str | torch.device | None = None,
        seed: int | None = None,
        on_nonfinite: str = "stop",
        timeout: tuple[float, float] = (300.0, 60.0),
        emulated_link: Link | None = None,
    ) -> None:
        check_timeout(timeout)
        self._driver: Driver | None = None
        try:
            self._world = meet()
        except InputError as error:
            print(f"headrace: {told(error)}", file=sys.stderr, flush=True)
            raise SystemExit(2) from error
        self._watch = self._start_watch(self._world, timeout) if self._world else None
        self.partition: Partition | None = None
        self._closed = False
        self._ended_by = ""
        self._calls = self._loads = 0
        self._under_way: Call | None = None
        self._warned = False
        self.notes: dict[str, Any] = {}
        """What the user wants to find again in a checkpoint: JSON's types; the first rank's."""
        self._course = Course()
        self._pending: Restoring | None = None
        self._engines: list[Engine] = []
        self._links: list[Links] = []
        atexit.register(_end, weakref.ref(self))
        with self._reporting("building the pipeline", refuses=True):
            self.rank = self._world.rank if self._world else 0
            self._grid = lay_out(stages, replicas, self._world)
            self.stages = self._grid.stages
            if self._watch is not None:
                self._watch.names = self._grid.names
            check_model(model, self.stages)
            if replicas is not None and self._watch is not None:
                self._grid = replicas.enrol(self._grid, self._watch, model)
            check_choices(loss_fn, optimizer, schedule, on_nonfinite)
            check_kinds(rule, slack, autocast, device, emulated_link)
            if emulated_link is not None and self._world is None:
                raise ValueError(
                    "emulated_link= holds messages between processes back, and one process sends "
                    "none: start it with torchrun, or leave it out"
                )
            check_counts(micro_batches, update_every, clip_grad_norm)
            check_growth(batch_size, update_every, replicas)
            self._model, self._micro_batches = model, micro_batches
            order = SCHEDULES[schedule]
            if rule is None:
                rule = Exact() if order.flushes else Delayed("stash")
            rules = [rule] * self.stages if isinstance(rule, Rule) else [*rule]
            check_rules(rules, order, self.stages, slack)
            check_corrections(corrections)
            if replicas is not None:
                replicas.check(rules, order)
            self._tunes = slack == "auto"
            self._tune_at = TUNE_AT if self._tunes else None
            if self._tunes and (self._world is None or order.flushes):
                raise ValueError(
                    "slack='auto' measures the links of a stream under torchrun: alone, or under "
                    "a schedule that flushes, write a number"
                )
            waits = [each.ahead is None for each in rules]
            depths = order.depths(self.stages, 1 if slack == "auto" else slack, waits)
            place, shared = choose_device(device, self._world)
            if isinstance(loss_fn, nn.Module):
                loss_fn.to(place)
            settings = Settings(
                loss_fn=loss_fn,
                optimizer=optimizer,
                scheduler=scheduler,
                update_every=update_every,
                clip_grad_norm=clip_grad_norm,
                autocast=autocast,
                compile=dict(compile) if isinstance(compile, Mapping) else {} if compile else None,
                stops_on_nonfinite=on_nonfinite == "stop",
                corrections=tuple(corrections),
                batch_size=batch_size,
            )
            own = replicas.settings(settings) if replicas else settings
            check_fitting(own.corrections, rules, order)
            if replicas is not None:
                check_shared(corrections, replicas, own.corrections)
            every = None if batch_size else update_every
            check_fits_depths(own.corrections, order, depths, every, self._tunes)
            self._blueprint = Blueprint(
                model,
                self._grid,
                self._watch,
                replicas,
                order,
                rules,
                depths,
                settings,
                place,
                torch.initial_seed() if seed is None else seed,
                micro_batches,
                emulated_link,
            )
            self._links = self._blueprint.connect(shared)
            self._keeper = Keeper(
                self._grid,
                self.stages if self._watch is None else 1,
                self._watch,
                self._course,
                self._blueprint.serves,
                replicas is not None,
                self._head,
            )
            if self.stages == 1 or balance != "time":
                self._adopt(self._blueprint.cut(balance))

    # Calls that every rank makes ---------------------------------------------------------------

    def prepare(self, loader: Iterable[Any]) -> Partition:
        """Measure, cut and build the stages on a loader's first mini-batch, if not done yet.

        `train` and `evaluate` do so themselves; the random state stays as it was.
        """
        if self.partition is None:
            with torch.random.fork_rng():
                self._open(loader, pairs_only=True)
        assert self.partition is not None
        return self.partition

    def train(
        self,
        loader: Iterable[Any],
        *,
        log: Callable[[Progress], None] | None = None,
        log_every: int = 50,
        checkpoints: Checkpoints | None = None,
        at_end: Callable[[Report], None] | None = None,
    ) -> Report:
        """Train on a loader once.

        Under 'stream' it returns without draining: this stage has run its last forward and what
        the schedule puts right after it. The report covers the micro-batches whose gradient has
        reached the first stage; the others are in the next report. With replicas it is of this
        rank's own; each takes every R-th mini-batch.

        Args:
            log: called on the first stage, with the losses read from the device then and only then.
            log_every: micro-batches between two logs.
            checkpoints: where to save, and when. A SIGTERM then ends the call at the next
                mini-batch, saves, and leaves with exit code 0; where there is no next one, the next
                call does, or ends at once if it is not of `train`. After `load` the first call goes
                on where the checkpoint was made, in the middle of the loader if need be.
            at_end: called with the report, unless a SIGTERM ended the call, before the checkpoint
                of the call's end is made, which has what was put into `notes` then.

        Raises:
            SystemExit: 0, after a SIGTERM.
            OSError: a checkpoint cannot be written (under torchrun it ends the job).
            InputError: the loader raises, gives nothing, or what cannot be cut into samples.
            FloatingPointError: a loss or gradient is not finite (on_nonfinite='stop').
        """
        if log_every < 1:
            raise ValueError(f"log_every={log_every!r}: give a whole number >= 1")
        check_plan(checkpoints)
        if checkpoints is not None:
            with self._reporting("making the folder of checkpoints"):
                self._keeper.prepare(checkpoints)
        batches = self._open(loader, pairs_only=True, trains=True)
        self._warn_of_delay()
        messages = None
        for engine in self._engines[:1]:
            engine.books.log, engine.books.log_every = log, log_every
            parts, tune_at = self._micro_batches, self._tune_at
            start, closes = engine.trained, engine.gathering.closes
            course = self._course
            mark = partial(self._keeper.mark, checkpoints, engine.stage.peers)
            together = None
            if checkpoints and checkpoints.every and self._blueprint.replicas:
                together = partial(self._keeper.together, checkpoints.every)
            messages = feed(
                Call.TRAIN, batches, parts, start, tune_at, closes, course, mark, together
            )
        with self._keeper.stoppable(checkpoints):
            report, ended = self._train(messages, checkpoints)
            if ended is Ended.OVER:
                self._course.end()
                if at_end is not None:
                    at_end(report)
            if checkpoints and (ended is Ended.STOPPED or checkpoints.every is None):
                self._save(checkpoints.path(self.position), checkpoints.keep)
                self._keeper.wait()
            if ended is Ended.STOPPED:
                self._leave()
        return report

    def _train(
        self, messages: Iterator[Message] | None, checkpoints: Checkpoints | None
    ) -> tuple[Report, Ended]:
        """A call of `train`; of replicas that save on their way, as many as it takes."""
        while True:
            report: Report = self._run(Call.TRAIN, messages)
            ended = self._keeper.agree(report) if checkpoints else Ended.OVER
            if ended in (Ended.STOPPED, Ended.OVER):
                return report, ended
            if ended is Ended.PAUSED and checkpoints:
                self._save(checkpoints.path(self.position), checkpoints.keep)

    def evaluate(self, loader: Iterable[Any], metrics: Metrics | None = None) -> dict[str, float]:
        """Drain, then give the mean over samples of the loss and of each metric, on every rank.

        Args:
            metrics: names to functions of (output, target) that give a mean over the samples.
        """
        if metrics and "loss" in metrics:
            raise ValueError("metrics has one named 'loss', as the loss itself is: rename it")
        batches = self._open(loader, pairs_only=True)
        for engine in self._engines[-1:]:
            engine.metrics = dict(metrics or {})
        messages = feed(Call.EVALUATE, batches, self._micro_batches, 0, None)
        result: dict[str, float] = self._run(Call.EVALUATE, messages)
        return result

    def predict(self, loader: Iterable[Any]) -> Nest:
        """Drain, then give the outputs for all inputs, joined on dimension 0, on every rank's CPU.

        Args:
            loader: gives inputs, or (input, target) pairs, whose target is not used; so an input
                that is itself a tuple of two must come in a pair.
        """
        batches = self._open(loader, pairs_only=False)
        result: Nest = self._run(
            Call.PREDICT, feed(Call.PREDICT, batches, self._micro_batches, 0, None)
        )
        return result

    def state_dict(self) -> dict[str, Tensor]:
        """Drain, then give the whole model's weights and buffers, by its own names, on the CPU.

        The update that `close` may still make is not in it; alone, `model` itself has it then.
        """
        if self._is_unbuilt("state_dict()") or (self._closed and self._world is None):
            return {n: t.detach().to("cpu", copy=True) for n, t in self._model.state_dict().items()}
        result: dict[str, Tensor] = self._run(Call.STATE_DICT)
        return {name: tensor.clone() for name, tensor in result.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Drain, then take the weights and buffers of a whole model, by its own names.

        Raises:
            RuntimeError: a name that is missing, unknown, or whose shape differs.
        """
        with self._reporting("loading weights"):
            if self._is_unbuilt("load_state_dict()"):
                self._model.load_state_dict(state)
                return
            expected = self._names
            if set(state) != expected and not self.is_server:  # to which the replicas give it
                raise RuntimeError(
                    f"the weights do not fit the model: missing {sorted(expected - set(state))}, "
                    f"unknown {sorted(set(state) - expected)}"
                )
            for engine in self._engines:
                engine.incoming = state
            self._run(Call.LOAD)

    def save(self, path: str | Path, keep: int | None = None) -> None:
        """Drain, then write a checkpoint: all that `load` needs to go on; done when it is whole.

        Args:
            path: the folder to make; all hosts must see it.
            keep: remove all but so many of the checkpoints beside it that have its name, but for
                numbers; None: none.

        Raises:
            OSError: it cannot be written (under torchrun it ends the job).
            TypeError, ValueError: a path that is none, a `keep` below 1; nothing is written.
        """
        self._require_built("save()")
        with self._reporting("saving a checkpoint", refuses=True):
            check_folder("path", path)
            if keep is not None:
                check_number("keep", keep, "None: all are kept")
        self._save(Path(path), keep)
        self._keeper.wait()

    def load(self, path: str | Path) -> Position:
        """Go on from a checkpoint: the next `train` does what the one that was saved would have.

        With as many stages and replicas it is bitwise the same. With others, weights, optimizers,
        learning rates and the place in the data carry over, and the rest begins anew.

        Args:
            path: a checkpoint; or a folder of several, for the newest that is whole; or a
                safetensors file of the model's weights alone.

        Returns:
            Where in the data it is.

        Raises:
            CheckpointError: there is none, it is damaged, or another model's.
        """
        self._require_open()
        with self._reporting("loading a checkpoint", refuses=True):
            if not isinstance(path, str | Path) or not str(path):
                raise TypeError(f"path={path!r}: give the name of a checkpoint's folder")
            if Path(path).is_file():
                self.load_state_dict(load_weights(path))
                return self.position
            self._loads += 1
            found = find(path, self._watch, self.rank, self._loads)
            check_layers(found, [name for name, _ in self._model.named_children()])
            self._go_on_from(found)
            return found.position

    def _go_on_from(self, found: Checkpoint) -> None:
        blueprint = self._blueprint
        restoring = Restoring(
            found,
            blueprint.kinds,
            self._grid,
            self._watch,
            blueprint.serves,
            self._loads,
            self._tunes,
        )
        self.notes = dict(found.notes)
        if self._driver is not None:
            self._take_up(restoring)
        else:
            self._pending = restoring
            if found.stages == self.stages:
                self._adopt(blueprint.cut([len(stage) for stage in found.layers]))
        # Before a cut by time, which comes with a mini-batch: by then the pass has begun.
        self._course.position = Position(found.position.epochs)
        if self.is_first:
            restoring.restore_course(self._course)
        self._keeper.skip()

    @property
    def position(self) -> Position:
        """Where in the data the first stage of this replica is; on other ranks `epochs` alone."""
        return self._course.position

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Drain, then give the parameters of the stages of this process, by the model's names."""
        self._require_built("named_parameters()")
        self._run(Call.DRAIN)
        return itertools.chain(*(e.stage.layers.named_parameters() for e in self._engines))

    def statistics(self) -> list[StageStatistics]:
        """Drain, then give each stage's figures, of all replicas; the same on every rank."""
        self._require_built("statistics()")
        return self._of_all_replicas(self._run(Call.STATISTICS))

    def _of_all_replicas(self, own: list[StageStatistics]) -> list[StageStatistics]:
        grid, watch = self._grid, self._watch
        if grid.replicas == 1 or watch is None:
            return [replace(row, replica=self.replica) for row in own]
        key = f"statistics/{self._calls}"
        if self.is_first:
            watch.share(f"{key}/{grid.replica}", json.dumps([row.numbers() for row in own]))
        return [
            replace(StageStatistics.from_numbers(row), replica=r)
            for r in range(grid.replicas)
            for row in json.loads(watch.learn(f"{key}/{r}"))
        ]

    def shard_statistics(self) -> list[ShardStatistics]:
        """Drain, then give the figures of each stage's parameter server; empty without any."""
        self._require_built("shard_statistics()")
        result: list[ShardStatistics] = self._run(Call.SHARDS)
        return result

    def reset_shares(self) -> None:
        """Count the shares of time in `statistics` from here on; every rank for itself."""
        self._require_built("reset_shares()")
        for engine in self._engines:
            engine.restart_shares()

    @contextmanager
    def record(self) -> Iterator[Recording]:
        """Record what every stage does in the block; then drain, and gather the spans.

        Meanwhile the spans are torch.profiler's too, should one be running.
        """
        self._require_built("record()")
        for engine in self._engines:
            engine.recorder.start()
        recording = Recording()
        try:
            yield recording
        finally:
            for engine in self._engines:
                engine.spans = engine.recorder.stop()
        recording._timeline = self._run(Call.TIMELINE)

    def measure_links(self) -> list[Link]:
        """Drain, then give the link of each hop as it is now: the same on every rank."""
        self._require_built("measure_links()")
        result: list[Link] = self._run(Call.LINKS)
        return result

    def drain(self) -> None:
        """Bring all micro-batches in flight to their end."""
        if self._driver is not None:
            self._run(Call.DRAIN)

    def close(self) -> None:
        """Drain, apply what is accumulated, and say goodbye; also at the end of a with-block."""
        if self._closed:
            return
        self._closed = True
        if self._driver is not None:
            self._run(Call.CLOSE)
            self._keeper.wait()
        if self._watch is not None:
            for links in self._links:
                links.close()
            for engine in self._engines:
                engine.stage.peers.close()
            self._watch.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        elif self._watch is not None:
            self._watch.fail_by(error, "the with-block of the pipeline")

    # What this process is ----------------------------------------------------------------------

    @property
    def is_first(self) -> bool:
        """Whether the first stage, of its replica, is in this process: it reads the loader."""
        return self._grid.stage == 0 and not self.is_server

    @property
    def is_last(self) -> bool:
        """Whether the last stage, of its replica, is in this process."""
        last = self._world is None or self._grid.stage == self.stages - 1
        return last and not self.is_server

    @property
    def is_server(self) -> bool:
        """Whether this process has no stage, and serves the weights of one (`Downpour`)."""
        return self._grid.is_server

    @property
    def replica(self) -> int:
        """This process's replica; 0 on a server."""
        return 0 if self.is_server else self._grid.share[0]

    @property
    def replicas(self) -> int:
        """How many copies of the pipeline there are, or seats for them."""
        return self._grid.share[1]

    @property
    def depths(self) -> tuple[int, ...]:
        """Each stage's micro-batches in flight behind a forward; its staleness, once warm. 0 for a
        stage that does not wait for its gradients.
        """
        return self._engines[0].depths if self._engines else self._blueprint.depths

    @property
    def chosen(self) -> dict[int, tuple[str, ...]]:
        """The corrections that `Auto` has chosen, by name, for each stage of this process; empty
        before the stages are built.
        """
        return {engine.stage.index: engine.stage.kit.chosen for engine in self._engines}

    @property
    def stability(self) -> Stability | None:
        """What the delay leaves of the largest stable learning rate, at the stalest stage of this
        process that trains; what `slack='auto'` begins with, before it has measured. Under
        `batch_size` it is the most that the delay can be: an update for each micro-batch. The rate
        is the optimizer's own, which `rate='linear'` or 'sqrt' of a growth multiplies later.

        None where nothing is stale, something is done about it already, the law says nothing of
        the optimizer, or replicas add to the delay; and before the stages are built.
        """
        flushes = self._blueprint.schedule.flushes
        adds = not isinstance(self._blueprint.replicas, Allreduce | None)
        return None if flushes or adds else stalest(engine.stage for engine in self._engines)

    @property
    def version(self) -> int:
        """How many updates this process's first stage has made, skipped ones included."""
        return self._engines[0].stage.version if self._engines else 0

    # Building ----------------------------------------------------------------------------------

    def _start_watch(self, world: World, timeout: tuple[float, float]) -> Watch:
        names = Grid(world.size).names
        return Watch(world.store, str(next(_jobs)), world.rank, names, timeout, self._pulse)

    def _pulse(self) -> Pulse:
        driver = self._driver
        if not isinstance(driver, Apart | Serving):
            return Pulse(0, False, False, "building the pipeline")
        pulse = driver.pulse()
        # As with what is the user's, nobody knows how long a disk should take.
        return replace(pulse, waiting=pulse.waiting and not self._keeper.is_writing)

    def _open(
        self, loader: Iterable[Any], pairs_only: bool, trains: bool = False
    ) -> Iterator[tuple[Nest, Nest]]:
        """Read a loader's first mini-batch, on the first stage, and build the stages if need be.

        Args:
            trains: each replica is to have mini-batches of its own, from where it left off.
        """
        self._require_open()
        with self._reporting("reading the loader's first mini-batch"), _gradients():
            if not self.is_first:
                if self.partition is None:
                    self._adopt(self._blueprint.cut_by_time(None))
                return iter(())
            if trains:
                self._course.begin(loader)
            batches = read(loader, pairs_only)
            if trains:
                batches = deal(self._course.draw(batches), loader, self._grid)
            if self.partition is None:  # on the pass's first, wherever in it training goes on
                first = next(batches)
                self._adopt(self._blueprint.cut_by_time(first if self.rank == 0 else None))
                batches = itertools.chain([first], batches)
            if trains:
                batches = self._course.find(batches)
            first_of_call = [*itertools.islice(batches, 1)]  # none is left at the end of a pass
            return itertools.chain(first_of_call, batches)

    def _adopt(self, cut: Partition) -> None:
        """Build this process's part of the pipeline, cut like this."""
        self.partition = cut
        self._source = Source()
        self._names = set(self._model.state_dict())
        if self.is_server:
            self._driver = self._blueprint.serve(cut)
            self._driver.saver = self._keeper.keep_server
        else:
            self._engines = self._blueprint.build(cut, self._links, self._source)
            for engine in self._engines:
                engine.saver = self._keeper.keep
            self._driver = self._drive(self._engines, self._source)
        pending, self._pending = self._pending, None
        if pending is not None:
            self._take_up(pending)

    def _drive(self, engines: Sequence[Engine], source: Source) -> Driver:
        if self._watch is None:
            return Alone(engines, source)
        return Apart(engines[0], source, self._watch)

    # Checkpoints -------------------------------------------------------------------------------

    def _head(self, final: Path) -> Checkpoint:
        assert self.partition is not None
        layers = [[layer.name for layer in stage] for stage in self.partition.stages]
        depths = [*self.depths]
        kinds, notes = self._blueprint.kinds, check_notes(self.notes)
        return Checkpoint(final, self.position, layers, self._grid.replicas, depths, kinds, notes)

    def _save(self, path: Path, keep: int | None) -> None:
        self._keeper.aim(path, keep)
        self._keeper.skip()
        self._run(Call.SAVE)

    def _leave(self) -> None:
        """After a SIGTERM, with all saved."""
        if self.rank == 0:
            where = self._keeper.target
            print(f"headrace: stopped by SIGTERM; {where} goes on from here", flush=True)
        self.close()
        raise SystemExit(0)

    def _take_up(self, restoring: Restoring) -> None:
        """Have the stages be what a checkpoint is of."""
        assert self.partition is not None
        restoring.fit(self.partition, [engine.stage.index for engine in self._engines])
        for engine in self._engines:
            engine.restoring = restoring
        if isinstance(self._driver, Serving):
            self._driver.restoring = restoring.restore_server
        self._run(Call.RESTORE)
        if not restoring.is_same and self._tunes and self.is_first:
            self._tune_at = self._engines[0].trained + TUNE_AT
        if self.rank == 0 and (line := restoring.explain(self.depths)):
            print(line, flush=True)

    # Running -----------------------------------------------------------------------------------

    def _warn_of_delay(self) -> None:
        """Before the first call of `train`, on the first rank, where the delay is known."""
        if self._warned or self.rank:
            return
        self._warned = True
        law = None if self._blueprint.settings.batch_size else self.stability
        if law is not None and law.warning is not None:
            warnings.warn(law.warning, StabilityWarning, stacklevel=3)

    def _run(self, call: Call, messages: Iterator[Message] | None = None) -> Any:
        driver = self._driver
        assert driver is not None
        if call is not Call.CLOSE:
            self._require_open()
        if call not in (Call.TRAIN, Call.SAVE, Call.CLOSE):
            self._keeper.heed()
        if self._under_way is not None:
            raise RuntimeError(
                f"{call.name.lower()}() while {self._under_way.name.lower()}() is under way, from "
                "a log, a loader or a thread: make one call after the other (train saves within "
                "itself with checkpoints=)"
            )
        with self._reporting(lambda: driver.doing), _gradients():
            self._under_way = call
            try:
                result = driver.run(call, messages or begin(call))
            except BaseException as error:
                self._closed = self._closed or self._watch is None
                self._ended_by = f"{type(error).__name__}: {first_line(error)}"
                raise
            finally:
                self._under_way = None
            self._source.finish()
            self._tell_servers(call, result)
            return result

    def _tell_servers(self, call: Call, result: Any) -> None:
        self._calls += 1
        if self._grid.servers and self.rank == 0 and call in TOLD and self._watch is not None:
            write, _ = TOLD[call]
            self._watch.share(f"result/{self._calls}", json.dumps(write(result)))

    def _require_open(self) -> None:
        if self._closed:
            cause = self._ended_by or "close()"
            raise RuntimeError(
                f"this pipeline has ended, by {cause}: build a new one (alone, the model has kept "
                "its weights)"
            )

    def _is_unbuilt(self, what: str) -> bool:
        """Whether the weights are those of the user's model still; it must have some then."""
        if self._driver is None and any(t.is_meta for t in self._model.state_dict().values()):
            self._require_built(what)
        return self._driver is None

    def _require_built(self, what: str) -> None:
        self._require_open()
        if self._driver is None:
            raise RuntimeError(
                f"{what} needs the stages, and balance='time' cuts them on the first mini-batch: "
                "call prepare(loader) first"
            )

    @contextmanager
    def _reporting(self, doing: str | Callable[[], str], refuses: bool = False) -> Iterator[None]:
        """Under torchrun, let all ranks know of an error before it goes its way."""
        try:
            yield
        except Exception as error:
            if self._watch is not None:
                if refuses and isinstance(error, TypeError | ValueError):
                    self._watch.refuse(error)
                else:
                    self._watch.fail_by(error, doing if isinstance(doing, str) else doing())
            raise
        except (SystemExit, KeyboardInterrupt) as error:
            if self._watch is not None:  # the others wait for what this rank will not do
                self._watch.end_by(error, doing if isinstance(doing, str) else doing())
            raise


@contextmanager
def _gradients() -> Iterator[None]:
    """Record gradients even for a caller who does not: a drain inside `no_grad` still trains."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def _end(reference: "weakref.ref[Pipeline]") -> None:
    """At exit: drain and close; after a failure end at once."""
    pipeline = reference()
    if pipeline is None:
        return
    watch = pipeline._watch
    if watch is not None:
        watch.end_process_if_failed()
        try:
            pipeline.close()
        finally:
            watch.end_process_if_failed()
    elif not pipeline._closed and pipeline._driver is not None:
        pipeline.close()
