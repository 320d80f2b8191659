"""Run a schedule on a stage: the only place that acts.

The engine is a generator. It yields the inbox while the message it needs is not there, and `Done`
when a call (train, evaluate, …) is over on its stage. Who drives it decides what waiting means:
another stage's turn in the same process, or a sleep until a neighbour's message rings the bell.

The first stage's upstream is its caller: a call begins with a message there, as it does for every
other stage, so all stages run the same code and follow what the first decides.

What the first decides passes from stage to stage; under full unlock it goes to all stages directly,
and so do the micro-batches' inputs and targets, which a stage then runs on without waiting for the
stage before. What that one gives, it learns from.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, cast

import torch
from torch import Tensor

from . import calls
from .channel import Inbox, Links
from .errors import NonFiniteError
from .finite import explain
from .gathering import Gathering
from .gradient import all_finite
from .message import Kind, Message
from .nest import Nest, leaves, to_device, total_bytes
from .report import Books, Report, Row
from .schedule import (
    Action,
    Backward,
    Learn,
    Schedule,
    Stretch,
    Update,
    depths,
)
from .slack import choose_slack
from .stage import Flight, Stage
from .timeline import WORKING, Span, Work

__all__ = ["Call", "Done", "Engine", "Metrics", "Steps"]

WARM = 4
"""Micro-batches after which a stage's times are taken for `slack='auto'`."""

Metrics = Mapping[str, Callable[[Any, Any], Any]]
"""Names to functions of an output and its target (nests) that give a mean over samples."""


class Call(IntEnum):
    """What a user asks of a pipeline; every rank makes the same calls in the same order."""

    TRAIN, EVALUATE, PREDICT, STATE_DICT, LOAD = range(5)
    STATISTICS, SHARDS, TIMELINE, LINKS, DRAIN, CLOSE, SAVE, RESTORE = range(5, 13)


@dataclass(frozen=True)
class Done:
    """A call is over on this stage."""

    result: Any


Steps = Generator[Done | Inbox, None, Any]


