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
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from itertools import accumulate, chain
from typing import Any, cast

import torch
from torch import Tensor

from .channel import Inbox, Links
from .errors import InputError
from .finite import explain
from .gradient import all_finite
from .link import Link
from .message import Kind, Message
from .microbatch import join
from .nest import Nest, describe, leaves, to_device, total_bytes
from .report import Books, Report, Row, StageStatistics, known
from .schedule import (
    SCHEDULES,
    Action,
    Actions,
    Backward,
    Forward,
    Learn,
    Schedule,
    Update,
    depths,
)
from .slack import choose_slack
from .stage import Flight, Stage
from .timeline import WORKING, Span, Timeline, Work

__all__ = ["Call", "Done", "Engine", "Metrics"]

WARM = 4
"""Micro-batches after which a stage's times are taken for `slack='auto'`."""

PINGS = 5

LARGE = 1 << 20
"""Bytes, at least, of the message that a link's bandwidth is measured with."""

Metrics = Mapping[str, Callable[[Any, Any], Any]]
"""Names to functions of an output and its target (nests) that give a mean over samples."""


class Call(IntEnum):
    """What a user asks of a pipeline; every rank makes the same calls in the same order."""

    TRAIN, EVALUATE, PREDICT, STATE_DICT, STATISTICS, TIMELINE, LINKS, DRAIN, CLOSE = range(9)


@dataclass(frozen=True)
class Done:
    """A call is over on this stage."""

    result: Any


Steps = Generator[Done | Inbox, None, Any]


class Stretch:
    """A schedule's actions from nothing in flight to nothing in flight, so far as they came."""

    def __init__(self, actions: Actions) -> None:
        self._actions = actions
        next(actions)  # the first is a Forward

    def after(self, there: bool) -> Iterator[Action]:
        """Answer the Forward that is due, and give the actions up to the next one."""
        try:
            action = self._actions.send(there)
            while not isinstance(action, Forward):
                yield action
                action = next(self._actions)
        except StopIteration:
            return


