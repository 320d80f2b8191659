"""Synthetic gradients: a stage updates at once, on a guess of the gradient that is yet to come.

Decoupled neural interfaces (Jaderberg et al. 2017). Stage j carries a synthesizer M. The output h
of a micro-batch goes on to the next stage, and at once back through stage j with M(h) in the
gradient's place. What the next stage later sends back, δ = (∂h_{j+1}/∂h)ᵀ M_{j+1}(h_{j+1}), true
only if that is the last stage, moves no weight: M learns from it, ‖M(h) - δ‖².
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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

AHEAD = 8
"""Micro-batches that may be on their way with lag='free', if nothing else is said."""


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
            if need be: the same numbers in every run. If the stage after waits for its own
            gradients, its delay is added. 'free': whenever one has come, which hides what is late.
        ahead: with lag='free', micro-batches that may be on their way before it waits for one; None
            is `AHEAD`.
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
        ahead: int | None = None,
        p_update: float = 1.0,
        inputs: Literal["real", "synthetic"] = "real",
        input_synthesizer: Factory | None = None,
    ) -> None:
        if lag != "free" and (isinstance(lag, bool) or not isinstance(lag, int) or lag < 0):
            raise ValueError(f"lag={lag!r}: give a whole number >= 0, or 'free'")
        if ahead is not None and (
            isinstance(ahead, bool) or not isinstance(ahead, int) or ahead < 1
        ):
            raise ValueError(f"ahead={ahead!r}: give a whole number >= 1")
        if ahead is not None and lag != "free":
            raise ValueError(
                f"ahead={ahead!r} has no meaning with lag={lag!r}: leave one of them out"
            )
        if not isinstance(conditional, bool):
            raise ValueError(f"conditional={conditional!r}: write True or False")
        if type(p_update) not in (int, float) or not 0 < p_update <= 1:
            raise ValueError(f"p_update={p_update!r}: give a share in (0, 1]")
        if inputs not in ("real", "synthetic"):
            raise ValueError(f"inputs={inputs!r}: write 'real' or 'synthetic'")
        if input_synthesizer is not None and inputs == "real":
            raise ValueError("input_synthesizer= has no meaning with inputs='real': leave it out")
        if classes is not None and (isinstance(classes, bool) or not isinstance(classes, int)):
            raise ValueError(f"classes={classes!r}: give a whole number >= 1")
        if classes is not None and (classes < 1 or not conditional):
            raise ValueError(f"classes={classes!r} needs conditional=True, and at least one class")
        example = "MLP, with from headrace.pipeline.synthesizers import MLP"
        for name, factory, instead in (
            ("synthesizer", synthesizer, example),
            ("optimizer", optimizer, "lambda params: torch.optim.Adam(params, lr=1e-3)"),
            ("input_synthesizer", input_synthesizer, example),
        ):
            if factory is not None and not callable(factory):
                raise TypeError(
                    f"{name}={factory!r} cannot be called: give a class or a function, as in "
                    f"{name}={instead}"
                )
        self._make, self._make_input = synthesizer or choose, input_synthesizer
        self._conditional, self._classes = conditional, classes
        self._optimizer: OptimizerFactory = optimizer or adam
        self._p_update = p_update
        self.eager = lag == "free"
        self.ahead = (ahead or AHEAD) if lag == "free" else int(lag)
        self.synthesizes_inputs = inputs == "synthetic"
        self._synthesizers: dict[int, SyntheticGradient] = {}  # by the tensor's place in the output
        self._input: Teachable | None = None
        self._saved: Mapping[str, Any] = {}  # of what is not made yet

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
        taught = [each for each in self._synthesizers.values() if not math.isnan(each.loss.value)]
        if not taught:
            return Figures()
        # Of an output of several tensors: the losses add up, the cosines are averaged.
        return Figures(
            synthesizer_loss=sum(each.loss.value for each in taught),
            cosine=sum(each.cosine.value for each in taught) / len(taught),
        )

    def moves(self) -> bool:
        return self._p_update == 1 or float(torch.rand((), generator=self._draws)) < self._p_update

    def state_dict(self) -> dict[str, Any]:
        made = {k: each.state_dict() for k, each in self._synthesizers.items()}
        known = self._saved.get("input", {}) if self._input is None else self._input.state_dict()
        gradients = {**self._saved.get("gradients", {}), **made}
        return {"gradients": gradients, "input": known, "draws": self._draws.get_state()}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        # A synthesizer is made of the first tensor that it sees.
        self._saved = state
        self._draws.set_state(state["draws"].cpu())
        for k in self._synthesizers.keys() & state["gradients"].keys():
            self._synthesizers[k].load_state_dict(state["gradients"][k], device)
        if self._input is not None and state["input"]:
            self._input.load_state_dict(state["input"], device)

    # Gradients ---------------------------------------------------------------------------------

    def guess(self, stage: "Stage", flight: "Flight") -> list[Tensor | None]:
        target = flight.target if self._conditional else None
        return [
            self._guess(stage, k, h.detach(), target) if h.requires_grad else None
            for k, h in enumerate(leaves(flight.output))
        ]

    def _guess(self, stage: "Stage", k: int, h: Tensor, target: Any) -> Tensor:
        with _of(stage):
            if k not in self._synthesizers:
                self._synthesizers[k] = self._build(stage, k, h, target)
            try:
                return self._synthesizers[k].guess(h, target)
            except IndexError as error:
                if self._classes is None or int(target.max()) < self._classes:
                    raise
                raise InputError(
                    f"classes={self._classes}, but there is a label {int(target.max())}: write the "
                    "number of all classes"
                ) from error

    def _build(self, stage: "Stage", k: int, h: Tensor, target: Any) -> SyntheticGradient:
        shape, seed = h.shape[1:], stage.derive_seed(k)
        told = Condition.of(target, self._classes, h.shape) if self._conditional else None
        network = make_seeded(lambda: self._make(shape, shape, told), seed, h)
        start_at_zero(network)
        made = SyntheticGradient(network, self._optimizer, seed)
        if k in self._saved.get("gradients", {}):
            made.load_state_dict(self._saved["gradients"][k], stage.device)
        return made

    def arrive(self, stage: "Stage", flight: "Flight", gradients: Sequence[Tensor | None]) -> bool:
        target = flight.target if self._conditional else None
        finite = True
        with _of(stage):
            for k, (h, gradient) in enumerate(zip(leaves(flight.output), gradients, strict=True)):
                if gradient is not None and k in self._synthesizers:
                    finite &= self._synthesizers[k].learn(h, gradient, target)
        return finite

    # Inputs ------------------------------------------------------------------------------------

    @property
    def knows_inputs(self) -> bool:
        return self._input is not None

    def see_input(self, stage: "Stage", source: Nest, x: Nest) -> None:
        given, wanted = leaves(source), leaves(x)
        floating = all(t.is_floating_point() for t in wanted)
        with _of(stage, ", input_synthesizer"):
            if len(given) != 1 or len(wanted) != 1 or not floating:
                raise InputError(
                    f"inputs='synthetic' guesses one tensor of numbers from one tensor, not "
                    f"{describe(x)} from {describe(source)}: write inputs='real'"
                )
            if self._make_input is None and not given[0].is_floating_point():
                raise InputError(
                    f"inputs='synthetic' cannot guess from {describe(source)} by itself: give "
                    "input_synthesizer=partial(Sequence, vocabulary=…) for tokens, or one of your "
                    "own; or write inputs='real'"
                )
            make, shapes = self._make_input or choose, (given[0].shape[1:], wanted[0].shape[1:])
            seed = stage.derive_seed(1000)
            network = make_seeded(lambda: make(*shapes, None), seed, wanted[0])
            self._input = Teachable(network, self._optimizer, seed)
            self._input_kind = wanted[0].dtype
            guess = self._input.guess(given[0])
            if guess.shape != wanted[0].shape:
                raise InputError(
                    f"the input synthesizer {type(network).__name__} gave {describe(guess)}, and "
                    f"the stage takes {describe(wanted[0])}: it must give that"
                )
            if self._saved.get("input"):
                self._input.load_state_dict(self._saved["input"], stage.device)

    def guess_input(self, stage: "Stage", source: Nest) -> Nest:
        assert self._input is not None
        (given,) = leaves(source)
        with _of(stage, ", input_synthesizer"):
            return self._input.guess(given).to(self._input_kind).requires_grad_()

    def arrive_input(self, stage: "Stage", source: Nest, x: Nest) -> bool:
        assert self._input is not None
        (given,), (wanted,) = leaves(source), leaves(x)
        with _of(stage, ", input_synthesizer"):
            return self._input.learn(given, wanted)


@contextmanager
def _of(stage: "Stage", which: str = "") -> Iterator[None]:
    """Say of which rule and stage what is refused is."""
    try:
        yield
    except (InputError, TypeError, ValueError) as error:
        raise InputError(f"rule synthetic on stage {stage.index}{which}: {error}") from error
