"""Run a micro-batch through all stages of one process at once, with the weights each had for it.

What stage j sees of micro-batch i is a matter of counting: F(i) runs with the weights from before
B(i-d_j+1), B(i) after the update of micro-batch i-1. So all that a stage must really do at its own
time is to take the weights for a forward; the forward itself can wait until the gradient is due,
and then run through all stages in one graph, and back in one pass. Four micro-batches, three
stages (T takes weights, M is the micro-batch from end to end, each followed by an update):

    stage 0   T0 T1 T2 M0 T3 M1 M2 M3
    stage 1   T0 T1    M0 T2 M1 T3 M2 M3
    stage 2   T0       M0 T1 M1 T2 M2 T3 M3

The order of every sum is the one that stages have on their own, so the numbers are too.
"""

import math
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from .driver import Alone
from .engine import Call, Engine
from .errors import NonFiniteError
from .feed import Source
from .gradient import all_finite
from .layers import Layers, Places, layer_at_fault, named_layers
from .message import Kind, Message
from .nest import Nest, leaves, map_tensors
from .random_state import RandomState
from .report import Report, Row
from .rules import Delayed, Exact, Rule
from .stage import NONE, Flight, Stage
from .versions import Version, Versions, copy_all

__all__ = ["Together", "runs_together"]


def runs_together(rule: Rule) -> bool:
    """Whether a rule takes the weights of a forward when it is due, and waits for the gradient."""
    return isinstance(rule, Delayed | Exact) and not rule.recomputes


class Together:
    """All stages in one process, under a stream whose rules `runs_together`.

    A drop-in for `Alone`, with the same numbers. Only what a clock would tell is missing: spans,
    and shares of time, which are NaN.
    """

    def __init__(self, engines: Sequence[Engine], source: Source) -> None:
        self._alone, self._source = Alone(engines, source), source
        self._engines = engines
        self._members = [_Member(engine.stage) for engine in engines]
        layers = [layer for engine in engines for layer in named_layers(engine.stage.layers)]
        self._places = Places(Layers(layers))  # no two stages have a weight in common
        self._read: deque[tuple[Message, RandomState | None]] = deque()
        self._marks: dict[int, tuple[int, bool]] = {}  # their samples; does it close an update?
        self._closed = 0  # updates that those fed close
        self._fed = 0  # micro-batches that the first stage has run forward, were it alone
        self._draws: bool | None = None  # whether the first stage's layers do; None: not known
        self._doing: str | None = None

    @property
    def doing(self) -> str:
        return self._doing or self._alone.doing

    def run(self, call: Call, messages: Iterator[Message]) -> object:
        if call is Call.TRAIN:
            return self._train(messages)
        while self._read:
            self._advance()
        return self._alone.run(call, messages)

    def _train(self, messages: Iterator[Message]) -> Report:
        books, first = self._engines[0].books, self._members[0].stage
        for member in self._members:
            member.stage.set_training(True)
        books.begin()
        self._engines[0].gathering.begin()
        self._source.open(messages)
        self._draws = None  # the user may have changed a mode
        while (message := self._source.poll()) and message.kind is not Kind.END:
            if message.kind is not Kind.MICRO_BATCH:
                continue
            # A loader may fill its tensors anew: these are copies.
            x, target = self._engines[0].read_input(message)
            self._read.append((message.carrying((x, target)), self._draw(x)))
            samples, closes = int(message.numbers[0]), bool(message.numbers[1])
            books.fed(samples)
            self._marks[self._fed] = samples, closes
            self._closed += closes
            self._fed += 1
            drains = closes and self._closed <= first.kit.synchronous
            while len(self._read) > (-1 if drains else first.depth) and self._read:
                self._advance()
        return books.close(first.version)

    def _advance(self) -> None:
        """Run the oldest micro-batch from end to end, and let each stage make its update."""
        index = self._fed - len(self._read)
        message, random = self._read.popleft()
        self._doing = f"micro-batch {index}"
        for member in self._members:
            member.take_weights(min(index + member.stage.depth, self._fed - 1), self._marks)
        self._run(index, *cast(tuple[Nest, Nest], message.body), random)
        _, closes = self._marks.pop(index)
        if closes:
            for member in self._members:
                member.update()
        self._doing = None

    def _run(self, index: int, x: Nest, target: Nest, random: RandomState | None) -> None:
        flights = [member.stage.flights.pop(index) for member in self._members]
        flights[-1].target = target
        versions = [flight.weights for flight in flights if flight.weights is not None]
        held = {name: leaf for version in versions for name, leaf in version.leaves.items()}
        with self._places.holding(held):
            loss = self._forward(flights, x, random)
            finite = all_finite([loss])  # looked at once, not by every stage
            for member, flight in zip(self._members, flights, strict=True):
                flight.loss, flight.finite = None, finite
                member.prepare_backward(flight)
            if loss.requires_grad:
                torch.autograd.backward(loss)
        for member, flight in zip(self._members, flights, strict=True):
            member.stage.collect(flight, member.leaves(flight))
        stops = self._members[0].stage.settings.stops_on_nonfinite
        if stops and not all(flight.finite for flight in flights):
            self._stop(flights)
        self._tell(loss)
        for version in versions:
            version.release()

    def _draw(self, x: Nest) -> RandomState | None:
        """Draw from the global random state what the first stage's layers would draw now.

        They share it with the loader and whatever else draws, and will really run later.

        Returns:
            The state they are to draw from then; None if they draw nothing.
        """
        stage = self._members[0].stage
        if self._draws is False or not stage.depth:
            return None
        state = RandomState.capture(stage.device)
        buffers = {name: buffer.clone() for name, buffer in stage.layers.named_buffers()}
        with torch.no_grad():
            stage.run(x, buffers)
        self._draws = not state.is_in_force
        return state if self._draws else None

    def _forward(self, flights: Sequence[Flight], x: Nest, random: RandomState | None) -> Tensor:
        """The loss, in one graph with every stage's output."""
        outer = RandomState.capture(self._members[0].stage.device)
        try:
            for member, flight in zip(self._members, flights, strict=True):
                state = random if member.stage.is_first else member.stage.random
                if state is not None:
                    state.restore()
                flight.x, x = x, member.forward(flight, x)
                if state is not None:
                    state.take_on()
                elif member.stage.depth and not outer.is_in_force:
                    raise RuntimeError(
                        "the first stage's layers draw random numbers for some micro-batches only, "
                        "which a Simulation cannot follow: use a Pipeline"
                    )
        except Exception as error:
            stage, layer = member.stage, layer_at_fault(error)
            where = f"{layer}, " if layer else ""
            error.add_note(
                f"headrace: in stage {stage.index} of {stage.count}, {where}forward of "
                f"micro-batch {flight.index}"
            )
            raise
        finally:
            if len(self._members) > 1:
                outer.restore()
        loss = flights[-1].loss
        assert loss is not None
        return loss

    def _tell(self, loss: Tensor) -> None:
        """Note what would have come up to the first stage by now."""
        numbers: tuple[float, ...] = ()
        clock = time.perf_counter()
        for member in self._members:
            stage, (variance, norm) = member.stage, member.stage.sampled
            numbers += Row(
                stage.latest_staleness,
                busy_seconds=math.nan,
                clock=clock,
                skipped=stage.skipped,
                variance=variance,
                squared_norm=norm,
            )
        first = self._members[0].stage
        rate, samples = first.learning_rate, first.latest_samples
        self._engines[0].books.note(loss, numbers, first.version, rate, samples)

    def _stop(self, flights: Sequence[Flight]) -> None:
        """Stop on the first stage whose output is not finite, or the last with such a gradient."""
        bad = [j for j, flight in enumerate(flights) if not flight.finite]
        broken = [
            j
            for j, flight in enumerate(flights)
            if not all(t.isfinite().all() for t in leaves(flight.output) if t.is_floating_point())
        ]
        at = broken[0] if broken else bad[-1]
        self._engines[at].stop_on(flights[at], [])
        raise NonFiniteError(f"micro-batch {flights[at].index}: its loss is not finite")