class Engine:
    """One stage at work.

    Args:
        stage_depths: of all stages; `_tune` may change them.
        links: the first stage's upstream is its caller.
    """

    def __init__(
        self, stage: Stage, schedule: Schedule, stage_depths: tuple[int, ...], links: Links
    ) -> None:
        self.stage, self.schedule, self.links = stage, schedule, links
        self.depths = stage_depths
        self.books = Books(stage.count)
        self.expected = Call.TRAIN
        self.metrics: Metrics = {}
        self.doing = "waiting for its first call"
        self.progress = 0
        self.recorder = links.recorder
        self.spans: list[Span] = []
        self._warm = (list(self.recorder.seconds), list(self.recorder.counts))
        self.restart_shares()
        self._hop_bytes = 0
        self._orders = links.from_first or links.from_upstream
        self._read_ahead: deque[Message] = deque()
        self._real_inputs: deque[Message] = deque()
        self._heard = 0  # losses that have come up to here, or are this stage's own
        self._losses: list[Tensor] = []  # those not passed on yet
        self._below = Row().numbers() * (stage.count - 1 - stage.index)
        self.trained = self._stretches = 0
        self._stretch = self._new_stretch()

    def restart_shares(self) -> None:
        """Count the shares of time in `statistics` from here."""
        self._spent = [0.0] * len(Work)
        self._training_seconds = 0.0

    def serve(self) -> Generator[Done | Inbox, None, None]:
        """Serve one call after the other, until the pipeline is closed."""
        calls: dict[Call, Callable[[], Steps]] = {
            Call.TRAIN: self._train,
            Call.EVALUATE: self._evaluate,
            Call.PREDICT: self._predict,
            Call.STATE_DICT: self._state_dict,
            Call.STATISTICS: self._statistics,
            Call.TIMELINE: self._timeline,
            Call.LINKS: self._measure_links,
            Call.DRAIN: self._nothing,
            Call.CLOSE: self._close,
        }
        call = None
        while call is not Call.CLOSE:
            begin = yield from self._take(self._orders)
            call = Call(begin.index)
            if call is not self.expected:
                raise RuntimeError(
                    f"the first stage called {call.name.lower()}() while stage {self.stage.index} "
                    f"called {self.expected.name.lower()}(): every rank must make the same calls "
                    "in the same order, though only the first stage reads the data"
                )
            self._pass_on(begin)
            if call is not Call.TRAIN:
                yield from self._drain()
            yield Done((yield from calls[call]()))

    # Training ----------------------------------------------------------------------------------

    def _train(self) -> Steps:
        self.stage.set_training(True)
        self.books.begin()
        start, before = time.perf_counter(), list(self.recorder.seconds)
        while True:
            message = yield from self._next()
            if message.kind is Kind.MICRO_BATCH:
                yield from self._feed(message)
            elif message.kind is Kind.TUNE:
                self._send_down(message)
                yield from self._tune()
            else:
                break
        if self.stage.is_first:
            report = self.books.close(self.stage.version)
            message = replace(message, numbers=report.numbers())
        self._pass_on(message)
        self._training_seconds += time.perf_counter() - start
        for work, (now, then) in enumerate(zip(self.recorder.seconds, before, strict=True)):
            self._spent[work] += now - then
        return Report.from_numbers(message.numbers)

    def _next(self) -> Generator[Inbox, None, Message]:
        """The next message of a call of `train`.

        Under full unlock the first stage reads ahead, and what it reads goes to all others at once:
        a stall of its own does not hold them up.
        """
        if not self.links.to_others:
            return (yield from self._take(self._orders))
        ahead = self._read_ahead
        while len(ahead) <= (self.stage.ahead or 0) and not (ahead and ahead[-1].kind is Kind.END):
            message = yield from self._take(self._orders)
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
            self._send_down(message)

    def _feed(self, message: Message) -> Steps:
        """One tick: a forward, then what the schedule puts before the next one."""
        yield from self._forward(message)
        for action in self._stretch.after(True):
            yield from self._perform(action)
        if message.last and self.schedule.flushes:
            yield from self._drain()

    def _drain(self) -> Steps:
        """Bring everything in flight to its end."""
        for action in self._stretch.after(False):
            yield from self._perform(action)
        # Losses that came too late to ride up with a gradient.
        while self._heard < self.trained:
            self._hear((yield from self._take(self.links.from_downstream)))
        if self._losses:
            self._tell(-1, [])
        self._stretches += self.trained > self._stretch_began
        self._stretch = self._new_stretch()

    def _new_stretch(self) -> Stretch:
        stage = self.stage
        self._stretch_began = self.trained
        return Stretch(
            self.schedule.actions(
                stage.depth, stage.update_every, self.trained, self._stretches, stage.ahead
            )
        )

    def _perform(self, action: Action) -> Steps:
        if isinstance(action, Backward):
            yield from self._backward(action.index)
        elif isinstance(action, Update):
            yield from self._update()
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
        self._hop_bytes = total_bytes(output)
        if not stage.is_last:
            # Under full unlock the next stage has its target from the first.
            rides = None if self.links.to_others or self.links.from_first else target
            self._send_down(message.carrying((output, rides)))

    def _see_input(self, message: Message) -> Steps:
        """Find out what inputs look like, from the first real one."""
        self.doing = "waiting for the first real input"
        self._real_inputs.append((yield from self._take(self.links.from_upstream)))
        (source, _), (x, _) = message.body, self._real_inputs[0].body  # type: ignore[misc]
        self.stage.rule.see_input(self.stage, source, x)

    def _run_stage(self, message: Message) -> tuple[Nest, Nest]:
        x, target = self._input(message)
        source = None
        if self.links.from_first is not None:
            source, x = x, self.stage.rule.guess_input(self.stage, x)
        samples = int(message.numbers[0])
        return self.stage.forward(message.index, x, target, samples, source), target

    def _input(self, message: Message) -> tuple[Nest, Nest]:
        assert isinstance(message.body, tuple)
        x, target = message.body
        if self.stage.is_first:
            # A loader may fill its tensors anew while they are in flight: they need copies then.
            device, copy = self.stage.device, self.stage.count > 1
            x, target = to_device(x, device, copy), to_device(target, device, copy)
        return x, target

    def _backward(self, index: int) -> Steps:
        stage, flight = self.stage, self.stage.flights[index]
        gradients: list[Tensor | None] | None = None if stage.guesses else []
        if not (stage.guesses or stage.is_last):
            self.doing = f"waiting for the gradient of micro-batch {index}"
            before = self._heard
            gradients = self._hear((yield from self._take(self.links.from_downstream)), index)
            if before <= index < self._heard:
                flight.loss = self._losses[index - self._heard]
        self.doing = f"backward of micro-batch {index}"
        returned: list[Tensor | None] = [None for _ in leaves(flight.x)]
        if stage.rule.moves():
            returned = self.recorder.run(Work.BACKWARD, index, stage.backward, flight, gradients)
            if stage.settings.stops_on_nonfinite:
                leaving = [gradient for gradient in returned if gradient is not None]
                if not (flight.finite and all_finite(leaving)):
                    self._stop_on(flight, gradients)
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
        )
        numbers = row.numbers() + self._below
        losses, self._losses = self._losses, []
        if not stage.is_first:
            body: Nest = ([*losses], [*returned])
            self._send_up(Message(Kind.RESULT, index, numbers=numbers, body=body))
            return
        for loss in losses:
            self.books.note(loss, numbers, stage.version, stage.learning_rate)

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
            return (yield from self._take(inbox))
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
        raise FloatingPointError(
            f"stage {stage.index} of {stage.count}, micro-batch {flight.index}: {what}. Try a "
            "lower learning rate, clip_grad_norm=1.0, or on_nonfinite='skip'"
        )

    def _update(self) -> Steps:
        stage = self.stage
        self.doing = f"update {stage.version}"
        if not self._must_agree():
            self.recorder.run(Work.UPDATE, stage.version, self._update_alone)
            return
        stage.load_gradient()
        squared = stage.gradient_norm().double().cpu() ** 2
        mine = torch.stack([squared, torch.tensor(not stage.gradient.finite).double()])
        total = yield from self._fold(mine, torch.add)
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

    def _stop_on(self, flight: Flight, gradients: list[Tensor | None] | None) -> None:
        stage = self.stage
        reason = explain(stage, flight, gradients)
        if reason is None:
            # What the stage before gave was at fault: with this loss it will look, and say so.
            # One that does not wait looks at its own output, and at the gradient that comes back.
            flight.loss = torch.full((), math.nan, device=stage.device)
            if not stage.is_last and self._losses:
                self._losses[-1] = flight.loss
        else:
            raise FloatingPointError(
                f"stage {stage.index} of {stage.count}, micro-batch {flight.index}: {reason}. "
                f"Staleness {stage.version - flight.version} updates, effective learning rate "
                f"η/(1-m) = {stage.effective_learning_rate:.3g}. Try a lower learning rate (what "
                "a delay allows falls as 1/(2τ+1)), clip_grad_norm=1.0, or on_nonfinite='skip'"
            )

    # Evaluation and prediction -----------------------------------------------------------------

    def _evaluate(self) -> Steps:
        """The mean over samples of the loss and each metric, on every stage."""
        sums: dict[str, Tensor] = {}
        count = 0.0
        for reply in (yield from self._infer(self._judge)):
            assert isinstance(reply.body, dict)
            count += reply.numbers[0]
            for name, value in reply.body.items():
                assert isinstance(value, Tensor)
                sums[name] = sums.get(name, torch.zeros(())) + value.cpu() * reply.numbers[0]
        return {name: float(total) / count for name, total in sums.items()}

    def _judge(self, output: Nest, target: Nest) -> Nest:
        values = {"loss": self.stage.take_loss(output, target)}
        for name, metric in self.metrics.items():
            values[name] = torch.as_tensor(metric(output, target))
            if values[name].numel() != 1:
                raise InputError(
                    f"the metric {name!r} gave {describe(values[name])}: it must give one number, "
                    "the mean over the samples"
                )
        return {name: value.detach().double() for name, value in values.items()}

    def _predict(self) -> Steps:
        """The outputs of all micro-batches, joined, on the CPU of every stage."""
        cpu = torch.device("cpu")
        replies = yield from self._infer(lambda output, target: to_device(output, cpu))
        return join([reply.body for reply in replies])

    def _infer(self, finish: Callable[[Nest, Nest], Nest]) -> Steps:
        """Run what the first stage feeds, forward only; the last stage's replies ride back."""
        stage = self.stage
        stage.set_training(False)
        replies: list[Message] = []
        depth = stage.count - 1 - stage.index
        stretch = Stretch(SCHEDULES["stream"].actions(depth, 1, 0, 0))
        there = True
        while there:
            message = yield from self._take(self.links.from_upstream)
            there = message.kind is Kind.MICRO_BATCH
            own = self._infer_one(message, finish) if there else None
            if not there:
                self._send_down(message)
            for action in stretch.after(there):
                if isinstance(action, Backward):
                    reply = own or (yield from self._take(self.links.from_downstream))
                    replies.append(reply)
                    self._send_up(reply)
        stage.set_training(True)
        return replies

    def _infer_one(self, message: Message, finish: Callable[[Nest, Nest], Nest]) -> Message | None:
        self.doing = f"forward of micro-batch {message.index} without gradient"
        x, target = self._input(message)
        with torch.no_grad():
            output = self.stage.infer(x)
            if self.stage.is_last:
                return replace(message, kind=Kind.RESULT, body=finish(output, target))
        self._send_down(message.carrying((output, target)))
        return None

    # Other calls -------------------------------------------------------------------------------

    def _state_dict(self) -> Steps:
        return (yield from self._fold(self.stage.state_dict(), _merge))

    def _statistics(self) -> Steps:
        stage = self.stage
        seconds = self._training_seconds or math.nan
        busy = sum(self._spent[work] for work in WORKING) / seconds
        waiting, data = self._spent[Work.WAIT] / seconds, self._spent[Work.DATA] / seconds
        head = [stage.version, stage.skipped, busy, waiting, data, stage.learning_rate]
        head += [stage.most_in_flight, stage.rule.copies]
        figures = stage.rule.figures
        head += [figures.synthesizer_loss, figures.cosine, figures.local_loss]
        head += [len(stage.staleness), *_pairs(stage.staleness), *_pairs(stage.lag)]
        mine = {str(stage.index): torch.tensor(head, dtype=torch.float64)}
        rows = yield from self._fold(mine, _merge)
        return [_read_statistics(int(j), row.tolist()) for j, row in rows.items()]

    def _timeline(self) -> Steps:
        """Every stage's spans, on the first stage's clock."""
        _, ahead = (0.0, 0.0) if self.stage.is_last else (yield from self._measure_hop(8))
        flat = [number for span in self.spans for number in span]
        mine = {str(self.stage.index): torch.tensor([ahead, *flat], dtype=torch.float64)}
        rows = [row.tolist() for row in (yield from self._fold(mine, _merge)).values()]
        # What each clock is ahead of the first one: the sum over the hops before it.
        shifts = accumulate((row[0] for row in rows[:-1]), initial=0.0)
        return Timeline.of(
            [_read_span(row[k : k + 4], shift) for k in range(1, len(row), 4)]
            for row, shift in zip(rows, shifts, strict=True)
        )

    def _measure_links(self) -> Steps:
        """The link of each hop, by a small message and a large one."""
        mine = [0.0, math.inf]
        if not self.stage.is_last:
            size = max(LARGE, self._hop_bytes)
            small, _ = yield from self._measure_hop(8)
            large, _ = yield from self._measure_hop(size)
            mine = [small, (size - 8) / (large - small) if large > small else math.inf]
        row = {str(self.stage.index): torch.tensor(mine, dtype=torch.float64)}
        rows = [each.tolist() for each in (yield from self._fold(row, _merge)).values()]
        return [Link(*each) for each in rows[:-1]]

    def _nothing(self) -> Steps:
        yield from ()

    def _close(self) -> Steps:
        if self.stage.gradient.versions:
            yield from self._update()
        # Nobody leaves before the last stage has come to its end: a failure there is everybody's.
        yield from self._fold(torch.zeros(()), torch.add)

    def _tune(self) -> Steps:
        """Measure every stage and every hop, and choose the slack; all stages choose alike."""
        yield from self._drain()
        self.doing = "measuring the links"
        stage, hop = self.stage, math.nan
        if not stage.is_last:
            hop, _ = yield from self._measure_hop(self._hop_bytes)
        mine = {str(stage.index): torch.tensor([self._pace(), hop], dtype=torch.float64)}
        rows = [row.tolist() for row in (yield from self._fold(mine, _merge)).values()]
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

    def _measure_hop(self, size: int) -> Generator[Inbox, None, tuple[float, float]]:
        """Seconds, one way, for a message of so many bytes, the median of a few; and by how much
        the next stage's clock is ahead, by the quickest one.
        """
        ping = Message(
            Kind.ECHO, body=torch.zeros(size, dtype=torch.uint8, device=self.stage.device)
        )
        hops = []
        for _ in range(1 + PINGS):  # the first one waits until the next stage is listening
            start = time.perf_counter()
            self._send_down(ping)
            reply = yield from self._take(self.links.from_downstream)
            end = time.perf_counter()
            hops.append(((end - start) / 2, reply.numbers[0] - (start + end) / 2))
        return statistics.median(hop for hop, _ in hops[1:]), min(hops[1:])[1]

    # Messages ----------------------------------------------------------------------------------

    def _take(self, inbox: Inbox | None) -> Generator[Inbox, None, Message]:
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

    def _send_down(self, message: Message) -> None:
        if self.links.to_downstream is not None:
            self.links.to_downstream.send(message)

    def _send_up(self, message: Message) -> None:
        if self.links.to_upstream is not None:
            self.links.to_upstream.send(message)

    def _fold(self, value: Any, combine: Callable[[Any, Any], Any]) -> Steps:
        """Combine every stage's value, in the stages' order, and give the result to every stage.

        A stage that waits here returns the echoes that the one before measures its link with.
        """
        stage, links = self.stage, self.links
        if not stage.is_first:
            while (above := (yield from self._take(links.from_upstream))).kind is Kind.ECHO:
                self._send_up(replace(above, numbers=(time.perf_counter(),)))
            value = combine(above.body, value)
        if not stage.is_last:
            self._send_down(Message(Kind.VALUE, body=value))
            value = (yield from self._take(links.from_downstream)).body
        self._send_up(Message(Kind.VALUE, body=value))
        return value