class Engine:
    """One stage at work.

    Args:
        stage_depths: of all stages; `_tune` may change them.
        links: the first stage's upstream is its caller.
    """

    saver: "Callable[[Engine, Message], Steps]"
    """Makes a checkpoint's part of it; given by whoever keeps them."""

    restoring: "Callable[[Engine], None]"
    """Makes it what a checkpoint is of; given before a RESTORE."""

    def __init__(
        self, stage: Stage, schedule: Schedule, stage_depths: tuple[int, ...], links: Links
    ) -> None:
        self.stage, self.schedule, self.links = stage, schedule, links
        self.depths = stage_depths
        self.books = Books(stage.count)
        settings = stage.settings
        self.gathering = Gathering(
            settings.update_every, settings.batch_size, schedule.flushes, self.books
        )
        self.expected = Call.TRAIN
        self.metrics: Metrics = {}
        self.incoming: Mapping[str, Tensor] = {}
        self.doing = "waiting for its first call"
        self.progress = 0
        self.recorder = links.recorder
        self.spans: list[Span] = []
        self._warm = (list(self.recorder.seconds), list(self.recorder.counts))
        self.restart_shares()
        self.hop_bytes = 0
        self._orders = links.from_first or links.from_upstream
        self._read_ahead: deque[Message] = deque()
        self._real_inputs: deque[Message] = deque()
        self._heard = 0  # losses that have come up to here, or are this stage's own
        self._losses: list[Tensor] = []  # those not passed on yet
        self._below: tuple[float, ...] = Row() * (stage.count - 1 - stage.index)
        self.trained = 0
        self.within = False  # a pass that began before this call, if it was ended early
        self._stretch = self._new_stretch()

    def restart_shares(self) -> None:
        """Count the shares of time in `statistics` from here."""
        self._spent = [0.0] * len(Work)
        self._training_seconds = 0.0

    def shares(self) -> tuple[float, float, float]:
        """Of the time in `train` since then: at work, waiting for neighbours, for the loader."""
        seconds = self._training_seconds or math.nan
        busy = sum(self._spent[work] for work in WORKING)
        waiting, data = self._spent[Work.WAIT], self._spent[Work.DATA]
        return busy / seconds, waiting / seconds, data / seconds

    def serve(self) -> Generator[Done | Inbox, None, None]:
        """Serve one call after the other, until the pipeline is closed."""
        serving: dict[Call, Callable[[Engine], Steps]] = {
            Call.EVALUATE: calls.evaluate,
            Call.PREDICT: calls.predict,
            Call.STATE_DICT: calls.state_dict,
            Call.LOAD: calls.load,
            Call.STATISTICS: calls.stage_statistics,
            Call.SHARDS: calls.shard_statistics,
            Call.TIMELINE: calls.timeline,
            Call.LINKS: calls.measure_links,
            Call.DRAIN: calls.nothing,
            Call.CLOSE: calls.close,
            Call.SAVE: calls.save,
            Call.RESTORE: calls.restore,
        }
        call = None
        while call is not Call.CLOSE:
            begin = yield from self.take(self._orders)
            call = Call(begin.index)
            if call is not self.expected:
                raise RuntimeError(
                    f"the first stage called {call.name.lower()}() while stage {self.stage.index} "
                    f"called {self.expected.name.lower()}(): every rank must make the same calls "
                    "in the same order, though only the first stage reads the data"
                )
            self._pass_on(begin)
            if call is Call.TRAIN:
                result = yield from self._train()
            else:
                yield from self._drain()
                if call is Call.CLOSE and self.stage.gradient.versions:
                    yield from self.update()
                yield from self.stage.peers.settle(self)
                result = yield from serving[call](self)
                yield from self.stage.peers.release(self)
            yield Done(result)

    def go_on(self, trained: int, stage_depths: tuple[int, ...]) -> None:
        """Be where another engine was when nothing was in flight."""
        self.depths, self.stage.depth = stage_depths, stage_depths[self.stage.index]
        self.trained = self._heard = trained
        self._stretch = self._new_stretch()

    # Training ----------------------------------------------------------------------------------

    def _train(self) -> Steps:
        self.stage.set_training(True)
        yield from self.stage.peers.ready(self)
        self.books.begin()
        if not self.within:
            self.gathering.begin()
        self.within = True
        start, before = time.perf_counter(), list(self.recorder.seconds)
        while True:
            message = yield from self._next()
            if message.kind is Kind.MICRO_BATCH:
                yield from self._feed(message)
            elif message.kind is Kind.TUNE:
                self.send_down(message)
                yield from self._tune()
            elif message.kind is Kind.SAVE:
                if not self.links.to_others:  # to whom it has gone already
                    self._pass_on(message)
                yield from self._drain()
                yield from self.saver(self, message)
            else:
                break
        if self.stage.is_first:
            report = self.books.close(self.stage.version, message.last)
            message = replace(message, numbers=report.numbers())
        self.within = message.last
        self._pass_on(message)
        self._training_seconds += time.perf_counter() - start
        for work, (now, then) in enumerate(zip(self.recorder.seconds, before, strict=True)):
            self._spent[work] += now - then
        yield from self.stage.peers.rest(self)
        return Report.from_numbers(message.numbers)

    def _next(self) -> Generator[Inbox, None, Message]:
        """The next message of a call of `train`.

        Under full unlock the first stage reads ahead, and what it reads goes to all others at once:
        a stall of its own does not hold them up.
        """
        if not self.links.to_others:
            return (yield from self.take(self._orders))
        ahead = self._read_ahead
        pauses = (Kind.END, Kind.SAVE)
        while len(ahead) <= (self.stage.ahead or 0) and not (ahead and ahead[-1].kind in pauses):
            message = yield from self.take(self._orders)
            if message.kind is Kind.SAVE:
                self._pass_on(message)
            if message.kind is Kind.MICRO_BATCH:
                x, target = cast(tuple[Nest, Nest], message.body)
                # A loader may fill its tensors anew while they wait here.
                device = self.stage.device
                message = message.carrying(
                    (to_device(x, device, True), to_device(target, device, True))
                )
                self._pass_on(message)
            ahead.append(message)
        return ahead.popleft()

    def _pass_on(self, message: Message) -> None:
        """Let the stages after this one know what the first has decided."""
        for outbox in self.links.to_others:
            outbox.send(message)
        if not self.links.to_others and self.links.from_first is None:
            self.send_down(message)

    def _feed(self, message: Message) -> Steps:
        """One tick: a forward, then what the schedule puts before the next one."""
        yield from self._forward(message)
        for action in self._stretch.after(bool(message.numbers[1])):
            yield from self._perform(action)
        if self._must_drain(message):
            yield from self._drain()

    def _must_drain(self, message: Message) -> bool:
        """Whether nothing may be in flight beyond this micro-batch."""
        if self.schedule.flushes:
            return message.last
        return bool(message.numbers[1]) and self.stage.is_synchronous

    def _drain(self) -> Steps:
        """Bring everything in flight to its end."""
        for action in self._stretch.after(None):
            yield from self._perform(action)
        # Losses that came too late to ride up with a gradient.
        while self._heard < self.trained:
            self._hear((yield from self.take(self.links.from_downstream)))
        if self._losses:
            self._tell(-1, [])
        self._stretch = self._new_stretch()

    def _new_stretch(self) -> Stretch:
        stage = self.stage
        return Stretch(self.schedule.actions(stage.depth, self.trained, stage.ahead))

    def _perform(self, action: Action) -> Steps:
        if isinstance(action, Backward):
            yield from self._backward(action.index)
        elif isinstance(action, Update):
            yield from self.update()
        else:
            assert isinstance(action, Learn)
            yield from self._learn(action.index)

    def _forward(self, message: Message) -> Steps:
        stage = self.stage
        self.doing = f"forward of micro-batch {message.index}"
        if stage.is_first:
            self.books.fed(int(message.numbers[0]))
        if self.trained == WARM:
            self._warm = (list(self.recorder.seconds), list(self.recorder.counts))
        self.trained += 1
        if self.links.from_first is not None and not stage.rule.knows_inputs:
            yield from self._see_input(message)
        output, target = self.recorder.run(Work.FORWARD, message.index, self._run_stage, message)
        self.hop_bytes = total_bytes(output)
        if not stage.is_last:
            # Under full unlock the next stage has its target from the first.
            rides = None if self.links.to_others or self.links.from_first else target
            self.send_down(message.carrying((output, rides)))

    def _see_input(self, message: Message) -> Steps:
        """Find out what inputs look like, from the first real one."""
        self.doing = "waiting for the first real input"
        self._real_inputs.append((yield from self.take(self.links.from_upstream)))
        source, _ = cast(tuple[Nest, Nest], message.body)
        x, _ = cast(tuple[Nest, Nest], self._real_inputs[0].body)
        self.stage.rule.see_input(self.stage, source, x)

    def _run_stage(self, message: Message) -> tuple[Nest, Nest]:
        x, target = self.read_input(message)
        source = None
        if self.links.from_first is not None:
            source, x = x, self.stage.rule.guess_input(self.stage, x)
        samples, closes = int(message.numbers[0]), bool(message.numbers[1])
        return self.stage.forward(message.index, x, target, samples, source, closes), target

    def read_input(self, message: Message) -> tuple[Nest, Nest]:
        assert isinstance(message.body, tuple)
        x, target = message.body
        if self.stage.is_first:
            # A loader may fill its tensors anew while they are in flight: they need copies then,
            # which those that were read ahead are.
            device, copy = self.stage.device, self.stage.count > 1 and not self.links.to_others
            x, target = to_device(x, device, copy), to_device(target, device, copy)
        return x, target

    def _backward(self, index: int) -> Steps:
        stage, flight = self.stage, self.stage.flights[index]
        gradients: list[Tensor | None] | None = None if stage.guesses else []
        if not (stage.guesses or stage.is_last):
            self.doing = f"waiting for the gradient of micro-batch {index}"
            before = self._heard
            gradients = self._hear((yield from self.take(self.links.from_downstream)), index)
            if before <= index < self._heard:
                flight.loss = self._losses[index - self._heard]
        self.doing = f"backward of micro-batch {index}"
        returned: list[Tensor | None] = []
        if not stage.rule.moves():
            returned = [None for _ in leaves(flight.x)]
        else:
            returned = self.recorder.run(Work.BACKWARD, index, stage.backward, flight, gradients)
            if stage.settings.stops_on_nonfinite:
                leaving = [gradient for gradient in returned if gradient is not None]
                if not (flight.finite and all_finite(leaving)):
                    self.stop_on(flight, gradients)
        if stage.is_last:
            assert flight.loss is not None
            self._losses.append(flight.loss.detach())
            self._heard += 1
        stage.release(flight)
        if self._losses or not stage.is_first:
            self._tell(index, returned)

    def _hear(self, reply: Message, index: int = -1) -> list[Tensor | None]:
        """Take in what the stage after tells: losses, figures, and gradients, which it returns."""
        assert reply.index == index
        losses, gradients = cast(tuple[list[Tensor], list[Tensor | None]], reply.body)
        self._losses += losses
        self._heard += len(losses)
        self._below = reply.numbers
        return gradients

    def _tell(self, index: int, returned: list[Tensor | None]) -> None:
        """Pass up what is known: losses, figures, and the gradient of a micro-batch's input."""
        stage = self.stage
        figures = stage.rule.figures
        row = Row(
            stage.latest_staleness,
            self.recorder.working,
            time.perf_counter(),
            stage.skipped,
            stage.latest_lag,
            figures.synthesizer_loss,
            figures.cosine,
            figures.local_loss,
            *stage.sampled,
        )
        numbers = row + self._below
        losses, self._losses = self._losses, []
        if not stage.is_first:
            body: Nest = ([*losses], [*returned])
            self.send_up(Message(Kind.RESULT, index, numbers=numbers, body=body))
            return
        for loss in losses:
            rate, samples = stage.learning_rate, stage.latest_samples
            self.books.note(loss, numbers, stage.version, rate, samples)

    def _learn(self, index: int) -> Steps:
        """Take in what came back for micro-batch `index` and those before, and what came early."""
        stage, links = self.stage, self.links
        waiting = stage.awaiting_gradient
        while reply := (yield from self._due(waiting, links.from_downstream, index)):
            flight = waiting[0]
            gradients = self._hear(reply, flight.index)
            self.doing = f"learning from what came back for micro-batch {flight.index}"
            if not self.recorder.run(Work.LEARN, reply.index, stage.learn, gradients):
                self._stop_on_arrived("gradient", flight, gradients)
        waiting = stage.awaiting_input
        while real := (yield from self._due(waiting, links.from_upstream, index)):
            flight = waiting[0]
            assert real.index == flight.index
            x, _ = cast(tuple[Nest, Nest], real.body)
            self.doing = f"learning from the real input of micro-batch {flight.index}"
            if not self.recorder.run(Work.LEARN, real.index, stage.learn_input, x):
                self._stop_on_arrived("input", flight, leaves(x))
        if stage.is_first and self._losses:
            self._tell(-1, [])

    def _due(
        self, waiting: deque[Flight], inbox: Inbox | None, index: int
    ) -> Generator[Inbox, None, Message | None]:
        """What the first of `waiting` waits for: if it must have come, or has; else None."""
        if not waiting:
            return None
        early = self._real_inputs if inbox is self.links.from_upstream else None
        if early:
            return early.popleft() if waiting[0].index <= index or self.stage.rule.eager else None
        if waiting[0].index <= index:
            self.doing = f"waiting for what comes back for micro-batch {waiting[0].index}"
            return (yield from self.take(inbox))
        assert inbox is not None
        message = inbox.poll() if self.stage.rule.eager else None
        self.progress += message is not None
        return message

    def _stop_on_arrived(self, kind: str, flight: Flight, arrived: Sequence[Tensor | None]) -> None:
        """Stop on what a synthesizer could not learn from, and say whose fault it was."""
        stage = self.stage
        if not stage.settings.stops_on_nonfinite:
            return
        what = f"the {kind} that a synthesizer makes of it is not finite: lower its learning rate"
        if not all_finite([t for t in arrived if t is not None and t.is_floating_point()]):
            what = f"the {kind} that came from the neighbour is not finite"
        if not all_finite([t for t in leaves(flight.output) if t.is_floating_point()]):
            what = "the output of this stage is not finite"
        raise NonFiniteError(
            f"stage {stage.index} of {stage.count}, micro-batch {flight.index}: {what}. Try a "
            "lower learning rate, clip_grad_norm=1.0, or on_nonfinite='skip'"
        )

    def update(self) -> Steps:
        """Move the weights on what was accumulated, as all replicas have it."""
        self.doing = f"update {self.stage.version}"
        yield from self.stage.peers.combine(self)
        yield from self.apply()
        yield from self.stage.peers.refresh(self)

    def apply(self) -> Steps:
        """Move the weights on the stage's gradient, agreeing with the other stages if need be."""
        stage = self.stage
        if not self._must_agree():
            self.recorder.run(Work.UPDATE, stage.version, self._update_alone)
            return
        stage.load_gradient()
        squared = stage.gradient_norm().double().cpu() ** 2
        mine = torch.stack([squared, torch.tensor(not stage.gradient.finite).double()])
        total = yield from self.fold(mine, torch.add)
        norm, finite = total[0].sqrt().to(stage.device), not total[1]
        self.recorder.run(Work.UPDATE, stage.version, stage.update, norm, finite)

    def _update_alone(self) -> None:
        self.stage.load_gradient()
        self.stage.update(None, self.stage.gradient.finite)

    def _must_agree(self) -> bool:
        """Under a flush all stages move at once: on one norm to clip by, one decision to skip."""
        settings = self.stage.settings
        matters = settings.clip_grad_norm is not None or not settings.stops_on_nonfinite
        return self.schedule.flushes and self.stage.count > 1 and matters

    def stop_on(self, flight: Flight, gradients: list[Tensor | None] | None) -> None:
        stage = self.stage
        reason = explain(stage, flight, gradients)
        if reason is None:
            # What the stage before gave was at fault: with this loss it will look, and say so.
            # One that does not wait looks at its own output, and at the gradient that comes back.
            flight.loss = torch.full((), math.nan, device=stage.device)
            if not stage.is_last and self._losses:
                self._losses[-1] = flight.loss
        else:
            late = any(self.depths) and not self.schedule.flushes
            delay = " (what a delay allows falls as 1/(2τ+1))" if late else ""
            raise NonFiniteError(
                f"stage {stage.index} of {stage.count}, micro-batch {flight.index}: {reason}. "
                f"Staleness {stage.timestamp - flight.version} updates, effective learning rate "
                f"η/(1-m) = {stage.effective_learning_rate:.3g}. Try a lower learning rate"
                f"{delay}, clip_grad_norm=1.0, or on_nonfinite='skip'"
            )

    def _tune(self) -> Steps:
        """Measure every stage and every hop, and choose the slack; all stages choose alike."""
        yield from self._drain()
        self.doing = "measuring the links"
        stage, hop = self.stage, math.nan
        if not stage.is_last:
            hop, _ = yield from calls.measure_hop(self, self.hop_bytes)
        mine = {str(stage.index): torch.tensor([self._pace(), hop], dtype=torch.float64)}
        rows = [row.tolist() for row in (yield from self.fold(mine, calls.merge)).values()]
        slack, why = choose_slack([row[0] for row in rows], [row[1] for row in rows[:-1]])
        if stage.is_first:
            print(why, flush=True)
        self.depths = depths(stage.count, slack)
        stage.depth = self.depths[stage.index]
        self._stretch = self._new_stretch()

    def _pace(self) -> float:
        """Seconds of work for one micro-batch, since it was warm. Of what it ran forward then, less
        or more has come back.
        """
        warm_seconds, warm_counts = self._warm
        seconds = [
            now - then for now, then in zip(self.recorder.seconds, warm_seconds, strict=True)
        ]
        counts = [now - then for now, then in zip(self.recorder.counts, warm_counts, strict=True)]
        forward = seconds[Work.FORWARD] / max(1, counts[Work.FORWARD])
        back = seconds[Work.BACKWARD] + seconds[Work.UPDATE]
        return forward + back / max(1, counts[Work.BACKWARD])

    # Messages ----------------------------------------------------------------------------------

    def take(self, inbox: Inbox | None) -> Generator[Inbox, None, Message]:
        """Wait for the next message of a channel."""
        assert inbox is not None
        start = time.perf_counter()
        while (message := inbox.poll()) is None:
            yield inbox
        # The first stage's upstream is the loader.
        reads = self.stage.is_first and inbox is self.links.from_upstream
        self.recorder.note(Work.DATA if reads else Work.WAIT, message.index, start)
        self.progress += 1
        return message

    def send_down(self, message: Message) -> None:
        if self.links.to_downstream is not None:
            self.links.to_downstream.send(message)

    def send_up(self, message: Message) -> None:
        if self.links.to_upstream is not None:
            self.links.to_upstream.send(message)

    def fold(self, value: Any, combine: Callable[[Any, Any], Any]) -> Steps:
        """Combine every stage's value, in the stages' order, and give the result to every stage.

        A stage that waits here returns the echoes that the one before measures its link with.
        """
        stage, links = self.stage, self.links
        if not stage.is_first:
            while (above := (yield from self.take(links.from_upstream))).kind is Kind.ECHO:
                self.send_up(replace(above, numbers=(time.perf_counter(),)))
            value = combine(above.body, value)
        if not stage.is_last:
            self.send_down(Message(Kind.VALUE, body=value))
            value = (yield from self.take(links.from_downstream)).body
        self.send_up(Message(Kind.VALUE, body=value))
        return value
