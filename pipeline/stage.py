"""One stage: a group of layers, its weights, its optimizer, and the micro-batches in flight."""

import copy
import math
import warnings
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from .batch_size.sampled import UNKNOWN
from .corrections.kit import Kit
from .gradient import Gradient, all_finite
from .layers import Layers, Places
from .learning_rates import multiplied
from .loss import call_loss, check_loss
from .nest import Nest, is_differentiable, leaves, map_tensors
from .random_state import RandomState
from .replicas.peers import Peers
from .rules import Rule
from .settings import (
    Settings,
    autocasting,
    compile_layers,
    make_optimizers,
    make_schedulers,
)
from .versions import Version

__all__ = ["Flight", "Stage"]

NONE: Mapping[str, Tensor] = {}


@dataclass
class Flight:
    """A micro-batch between its forward and its backward; or, on a stage that does not wait for
    gradients, until what came back for it has been learned from.

    Args:
        version: of the weights that its forward ran with, as `Stage.timestamp` counts.
        closes: its gradient is the last one of an update.
        source: the network's own input, where `x` was guessed from it.
        guess: the gradients that the rule guessed for its output.
    """

    index: int
    samples: int
    version: int
    x: Nest
    target: Nest
    weights: Version | None
    source: Nest = None
    closes: bool = False
    guess: Sequence[Tensor | None] | None = None
    output: Nest = None
    loss: Tensor | None = None
    random: RandomState | None = None
    finite: bool = True


