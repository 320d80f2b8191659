"""Headrace's own schedules, built from the configuration as `launch.train` builds them."""

import math
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Literal

import torch

from headrace.pipeline import Pipeline
from headrace.pipeline.nest import leaves, to_device
from headrace.pipeline.partition import Partition
from headrace.pipeline.pipeline import TUNE_AT
from headrace.pipeline.schedule import SCHEDULES

from ...assemble import expected_staleness, make_pipeline
from ...components import Component
from ...config import PipelineOptions
from ..workload import Batch, Workload
from .system import Facts, System

__all__ = ["Configured", "Delayed", "Flushing", "Recorded", "Stream", "Unlocked"]


class _Headrace(System):
    """A pipeline with the cut that all systems get."""

    def options(self, options: PipelineOptions, micro_batches: int) -> PipelineOptions:
        """The configuration's, with what this row is about."""
        raise NotImplementedError

    def build(self, work: Workload, cut: Partition, micro_batches: int) -> None:
        options = self.options(work.config.pipeline, micro_batches)
        self._config = replace(
            work.config, pipeline=replace(options, balance=[*cut.sizes]), scheduler=None
        )
        self._rank = work.rank
        self.pipe: Pipeline = make_pipeline(self._config, work.model(), None, work.link)

    def train(self, batches: list[Batch]) -> None:
        self.pipe.train(batches)

    def begin(self) -> None:
        self.pipe.reset_shares()

    def facts(self, seconds: float) -> Facts:
        mine = self.pipe.statistics()[self._rank]
        depths = self.pipe.depths
        staleness = expected_staleness(self._config, depths)[self._rank]
        depth = depths[self._rank]
        return Facts(mine.busy, mine.waiting, staleness, depth, mine.in_flight, mine.copies)

    def close(self) -> None:
        self.pipe.close()


class Stream(_Headrace):
    """A stream; it stays full between warm-up and measurement."""

    def warm_up_steps(self) -> int:
        options = self._config.pipeline
        fill = 2 * max(self.pipe.depths[0], self.pipe.stages) + 4
        tune = TUNE_AT + 2 * self.pipe.stages if options.slack == "auto" else 0
        return math.ceil((fill + tune) / options.micro_batches)


class Delayed(Stream):
    """The stream under one weight policy.

    Args:
        slack: None is the configuration's.
    """

    def __init__(self, weights: str, slack: Literal["auto"] | None = None) -> None:
        self.weights, self.slack = weights, slack

    def options(self, options: PipelineOptions, micro_batches: int) -> PipelineOptions:
        rule = Component("delayed", {"weights": self.weights})
        slack = self.slack or options.slack
        return replace(options, schedule="stream", rule=rule, slack=slack)


class Configured(Stream):
    """The stream as the configuration has it, under its own rule or rules."""

    def refuses(self, work: Workload, cut: Partition, micro_batches: int) -> str | None:
        if SCHEDULES[work.config.pipeline.schedule].flushes:
            return f"schedule {work.config.pipeline.schedule}: it has rows of its own"
        return None

    def options(self, options: PipelineOptions, micro_batches: int) -> PipelineOptions:
        return options


class Unlocked(Stream):
    """The stream under a rule of which no stage waits for gradients.

    The rule's other arguments are the configuration's, where it has that rule.
    """

    def __init__(self, rule: str, **arguments: Any) -> None:
        self.rule, self.arguments = rule, arguments

    def refuses(self, work: Workload, cut: Partition, micro_batches: int) -> str | None:
        own = _own_rule(work.config.pipeline, self.rule)
        tensors = leaves(work.batches[0][0])
        floating = len(tensors) == 1 and tensors[0].is_floating_point()
        if "inputs" in self.arguments and "input_synthesizer" not in own and not floating:
            return "a synthetic input is guessed from one tensor of numbers"
        return None

    def build(self, work: Workload, cut: Partition, micro_batches: int) -> None:
        if self.rule == "local" and not _own_rule(work.config.pipeline, "local"):
            # As many as the network itself has.
            with torch.no_grad():
                output = work.model().to(work.device)(to_device(work.batches[0][0], work.device))
            self.arguments = {"outputs": output.shape[-1], **self.arguments}
        super().build(work, cut, micro_batches)

    def options(self, options: PipelineOptions, micro_batches: int) -> PipelineOptions:
        rule = Component(self.rule, {**_own_rule(options, self.rule), **self.arguments})
        return replace(options, schedule="stream", rule=rule, slack=0)


def _own_rule(options: PipelineOptions, name: str) -> dict[str, Any]:
    """The arguments of the configuration's rule, if it is of that name."""
    rule = options.rule
    return rule.init_args if isinstance(rule, Component) and rule.class_path == name else {}


class Recorded(Delayed):
    """The stream while a timeline is recorded: what recording costs."""

    def begin(self) -> None:
        super().begin()
        self._recording = ExitStack()
        self._recording.enter_context(self.pipe.record())

    def facts(self, seconds: float) -> Facts:
        self._recording.close()
        return super().facts(seconds)


class Flushing(_Headrace):
    """GPipe or 1F1B: exact, with a bubble."""

    cuts_mini_batches = True

    def __init__(self, schedule: str) -> None:
        self.schedule = schedule

    def refuses(self, work: Workload, cut: Partition, micro_batches: int) -> str | None:
        if micro_batches > work.samples:
            return f"{micro_batches} micro-batches of {work.samples} samples"
        return None

    def options(self, options: PipelineOptions, micro_batches: int) -> PipelineOptions:
        return replace(
            options,
            schedule=self.schedule,  # type: ignore[arg-type]
            rule=None,
            slack=0,
            micro_batches=micro_batches,
            update_every=1,
        )
