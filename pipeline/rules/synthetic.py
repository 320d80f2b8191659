"""Synthetic gradients: a stage updates at once, on a guess of the gradient that is yet to come.

Decoupled neural interfaces (Jaderberg et al. 2017). Stage j carries a synthesizer M. The output h
of a micro-batch goes on to the next stage, and at once back through stage j with M(h) in the
gradient's place. What the next stage later sends back, δ = (∂h_{j+1}/∂h)ᵀ M_{j+1}(h_{j+1}), true
only if that is the last stage, moves no weight: M learns from it, ‖M(h) - δ‖².
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..errors import InputError
from ..nest import Nest, describe, leaves
from ..report import Figures
from ..settings import OptimizerFactory
from ..synthesizers import Condition, Factory, choose, start_at_zero
from ..teachable import SyntheticGradient, Teachable, adam, make_seeded
from .rule import Rule

if TYPE_CHECKING:
    from ..schedule import Schedule
    from ..stage import Flight, Stage

__all__ = ["Synthetic", "update_draws"]


def update_draws(seed: int, stage: int) -> torch.Generator:
    """The generator of a stage's `p_update`: it moves where `torch.rand(())` is below it."""
    return torch.Generator().manual_seed((seed * 1_000_003 + 2 * stage + 1) % 2**63)


