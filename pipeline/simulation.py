"""Simulation: the staleness of any number of stages, exactly, about as fast as plain training."""

from collections.abc import Sequence

from .driver import Driver
from .engine import Engine
from .feed import Source
from .pipeline import Pipeline
from .together import Together, runs_together

__all__ = ["Simulation"]


class Simulation(Pipeline):
    """A Pipeline of one process for studying what staleness does, without its cost in time.

    It takes the same arguments, makes the same calls and gives bit for bit the same numbers. Where
    all rules are `Delayed`, but for 'replay', a micro-batch runs through all stages at once
    (`together`); then spans and shares of time are missing. Elsewhere stages take turns.

    Raises:
        ValueError: also, under torchrun.
    """

    def _drive(self, engines: Sequence[Engine], source: Source) -> Driver:
        if self._watch is not None:
            raise ValueError("a Simulation is of one process: start it without torchrun")
        rules = [engine.stage.rule for engine in engines]
        streams = not any(engine.schedule.flushes for engine in engines)
        if streams and all(map(runs_together, rules)):
            return Together(engines, source)
        return super()._drive(engines, source)
