"""Drive the engines: all of them in turn inside one process, or this rank's own under torchrun."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from .engine import Call, Done, Engine
from .feed import Source
from .layers import layer_at_fault
from .message import Message
from .watch import Watch

__all__ = ["Alone", "Apart", "Driver"]


class Driver(Protocol):
    """Carries a call through the engines of this process."""

    engines: list[Engine]

    def run(self, call: Call, messages: Iterator[Message]) -> Any:
        """Make a call with the first stage's messages, and give its result."""


class Alone:
    """All stages in one process, each going on until it waits: deterministic."""

    def __init__(self, engines: Sequence[Engine], source: Source) -> None:
        self.engines, self._source = list(engines), source
        self._flows = [engine.serve() for engine in engines]

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

    def run(self, call: Call, messages: Iterator[Message]) -> Any:
        engine = self.engines[0]
        engine.expected = call
        self._source.open(messages)
        self._watch.check()
        while not isinstance(step := next(self._flow), Done):
            self.waiting = True
            self._watch.idle(step.file, patient=engine.links.flush())
            self.waiting = False
        while not engine.links.flush():
            self._watch.idle(patient=False)
        return step.result