class Synthetic(Rule):
    """Update on synthetic gradients, under `stream`; nothing is stale, and no stage waits.

    Args:
        synthesizer: makes M from (given, wanted, condition), the shapes of one sample of the
            stage's output; None chooses by them (`synthesizers.choose`). Its layer `last`, if it
            has one, starts at zero, so that the first synthetic gradient is.
        conditional: tell M the target (cDNI). classes: how many, where targets are labels.
        optimizer: a function of M's (name, Parameter) pairs; None is Adam at 3e-3.
        lag: M learns from micro-batch i - lag right after the update of i, waiting for its gradient
            if need be: the same numbers in every run. A stage behind it that waits for its own
            gradients adds its delay. 'free': whenever one has come, which hides what is late.
        ahead: with lag='free', micro-batches that may be on their way before it waits for one.
        p_update: the share of micro-batches, drawn by each stage, that go back through it and move
            it; of the others the stage before gets no gradient to learn from.
        inputs: 'synthetic' also guesses each stage's input from the network's, which reaches all
            stages directly: no stage waits for the one before (full unlock).
            `evaluate` and `predict` run on real ones.
        input_synthesizer: makes what guesses it; None chooses by shape.

    Raises:
        ValueError: an argument out of its range, or without a meaning.
    """

    def __init__(
        self,
        synthesizer: Factory | None = None,
        *,
        conditional: bool = False,
        classes: int | None = None,
        optimizer: OptimizerFactory | None = None,
        lag: int | Literal["free"] = 2,
        ahead: int = 8,
        p_update: float = 1.0,
        inputs: Literal["real", "synthetic"] = "real",
        input_synthesizer: Factory | None = None,
    ) -> None:
        if lag != "free" and (isinstance(lag, bool) or not isinstance(lag, int) or lag < 0):
            raise ValueError(f"lag={lag!r}: give a whole number >= 0, or 'free'")
        if isinstance(ahead, bool) or not isinstance(ahead, int) or ahead < 1:
            raise ValueError(f"ahead={ahead!r}: give a whole number >= 1")
        if not isinstance(p_update, int | float) or not 0 < p_update <= 1:
            raise ValueError(f"p_update={p_update!r}: give a share in (0, 1]")
        if inputs not in ("real", "synthetic"):
            raise ValueError(f"inputs={inputs!r}: write 'real' or 'synthetic'")
        if input_synthesizer is not None and inputs == "real":
            raise ValueError("input_synthesizer= has no meaning with inputs='real': leave it out")
        if classes is not None and (isinstance(classes, bool) or not isinstance(classes, int)):
            raise ValueError(f"classes={classes!r}: give a whole number >= 1")
        if classes is not None and (classes < 1 or not conditional):
            raise ValueError(f"classes={classes!r} needs conditional=True, and at least one class")
        for name, factory in (
            ("synthesizer", synthesizer),
            ("optimizer", optimizer),
            ("input_synthesizer", input_synthesizer),
        ):
            if factory is not None and not callable(factory):
                raise TypeError(
                    f"{name}={factory!r} cannot be called: give a class or a function, as in "
                    "synthesizer=MLP with from headrace.pipeline.synthesizers import MLP"
                )
        self._make, self._make_input = synthesizer or choose, input_synthesizer or choose
        self._conditional, self._classes = conditional, classes
        self._optimizer: OptimizerFactory = optimizer or adam
        self._p_update = p_update
        self.eager = lag == "free"
        self.ahead = ahead if lag == "free" else int(lag)
        self.synthesizes_inputs = inputs == "synthetic"
        self._synthesizers: list[SyntheticGradient | None] | None = None
        self._input: Teachable | None = None

    def check(self, schedule: "Schedule", stages: int) -> None:
        if schedule.flushes:
            raise ValueError(
                f"rule synthetic under schedule {schedule.name!r}: its stages never wait, and a "
                "flush does; write schedule='stream', or rule=Exact()"
            )

    def attach(self, stage: "Stage") -> None:
        self._draws = update_draws(stage.seed, stage.index)

    @property
    def figures(self) -> Figures:
        known = [each for each in self._synthesizers or () if each is not None]
        if not known:
            return Figures()
        # Of an output of several tensors: the losses add up, the cosines are averaged.
        return Figures(
            synthesizer_loss=sum(each.loss.value for each in known),
            cosine=sum(each.cosine.value for each in known) / len(known),
        )

    def moves(self) -> bool:
        return self._p_update == 1 or float(torch.rand((), generator=self._draws)) < self._p_update

    # Gradients ---------------------------------------------------------------------------------

    def guess(self, stage: "Stage", flight: "Flight") -> list[Tensor | None]:
        outputs = leaves(flight.output)
        if self._synthesizers is None:
            condition = None
            if self._conditional:
                condition = self._look(stage, flight.target)
            self._synthesizers = [
                self._build(stage, k, h, condition) if h.requires_grad else None
                for k, h in enumerate(outputs)
            ]
        target = flight.target if self._conditional else None
        both = zip(outputs, self._synthesizers, strict=True)
        return [None if m is None else self._guess(m, h.detach(), target) for h, m in both]

    def _guess(self, synthesizer: SyntheticGradient, h: Tensor, target: Any) -> Tensor:
        try:
            gradient = synthesizer.guess(h, target)
        except IndexError as error:
            labels = f", and there is a label {int(target.max())}" if target is not None else ""
            raise InputError(f"rule synthetic, classes={self._classes}{labels}: {error}") from error
        if gradient.shape != h.shape:
            raise InputError(
                f"the synthesizer {type(synthesizer.network).__name__} gave {describe(gradient)} "
                f"for an output {describe(h)}: it must give a tensor of the same shape"
            )
        return gradient

    def _look(self, stage: "Stage", target: Any) -> Condition:
        try:
            return Condition.of(target, self._classes)
        except (TypeError, ValueError) as error:
            raise InputError(f"rule synthetic on stage {stage.index}: {error}") from error

    def _build(
        self, stage: "Stage", k: int, h: Tensor, condition: Condition | None
    ) -> SyntheticGradient:
        shape, seed = h.shape[1:], _seed(stage, k)
        try:
            network = make_seeded(lambda: self._make(shape, shape, condition), seed, h)
        except (TypeError, ValueError) as error:
            raise InputError(f"rule synthetic on stage {stage.index}: {error}") from error
        start_at_zero(network)
        return SyntheticGradient(network, self._optimizer)

    def arrive(self, stage: "Stage", flight: "Flight", gradients: Sequence[Tensor | None]) -> bool:
        target = flight.target if self._conditional else None
        triples = zip(self._synthesizers or (), leaves(flight.output), gradients, strict=False)
        return all(
            [
                synthesizer.learn(h, gradient, target)
                for synthesizer, h, gradient in triples
                if synthesizer is not None and gradient is not None
            ]
        )

    # Inputs ------------------------------------------------------------------------------------

    @property
    def knows_inputs(self) -> bool:  # type: ignore[override]
        return self._input is not None

    def see_input(self, stage: "Stage", source: Nest, x: Nest) -> None:
        given, wanted = leaves(source), leaves(x)
        floating = all(t.is_floating_point() for t in wanted)
        if len(given) != 1 or len(wanted) != 1 or not floating:
            raise InputError(
                f"inputs='synthetic' guesses one tensor of numbers from one tensor, not "
                f"{describe(x)} from {describe(source)}: write inputs='real'"
            )
        shapes = given[0].shape[1:], wanted[0].shape[1:]
        try:
            network = make_seeded(
                lambda: self._make_input(*shapes, None), _seed(stage, 1000), wanted[0]
            )
        except (TypeError, ValueError) as error:
            raise InputError(
                f"rule synthetic on stage {stage.index}, input_synthesizer: {error}"
            ) from error
        self._input = Teachable(network, self._optimizer)

    def guess_input(self, stage: "Stage", source: Nest) -> Nest:
        assert self._input is not None
        (given,) = leaves(source)
        return self._input.guess(given).requires_grad_()

    def arrive_input(self, stage: "Stage", source: Nest, x: Nest) -> bool:
        assert self._input is not None
        (given,), (wanted,) = leaves(source), leaves(x)
        return self._input.learn(given, wanted)


def _seed(stage: "Stage", which: int) -> int:
    """Of the first weights of a stage's synthesizers: unlike those of any other."""
    return (stage.seed + 1) * 1_000_003 + 10_007 * (stage.index + 1) + which
