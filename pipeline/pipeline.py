"""Pipeline: what a user builds around an nn.Sequential."""

import atexit
import itertools
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor, nn

from .arguments import (
    check_choices,
    check_counts,
    check_kinds,
    check_rules,
    check_timeout,
    choose_stages,
)
from .channel import Links, connect_locally
from .driver import Alone, Apart, Driver
from .engine import Call, Engine, Metrics
from .errors import InputError, first_line
from .feed import Source, begin, feed, read
from .layers import Layers, materialise
from .link import Link
from .loss import Loss
from .measure import measure
from .message import Message
from .microbatch import split
from .nest import Nest
from .partition import Balance, LayerCost, Partition, check_model, count, partition
from .random_state import RandomState
from .report import Progress, Report, StageStatistics
from .rules import Delayed, Exact, Rule
from .schedule import SCHEDULES
from .settings import OptimizerFactory, SchedulerFactory, Settings
from .stage import Stage
from .timeline import Timeline
from .transport import connect
from .watch import Pulse, Watch, title
from .world import World, choose_device, meet

__all__ = ["Pipeline", "Recording"]

TUNE_AT = 16
"""The micro-batch before which `slack='auto'` measures."""

MINI_BATCH = 1 << 40
"""More micro-batches than a mini-batch has: all of them."""

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
        balance: 'time' (measured on the first micro-batch), 'parameters', each stage's number of
            layers, or the name of each stage's first layer.
        stages: None is the number of ranks, or 1 alone.
        slack: extra micro-batches in flight per hop, which hide slow links and add staleness: a
            number, one for each hop, or 'auto' (measured; torchrun only).
        micro_batches: how many a mini-batch is cut into.
        update_every: micro-batches to an update under 'stream', mini-batches under the others.
        clip_grad_norm: the largest 2-norm of a gradient: per stage under 'stream', over the whole
            model under the others.
        autocast: a dtype, as in torch.autocast.
        compile: True, or keywords of torch.compile, which each stage's layers go through.
        device: None is a GPU for each rank where there are enough, else the CPU.
        seed: of the random state of the stages after the first (which lives on the global one),
            and of layers on the meta device; None is torch.initial_seed().
        on_nonfinite: 'stop' at the first loss or gradient that is not finite, or 'skip' its update.
        timeout: seconds of silence after which the job ends, until the first update and after it.
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
        balance: Balance = "time",
        stages: int | None = None,
        slack: int | Sequence[int] | Literal["auto"] = 0,
        micro_batches: int = 1,
        update_every: int = 1,
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
            print(f"headrace: {error}", file=sys.stderr, flush=True)
            raise SystemExit(2) from error
        self._watch = self._start_watch(self._world, timeout) if self._world else None
        self.partition: Partition | None = None
        self._closed = False
        self._ended_by = ""
        self._links: list[Links] = []
        atexit.register(_end, weakref.ref(self))
        with self._reporting("building the pipeline", refuses=True):
            self.rank = self._world.rank if self._world else 0
            self.stages = choose_stages(stages, self._world)
            check_model(model, self.stages)
            check_choices(loss_fn, optimizer, schedule, on_nonfinite)
            check_kinds(rule, slack, autocast, device, emulated_link)
            if emulated_link is not None and self._world is None:
                raise ValueError(
                    "emulated_link= holds messages between processes back, and one process sends "
                    "none: start it with torchrun, or leave it out"
                )
            check_counts(micro_batches, update_every, clip_grad_norm)
            self._model, self._micro_batches = model, micro_batches
            self._schedule = SCHEDULES[schedule]
            if rule is None:
                rule = Exact() if self._schedule.flushes else Delayed("stash")
            self._rules = [rule] * self.stages if isinstance(rule, Rule) else [*rule]
            check_rules(self._rules, self._schedule, self.stages, slack)
            self._tunes = slack == "auto"
            if self._tunes and (self._world is None or self._schedule.flushes):
                raise ValueError(
                    "slack='auto' measures the links of a stream under torchrun: alone, or under "
                    "a schedule that flushes, write a number"
                )
            waits = [each.ahead is None for each in self._rules]
            slack = 1 if slack == "auto" else slack
            self._depths = self._schedule.depths(self.stages, slack, waits)
            self._device, shared = choose_device(device, self._world)
            if isinstance(loss_fn, nn.Module):
                loss_fn.to(self._device)
            self._seed = torch.initial_seed() if seed is None else seed
            self._settings = Settings(
                loss_fn=loss_fn,
                optimizer=optimizer,
                scheduler=scheduler,
                update_every=update_every,
                clip_grad_norm=clip_grad_norm,
                autocast=autocast,
                compile=dict(compile) if isinstance(compile, Mapping) else {} if compile else None,
                stops_on_nonfinite=on_nonfinite == "stop",
            )
            self._links = self._connect(shared, emulated_link)
            if self.stages == 1:
                self._cut([len(model)], count(model))
            elif balance != "time":
                self._cut(balance, count(model))

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
    ) -> Report:
        """Train on a loader once.

        Under 'stream' it returns without draining: this stage has run its last forward and what
        the schedule puts right after it. The report covers the micro-batches whose gradient has
        reached the first stage; the others are in the next report.

        Args:
            log: called on the first stage, with the losses read from the device then and only then.
            log_every: micro-batches between two logs.

        Raises:
            InputError: the loader raises, gives nothing, or what cannot be cut into samples.
            FloatingPointError: a loss or gradient is not finite (on_nonfinite='stop').
        """
        if log_every < 1:
            raise ValueError(f"log_every={log_every!r}: give a whole number >= 1")
        batches = self._open(loader, pairs_only=True)
        first = self._engines[0]
        first.books.log, first.books.log_every = log, log_every
        tune_at = TUNE_AT if self._tunes else None
        report: Report = self._run(
            Call.TRAIN, feed(Call.TRAIN, batches, self._micro_batches, first.trained, tune_at)
        )
        return report

    def evaluate(self, loader: Iterable[Any], metrics: Metrics | None = None) -> dict[str, float]:
        """Drain, then give the mean over samples of the loss and of each metric, on every rank.

        Args:
            metrics: names to functions of (output, target) that give a mean over the samples.
        """
        if metrics and "loss" in metrics:
            raise ValueError("metrics has one named 'loss', as the loss itself is: rename it")
        batches = self._open(loader, pairs_only=True)
        self._engines[-1].metrics = dict(metrics or {})
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
            self._run(Call.DRAIN)
            expected = self._names
            if set(state) != expected:
                raise RuntimeError(
                    f"the weights do not fit the model: missing {sorted(expected - set(state))}, "
                    f"unknown {sorted(set(state) - expected)}"
                )
            for engine in self._engines:
                engine.stage.load_state_dict(state)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Drain, then give the parameters of the stages of this process, by the model's names."""
        self._require_built("named_parameters()")
        self._run(Call.DRAIN)
        return itertools.chain(*(e.stage.layers.named_parameters() for e in self._engines))

    def statistics(self) -> list[StageStatistics]:
        """Drain, then give each stage's figures; the same on every rank."""
        self._require_built("statistics()")
        result: list[StageStatistics] = self._run(Call.STATISTICS)
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
        if self._watch is not None:
            for links in self._links:
                links.close()
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
        """Whether the first stage is in this process."""
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        """Whether the last stage is in this process."""
        return self._world is None or self.rank == self.stages - 1

    @property
    def depths(self) -> tuple[int, ...]:
        """Each stage's micro-batches in flight behind a forward; its staleness, once warm. 0 for a
        stage that does not wait for its gradients.
        """
        return self._engines[0].depths if self._driver else self._depths

    @property
    def version(self) -> int:
        """How many updates this process's first stage has made, skipped ones included."""
        return self._engines[0].stage.version if self._driver else 0

    # Building ----------------------------------------------------------------------------------

    def _start_watch(self, world: World, timeout: tuple[float, float]) -> Watch:
        names = [title(rank, world.size, rank) for rank in range(world.size)]
        return Watch(world.store, str(next(_jobs)), world.rank, names, timeout, self._pulse)

    def _pulse(self) -> Pulse:
        driver = self._driver
        if not isinstance(driver, Apart):
            return Pulse(0, False, False, "building the pipeline")
        engine = driver.engines[0]
        return Pulse(engine.progress, driver.waiting, engine.stage.version > 0, engine.doing)

    def _connect(self, shares_device: bool, emulated_link: Link | None) -> list[Links]:
        directly = self._rules[-1].synthesizes_inputs and self.stages > 1
        if self._world is None or self._watch is None:
            return connect_locally(self.stages, directly)
        ranks = list(range(self.stages))
        watch, device = self._watch, self._device
        return [
            connect(
                ranks,
                self.rank,
                device,
                shares_device,
                watch.bell,
                watch.lost,
                emulated_link,
                directly,
            )
        ]

    def _open(self, loader: Iterable[Any], pairs_only: bool) -> Iterator[tuple[Nest, Nest]]:
        """Read a loader's first mini-batch, on the first stage, and build the stages if need be."""
        self._require_open()
        with self._reporting("reading the loader's first mini-batch"), _gradients():
            if not self.is_first:
                if self.partition is None:
                    self._measure_and_cut(None)
                return iter(())
            batches = read(loader, pairs_only)
            first = next(batches)
            if self.partition is None:
                self._measure_and_cut(first)
            return itertools.chain([first], batches)

    def _measure_and_cut(self, batch: tuple[Nest, Nest] | None) -> None:
        """The first rank measures on the first micro-batch; all ranks cut alike."""
        if batch is not None:
            x, target = cast(tuple[Nest, Nest], split(batch, self._micro_batches)[0])
            costs = measure(self._model, x, target, self._settings, self._device, self._seed)
            result = partition(self._model, self.stages, "time", costs)
            if self._watch is not None:
                self._watch.share("partition", result.to_json())
        else:
            assert self._watch is not None
            result = Partition.from_json(self._watch.learn("partition"))
        self.partition = result
        self._build()

    def _cut(self, balance: Balance, costs: Sequence[LayerCost]) -> None:
        self.partition = partition(self._model, self.stages, balance, costs)
        self._build()

    def _build(self) -> None:
        assert self.partition is not None
        self._source = source = Source()
        self._names = set(self._model.state_dict())
        mine = range(self.stages) if self._world is None else [self.rank]
        engines = []
        for j, links in zip(mine, self._links, strict=True):
            if j == 0:
                links.from_upstream = source
            engines.append(Engine(self._make_stage(j), self._schedule, self._depths, links))
        self._engines = engines
        if self._watch is None:
            self._driver = Alone(engines, source)
        else:
            self._driver = Apart(engines[0], source, self._watch)

    def _make_stage(self, index: int) -> Stage:
        assert self.partition is not None
        names = [cost.name for cost in self.partition.stages[index]]
        layers = [(name, self._model.get_submodule(name)) for name in names]
        for name, layer in layers:
            materialise(name, layer, self._seed, self._device)
        random = RandomState.derive(self._seed, index, self._device) if index else None
        return Stage(
            index,
            self.stages,
            self._depths[index],
            Layers(layers).to(self._device),
            self._rules[index],
            self._settings,
            self._device,
            random,
            self._ahead(index),
            self._seed,
        )

    def _ahead(self, index: int) -> int | None:
        """Micro-batches sent on at most of which nothing has come back yet, where a stage does not
        wait: its rule's, and those that the next stage has in flight before it sends anything back.
        """
        rule, last = self._rules[index], index == self.stages - 1
        if rule.ahead is None or self.stages == 1 or (last and not rule.synthesizes_inputs):
            return None
        if self._schedule.unbounded:
            return MINI_BATCH
        return rule.ahead + (0 if last else self._depths[index + 1])

    # Running -----------------------------------------------------------------------------------

    def _run(self, call: Call, messages: Iterator[Message] | None = None) -> Any:
        driver = self._driver
        assert driver is not None
        if call is not Call.CLOSE:
            self._require_open()
        with self._reporting(lambda: driver.engines[0].doing), _gradients():
            try:
                result = driver.run(call, messages or begin(call))
            except BaseException as error:
                self._closed = self._closed or self._watch is None
                self._ended_by = f"{type(error).__name__}: {first_line(error)}"
                raise
            self._source.finish()
            return result

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
