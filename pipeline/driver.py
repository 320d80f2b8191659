"""Drive the engines: all of them in turn inside one process, or this rank's own under torchrun."""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from .engine import Call, Done, Engine
from .feed import Source
from .layers import layer_at_fault
from .message import Message
from .replicas.server import Server, Serves
from .report import Report, ShardStatistics
from .watch import Pulse, Watch

__all__ = ["TOLD", "Alone", "Apart", "Driver", "Serving"]


class Driver(Protocol):
    """Carries a call through the engines of this process."""

    @property
    def doing(self) -> str:
        """What this process is at, for messages."""

    def run(self, call: Call, messages: Iterator[Message]) -> Any:
        """Make a call with the first stage's messages, and give its result."""


class Alone:
    """All stages in one process, each going on until it waits: deterministic."""

    def __init__(self, engines: Sequence[Engine], source: Source) -> None:
        self.engines, self._source = list(engines), source
        self._flows = [engine.serve() for engine in engines]

    @property
    def doing(self) -> str:
        return self.engines[0].doing

    def run(self, call: Call, messages: Iterator[Message]) -> Any:
        self._source.open(messages)
        results: dict[int, Any] = {}
        while len(results) < len(self.engines):
            before = sum(engine.progress for engine in self.engines)
            for j, (engine, flow) in enumerate(zip(self.engines, self._flows, strict=True)):
                if j not in results:
                    engine.expected = call
                    step = self._advance(engine, flow)
                    if isinstance(step, Done):
                        results[j] = step.result
            if before == sum(engine.progress for engine in self.engines):
                states = "; ".join(f"stage {e.stage.index} {e.doing}" for e in self.engines)
                raise RuntimeError(f"the stages wait for each other, a fault of Headrace: {states}")
        return results[0]

    def _advance(self, engine: Engine, flow: Iterator[Any]) -> Any:
        try:
            return next(flow)
        except StopIteration:
            raise RuntimeError("this pipeline has ended: build a new one") from None
        except Exception as error:
            layer = layer_at_fault(error)
            where = f"{layer}, {engine.doing}" if layer else engine.doing
            stage = f"stage {engine.stage.index} of {len(self.engines)}"
            error.add_note(f"headrace: in {stage}, {where}")
            raise


class Apart:
    """This rank's stage alone; the others are other ranks'."""

    def __init__(self, engine: Engine, source: Source, watch: Watch) -> None:
        self.engines, self._source, self._watch = [engine], source, watch
        self._flow = engine.serve()
        self.waiting = False

    @property
    def doing(self) -> str:
        return self.engines[0].doing

    def pulse(self) -> Pulse:
        """What to tell of itself with every beat."""
        engine = self.engines[0]
        return Pulse(engine.progress, self.waiting, engine.stage.version > 0, engine.doing)

    def run(self, call: Call, messages: Iterator[Message]) -> Any:
        engine = self.engines[0]
        engine.expected = call
        self._source.open(messages)
        self._watch.check()
        while not isinstance(step := next(self._flow), Done):
            self.waiting = not step.outside
            self._watch.idle(step.file, patient=engine.links.flush() and not step.silent)
            self.waiting = False
        while not engine.links.flush():
            self._watch.idle(patient=False)
        return step.result


TOLD: dict[Call, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    Call.TRAIN: (Report.numbers, Report.from_numbers),
    Call.EVALUATE: (dict, dict),
    Call.SHARDS: (
        lambda shards: [shard.numbers() for shard in shards],
        lambda rows: [ShardStatistics.from_numbers(row) for row in rows],
    ),
}
"""Results that the first rank tells servers: how they are written for JSON, and read."""


class Serving:
    """A process that has no stage: its server works in threads, and calls wait for the replicas'.

    What a call gives is the first rank's; tensors are not sent here: `predict` gives None, and
    `state_dict` the server's own weights.
    """

    saver: Callable[[Serves], None]
    restoring: Callable[[Serves], None]
    """As an engine's; called while all are at rest, and none goes on before it says so."""

    def __init__(self, server: Server, watch: Watch) -> None:
        self._server, self._watch = server, watch
        self._calls = self._settlings = 0

    @property
    def doing(self) -> str:
        return f"serving the weights of stage {self._server.shard.stage}"

    def pulse(self) -> Pulse:
        """What to tell of itself with every beat."""
        server = self._server
        return Pulse(server.handled, True, server.shard.version > 0, self.doing)

    def run(self, call: Call, messages: Iterator[Message]) -> Any:
        self._calls += 1
        if call is not Call.TRAIN:
            self._settle()
        if call is Call.SAVE:
            self.saver(self._server.shard)
        if call is Call.RESTORE:
            self.restoring(self._server.shard)
        if call in (Call.LOAD, Call.RESTORE):
            self._settle()
        if call is Call.CLOSE:
            while self._server.connected:
                self._watch.idle(patient=False)
            self._server.close()
        if call is Call.STATE_DICT:
            return self._server.shard.snapshot()
        if call in TOLD:
            _, read = TOLD[call]
            return read(json.loads(self._watch.learn(f"result/{self._calls}")))
        return [] if call is Call.STATISTICS else None

    def _settle(self) -> None:
        """Wait until all replicas are at rest."""
        self._settlings += 1
        while self._server.settlings < self._settlings:
            self._watch.idle()