class _Member:
    """A stage, whose flights have their weights before they begin."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self._next = 0
        self._copies = Versions()  # where the rule runs on the weights themselves

    def take_weights(self, until: int, marks: Mapping[int, tuple[int, bool]]) -> None:
        """Take the weights for the forwards up to micro-batch `until`, as they are now.

        Args:
            marks: each one's samples, and whether it closes an update.
        """
        stage = self.stage
        for index in range(self._next, until + 1):
            weights = stage.rule.weights(stage, index)
            if weights is None and stage.depth:  # each its own, for its backward will change it
                weights = self._copies.take(index, stage.trainable)
            if weights is not None:
                weights.users += 1
            samples, closes = marks[index]
            version = stage.timestamp
            stage.flights[index] = Flight(
                index, samples, version, None, None, weights, closes=closes
            )
            stage.closed += closes
        self._next = max(self._next, until + 1)
        stage.most_in_flight = max(stage.most_in_flight, len(stage.flights))

    def forward(self, flight: Flight, x: Nest) -> Nest:
        """Run forward with the weights held already; the output as the next stage receives it, in
        the same graph.
        """
        stage, weights = self.stage, flight.weights
        flight.output = stage.run(x, weights.leaves if weights and stage.compiled else NONE)
        if stage.is_last:
            flight.loss = stage.take_loss(flight.output, flight.target)
            return None
        own = torch.clone if self._changes(weights) else stage.unaliased
        return map_tensors(lambda tensor: _hand_over(own(tensor)), flight.output)

    def _changes(self, weights: Version | None) -> bool:
        """Whether these weights change between the forward and the backward."""
        return weights in self._copies.copies

    def leaves(self, flight: Flight) -> Mapping[str, Tensor]:
        """The tensors of which the gradient is taken."""
        return flight.weights.leaves if flight.weights else self.stage.trainable

    def prepare_backward(self, flight: Flight) -> None:
        """Where the rule runs on the weights themselves: go back with what they are by now."""
        if flight.weights is not None and self._changes(flight.weights):
            # Of data, for autograd is not to know of it.
            old = {name: leaf.data for name, leaf in flight.weights.leaves.items()}
            age = self.stage.timestamp - flight.version
            copy_all(old, self.stage.kit.backward_weights(age) or self.stage.trainable)

    def update(self) -> None:
        self.stage.load_gradient()
        self.stage.update(None, self.stage.gradient.finite)


def _hand_over(tensor: Tensor) -> Tensor:
    """An output as a channel would give it to the next stage, and its gradient back, contiguous.

    What consumes it adds its gradients up here, apart from what the stage itself does with it.
    """
    tensor = tensor.contiguous()
    if tensor.requires_grad:
        tensor = tensor.view_as(tensor)
        tensor.register_hook(Tensor.contiguous)  # type: ignore[no-untyped-call]
    return tensor