def _merge(above: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**above, **own}


def _read_span(numbers: list[float], shift: float) -> Span:
    work, index, start, end = numbers
    return Span(Work(int(work)), int(index), start - shift, end - shift)


def _pairs(counts: Counter[int]) -> list[int]:
    """A histogram as numbers: value, count, value, count, …"""
    return [*chain.from_iterable(sorted(counts.items()))]


def _read_pairs(numbers: list[float]) -> dict[int, int]:
    return {int(v): int(c) for v, c in zip(numbers[::2], numbers[1::2], strict=True)}


def _read_statistics(stage: int, numbers: list[float]) -> StageStatistics:
    updates, skipped, busy, waiting, data, rate, in_flight, copies, *rest = numbers
    synthesizer_loss, cosine, local_loss, bins, *pairs = rest
    return StageStatistics(
        stage=stage,
        updates=int(updates),
        skipped=int(skipped),
        staleness=_read_pairs(pairs[: 2 * int(bins)]),
        busy=busy,
        waiting=waiting,
        data=data,
        learning_rate=rate,
        in_flight=int(in_flight),
        copies=int(copies),
        lag=_read_pairs(pairs[2 * int(bins) :]),
        synthesizer_loss=known(synthesizer_loss),
        cosine=known(cosine),
        local_loss=known(local_loss),
    )