class Stage:
    """One group of layers on its device.

    The optimizer owns aliases of the weights: the same memory, with a version counter of its own.
    Autograd therefore lets it move weights that micro-batches in flight still refer to, and what
    their backward then sees is the rule's decision alone.

    Args:
        index: this stage is `index` of `count`.
        depth: micro-batches in flight behind a forward.
        ahead: micro-batches sent on at most of which nothing has come back yet, where the stage
            does not wait for gradients; None where it does.
        layers: its layers, already on the device.
        rule: copied, for a rule may keep state.
        random: its random state; None is the global one, as a plain loop would use.
        seed: of whatever else the rule draws.
        peers: the same stage of other replicas; None: there are none.
    """

    def __init__(
        self,
        index: int,
        count: int,
        depth: int,
        layers: Layers,
        rule: Rule,
        settings: Settings,
        device: torch.device,
        random: RandomState | None,
        ahead: int | None = None,
        seed: int = 0,
        peers: Peers | None = None,
    ) -> None:
        self.peers = peers or Peers()
        self.index, self.count, self.depth = index, count, depth
        self.ahead, self.seed = ahead, seed
        self.layers, self.settings, self.device = layers, settings, device
        self.is_first, self.is_last = index == 0, index == count - 1
        self.compiled, self.autocast = settings.compile is not None, settings.autocast is not None
        self.trainable = {n: p for n, p in layers.named_parameters() if p.requires_grad}
        self.places = Places(layers)
        self.owned = {name: nn.Parameter(p.data) for name, p in self.trainable.items()}
        self.optimizers = make_optimizers(settings.optimizer, list(self.owned.items()))
        self.schedulers = make_schedulers(settings.scheduler, self.optimizers)
        self.flights: dict[int, Flight] = {}
        self.awaiting_gradient: deque[Flight] = deque()
        self.awaiting_input: deque[Flight] = deque()
        self._measures = settings.batch_size is not None and settings.batch_size.measures
        self.gradient = Gradient(measures=self._measures)
        self.sampled = UNKNOWN
        self.closed = 0  # updates that are closed by the micro-batches run forward so far
        self.latest_samples = 0
        self.version = self.skipped = self.most_in_flight = 0
        self.staleness: Counter[int] = Counter()
        self.latest_staleness = 0.0
        self.lag: Counter[int] = Counter()
        self.latest_lag = math.nan
        self._pristine_rule, self.random = rule, random
        self._call = self._call_layers
        if settings.compile is not None:
            self._call = compile_layers(self._call_functionally, settings.compile)
        self._copies_input: bool | None = None
        self._loss_is_checked = False
        self._memory = {_memory(t) for t in (*layers.parameters(), *layers.buffers())}
        self.rule = copy.deepcopy(rule)
        self.kit = Kit(settings.corrections, self)
        self.rule.attach(self)

    # The way of a micro-batch ------------------------------------------------------------------

    @property
    def timestamp(self) -> int:
        """The version of its weights, counted in the updates of all who move them."""
        return self.peers.timestamp(self)

    @property
    def guesses(self) -> bool:
        """Whether it goes back with a guess: it is not the last stage, and does not wait."""
        return self.ahead is not None and not self.is_last

    @property
    def recopies_weights(self) -> bool:
        """Whether a backward may use copies of the weights that its forward has made."""
        return self.compiled or self.autocast

    @property
    def is_synchronous(self) -> bool:
        """Whether the last update that is to be made of what it has run forward may make nothing
        late that comes after it.
        """
        return self.closed <= self.kit.synchronous

    def discount(self, staleness: int) -> float:
        """What the learning rate is multiplied by, for a gradient this many updates old."""
        return self.kit.factor(staleness)

    def derive_seed(self, which: int) -> int:
        """Of the first weights of a network of the rule's: unlike those of any other."""
        return (self.seed + 1) * 1_000_003 + 10_007 * (self.index + 1) + which

    def forward(
        self,
        index: int,
        x: Nest,
        target: Nest,
        samples: int,
        source: Nest = None,
        closes: bool = False,
    ) -> Nest:
        """Run a micro-batch forward, and keep what its backward needs.

        Args:
            x: what the stage before gave, (samples, …); a tensor that requires a gradient there
                does so here, as a leaf.
            target: rides along to the last stage, which takes the loss.
            source: the network's own input, where `x` was guessed from it.
            closes: its gradient is the last one of an update.

        Returns:
            The output; its tensors require a gradient where one is to come back.
        """
        weights = self.rule.weights(self, index)
        if weights is not None:
            weights.users += 1
        kept = target if self.is_last or self.guesses else None
        flight = Flight(index, samples, self.timestamp, x, kept, weights, source, closes)
        self.flights[index] = flight
        self.most_in_flight = max(self.most_in_flight, len(self.flights))
        self.closed += closes
        with self.random.in_force() if self.random else nullcontext():
            if self.rule.recomputes and self.depth:
                flight.random = RandomState.capture(self.device)
                with torch.no_grad():
                    return map_tensors(self._promise(x), self.run(x))
            self._run_with_graph(flight)
        if self.guesses and not self.rule.wants_gradients:
            return map_tensors(lambda t: self.unaliased(t).detach(), flight.output)
        return map_tensors(self.unaliased, flight.output)

    def backward(
        self, flight: Flight, gradients: Sequence[Tensor | None] | None
    ) -> list[Tensor | None]:
        """Run a micro-batch backward, and add its gradient to the update's.

        Args:
            flight: its loss is the last stage's own; the others' came with the gradients.
            gradients: one for each tensor of the output, None where it has none; the last stage
                has its loss and needs none. None: the rule guesses them.

        Returns:
            A gradient for each tensor of the input, None where it has none. `flight.finite` tells
            whether the loss and all gradients of weights are.
        """
        if flight.random is not None:
            # BatchNorm saw this micro-batch already: its statistics move in copies.
            buffers = {name: buffer.clone() for name, buffer in self.layers.named_buffers()}
            with flight.random.in_force():
                self._run_with_graph(flight, buffers)
        loss = [] if flight.loss is None else [flight.loss]
        weights = flight.weights.leaves if flight.weights else self.trainable
        tops: list[tuple[Tensor, Any]] = [(tensor, None) for tensor in loss]
        if gradients is None:
            gradients = flight.guess = self.rule.guess(self, flight)
        if not self.is_last:
            both = zip(leaves(flight.output), gradients, strict=True)
            tops = [(tensor, gradient) for tensor, gradient in both if gradient is not None]
        tops = [(tensor, gradient) for tensor, gradient in tops if tensor.requires_grad]
        # A checkpoint runs its layers again in here, and must find the weights of the forward.
        holding = self.places.holding(weights) if flight.weights else self._standing_in(flight)
        with holding:
            if tops:
                torch.autograd.backward([t for t, _ in tops], [g for _, g in tops])
        self.collect(flight, weights)
        return [_take_gradient(tensor) for tensor in leaves(flight.x)]

    def collect(self, flight: Flight, weights: Mapping[str, Tensor]) -> None:
        """Add a micro-batch's gradient to the update's, from where the backward left it.

        Args:
            weights: leaves of which the gradient was taken, by name.
        """
        means: dict[str, Tensor] = {}
        for name, weight in weights.items():
            if (gradient := _take_gradient(weight)) is not None:
                means[name] = gradient
        loss = [] if flight.loss is None else [flight.loss]
        flight.finite = flight.finite and all_finite([*means.values(), *loss])
        self._add(means, flight)

    def _standing_in(self, flight: Flight) -> AbstractContextManager[None]:
        return self.kit.standing_in(self.timestamp - flight.version)

    def _add(self, means: dict[str, Tensor], flight: Flight) -> None:
        factor = 1.0
        if flight.finite:
            then = flight.weights.leaves if flight.weights else self.trainable
            factor = self.kit.change(means, self.timestamp - flight.version, then)
        self.gradient.add(means, flight.samples, [flight.version], flight.finite, factor)

    def release(self, flight: Flight) -> None:
        """Let go of a micro-batch whose backward is done, but for what is still to be learned."""
        del self.flights[flight.index]
        if flight.weights is not None:
            flight.weights.release()
        flight.x = flight.loss = flight.guess = None
        keeps = self.guesses and self.rule.wants_gradients
        flight.output = map_tensors(torch.detach, flight.output) if keeps else None
        if self.guesses:
            self.awaiting_gradient.append(flight)
        if flight.source is not None:
            self.awaiting_input.append(flight)

    def learn(self, gradients: Sequence[Tensor | None]) -> bool:
        """Take in what came back for the micro-batch that has waited longest for it; whether all
        of it was finite.
        """
        flight = self.awaiting_gradient.popleft()
        if all(gradient is None for gradient in gradients):
            return True
        self.latest_lag = self.timestamp - flight.version
        self.lag[self.timestamp - flight.version] += 1
        return self.rule.arrive(self, flight, gradients)

    def learn_input(self, x: Nest) -> bool:
        """Take in the real input of the micro-batch that has waited longest for it; as `learn`."""
        return self.rule.arrive_input(self, self.awaiting_input.popleft().source, x)

    def infer(self, x: Nest) -> Nest:
        """Run forward on the newest weights without a gradient."""
        with self.random.in_force() if self.random else nullcontext(), torch.no_grad():
            return self.run(x)

    def set_training(self, training: bool) -> None:
        """Switch between the modes the user left the layers in, and evaluation."""
        # Some work in place in one mode only, as dropout does.
        self._copies_input = None
        if training:
            self.layers.resume_training_mode()
        else:
            self.layers.eval()

    # Running the layers ------------------------------------------------------------------------

    def _run_with_graph(self, flight: Flight, buffers: Mapping[str, Tensor] = NONE) -> None:
        flight.output = self.run(flight.x, flight.weights.leaves if flight.weights else buffers)
        if self.is_last:
            flight.loss = self.take_loss(flight.output, flight.target)

    def run(self, x: Nest, tensors: Mapping[str, Tensor] = NONE) -> Nest:
        """Run the layers, with other weights or buffers than their own by these names."""
        # A first layer that works in place must not meet autograd's leaf, nor change what replay
        # will need: the first run tells whether copies are needed.
        handed = x if self._copies_input is False else map_tensors(torch.clone, x)
        with self.autocasting():
            output: Nest = self._call(handed, tensors)
        if self._copies_input is None:
            self._copies_input = any(tensor._version for tensor in leaves(handed))
        return output

    def _call_layers(self, x: Nest, tensors: Mapping[str, Tensor]) -> Any:
        if not tensors:
            return self.layers(x)
        with self.places.holding(tensors):
            return self.layers(x)

    def _call_functionally(self, x: Nest, tensors: Mapping[str, Tensor]) -> Any:
        """The same, in the words that torch.compile understands."""
        if not tensors:
            return self.layers(x)
        placed = self.places.placed(tensors)
        return functional_call(self.layers, placed, (x,), tie_weights=False)

    def take_loss(self, output: Nest, target: Nest) -> Tensor:
        """The loss of an output, as a 0-d tensor; the first one is looked at (`check_loss`)."""
        with self.autocasting():
            if self._loss_is_checked:
                return call_loss(self.settings.loss_fn, output, target)
            self._loss_is_checked = True
            return check_loss(self.settings.loss_fn, output, target)

    def autocasting(self) -> AbstractContextManager[Any]:
        """Autocast, where it was asked for."""
        return autocasting(self.settings.autocast, self.device)

    def _promise(self, x: Nest) -> Callable[[Tensor], Tensor]:
        """Mark the outputs of a forward without a graph that will take a gradient later."""
        expects = bool(self.trainable) or any(tensor.requires_grad for tensor in leaves(x))
        return lambda t: self.unaliased(t).detach().requires_grad_(expects and is_differentiable(t))

    def unaliased(self, tensor: Tensor) -> Tensor:
        """Copy an output that is one of the weights or buffers: it may move before it is sent."""
        return tensor.clone() if _memory(tensor) in self._memory else tensor

    # Updates -----------------------------------------------------------------------------------

    def load_gradient(self) -> None:
        """Hand the accumulated mean gradient to the optimizer."""
        for name, value in self.gradient.mean().items():
            self.owned[name].grad = value

    def gradient_norm(self) -> Tensor:
        """The 2-norm of the gradient that was loaded, 0-d."""
        grads = [p.grad for p in self.owned.values() if p.grad is not None]
        values = [g.coalesce().values() if g.is_sparse else g for g in grads]
        return get_total_norm(values).to(self.device)

    def update(self, norm: Tensor | None = None, finite: bool = True) -> None:
        """Move the weights on the gradient that was loaded, or skip; either makes a version.

        Args:
            norm: the gradient's norm over all stages, to clip by; None clips by this stage's own.
            finite: whether the gradients of all stages that must agree are finite.
        """
        done, self.gradient = self.gradient, Gradient(measures=self._measures)
        self.latest_samples = done.samples
        if self._measures:
            self.sampled = done.sampled() if finite and done.finite else UNKNOWN
        now = self.timestamp
        stale = [now - version for version in done.versions]
        for each in stale:
            self.staleness[each] += 1
        self.latest_staleness = sum(stale) / len(stale) if stale else 0.0
        self.rule.before_update(self)
        self.kit.before_update()
        if not finite or not done.finite:
            self.skipped += 1
        elif done.samples:  # the rule let at least one micro-batch move the weights
            self._clip(norm)
            self.peers.move(self, done)
        for weight in self.owned.values():
            weight.grad = None
        self.kit.after_update()
        self._step_schedulers()
        self.version += 1

    def step(self, factor: float = 1.0) -> None:
        """Let the optimizers move the weights, with `factor` times their learning rates."""
        with multiplied(self.optimizers, factor):
            for optimizer in self.optimizers:
                self.kit.move(optimizer, self.latest_staleness)

    def batch_factor(self, samples: int) -> float:
        """What the learning rate of an update on so many samples is multiplied by."""
        growth = self.settings.batch_size
        return growth.factor(samples) if growth and samples else 1.0

    def coming_batch_factors(self) -> list[float]:
        """The `batch_factor` of each update to come that what it has run forward closes."""
        gathered, factors = self.gradient.samples, []
        for flight in self.flights.values():
            gathered += flight.samples
            if flight.closes:
                factors.append(self.batch_factor(gathered))
                gathered = 0
        return factors

    def _step_schedulers(self) -> None:
        if self.version:
            for scheduler in self.schedulers:
                scheduler.step()
            return
        with warnings.catch_warnings():
            # torch's, where the first update of all was skipped: the rate follows the updates.
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            for scheduler in self.schedulers:
                scheduler.step()

    def _clip(self, norm: Tensor | None) -> None:
        limit = self.settings.clip_grad_norm
        if limit is not None and self.owned:
            total = self.gradient_norm() if norm is None else norm
            dense = [p for p in self.owned.values() if p.grad is None or not p.grad.is_sparse]
            clip_grads_with_norm_(dense, limit, total)
            for weight in self.owned.values():
                if weight.grad is not None and weight.grad.is_sparse:
                    weight.grad = weight.grad * (limit / (total + 1e-6)).clamp(max=1.0)

    @property
    def learning_rate(self) -> float:
        """The first parameter group's learning rate; NaN on a stage with nothing to train."""
        return float(self.optimizers[0].param_groups[0]["lr"]) if self.optimizers else math.nan

    @property
    def effective_learning_rate(self) -> float:
        """η/(1-m), m being the momentum, or Adam's first beta: what the delay law bounds."""
        if not self.optimizers:
            return math.nan
        group = self.optimizers[0].param_groups[0]
        momentum = group.get("momentum", group.get("betas", (0.0,))[0])
        return self.learning_rate / (1 - float(momentum))

    # The weights as others see them ------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """The weights and buffers of this stage, by the user's names, copied to the CPU."""
        return {n: t.detach().to("cpu", copy=True) for n, t in self.layers.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take this stage's weights and buffers out of a whole model's."""
        self.layers.load_state_dict({name: state[name] for name in self.layers.state_dict()})
        self.kit.before_update()  # what the last update did is no longer to be extrapolated
        self.rule = copy.deepcopy(self._pristine_rule)
        self.rule.attach(self)


def _take_gradient(leaf: Tensor) -> Tensor | None:
    gradient, leaf.grad = leaf.grad, None
    return gradient


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else id(tensor)
