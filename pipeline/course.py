"""A first stage's course through its data: how far it is, and how to come there again.

A loader that draws its order at the beginning of a pass is given the random states of then, and its
mini-batches up to the place are drawn and dropped; the next one is drawn with the random states it
was drawn with, for it may be augmented.

What a loader keeps from one mini-batch to the next (a shuffle buffer, the rest of an order) hangs
on all that was drawn, from the global state by the first stage's layers, too, and dropped
mini-batches go without them. So once something else has drawn from that, as it does in a plain
loop, the loader has a stream of its own until the end of the pass.
"""

import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor

from .checkpoints.position import Position
from .checkpoints.schema import whole
from .errors import InputError
from .nest import Nest

__all__ = ["Course"]


class Course:
    """Where a first stage is; on the other ranks only the calls of `train` are counted."""

    def __init__(self) -> None:
        self.position = Position()
        self._generators: list[torch.Generator] = []
        self._began: Mapping[str, Any] | None = None
        self._here: Mapping[str, Any] = {}
        # A DataLoader's persistent workers draw a seed when they are started, and not again.
        self._warm = False
        self._resumes: Mapping[str, Any] | None = None
        # The first mini-batch of the pass that was drawn from the loader's own stream.
        self._apart: int | None = None

    def begin(self, loader: Iterable[Any]) -> None:
        """A call of `train` begins: note the random states, or take on those of a checkpoint."""
        self._generators = _generators_of(loader)
        self._warm = getattr(loader, "_iterator", None) is not None
        self._apart = None
        if self._resumes is not None:
            if self._resumes["warm"] and not self._warm and hasattr(loader, "_iterator"):
                iter(loader)
                self._warm = True
            began = self._resumes["began"]
            self._apart = None if began is None else self._resumes.get("apart")
            _restore(self._resumes["now"] if began is None else began, self._generators)
        self._began = self._here = _capture(self._generators)

    def draw(self, batches: Iterator[tuple[Nest, Nest]]) -> Iterator[tuple[Nest, Nest]]:
        """A loader's mini-batches, each drawn from the random stream that is the loader's."""
        own = torch.get_rng_state()
        for number in count():
            outer = torch.get_rng_state()
            repeats = self._resumes is not None
            if self._apart is None and not repeats and not outer.equal(own):
                self._apart = number
            if number == self._apart:
                own = _another(own)
            torch.set_rng_state(own)
            batch = next(batches, None)
            own = torch.get_rng_state()
            if self._apart is not None and number >= self._apart:
                torch.set_rng_state(outer)
            if batch is None:
                return
            yield batch

    def find(self, batches: Iterator[tuple[Nest, Nest]]) -> Iterator[tuple[Nest, Nest]]:
        """A loader's mini-batches from the place on that a checkpoint was made at."""
        resumes = self._resumes
        if resumes is not None and resumes["began"] is not None:
            done = self.position.mini_batches
            if (drawn := sum(1 for _ in islice(batches, done))) < done:
                raise InputError(
                    f"the checkpoint was made after {done} mini-batches of a pass over the loader, "
                    f"and it gives {drawn}: give the one that was trained on"
                )
            self._here = resumes["here"]
            _restore(self._here, self._generators)
            first = next(batches, None)
            # Between the drawing of this one and the checkpoint, layers may have drawn.
            _restore(resumes["now"], self._generators)
            self._resumes = None
            if first is None:  # it was made at the end of the pass
                return
            yield first
        self._resumes = None
        yield from batches

    def pause(self) -> None:
        """The place may be saved before the next mini-batch, which is about to be drawn."""
        self._here = _capture(self._generators)

    def feed(self, micro_batches: int, samples: int) -> None:
        """A mini-batch goes in."""
        now = self.position
        self.position = replace(
            now,
            mini_batches=now.mini_batches + 1,
            total=now.total + 1,
            micro_batches=now.micro_batches + micro_batches,
            samples=now.samples + samples,
        )

    def end(self) -> None:
        """A call of `train` is over."""
        self.position = replace(self.position, epochs=self.position.epochs + 1, mini_batches=0)
        self._began = None

    # Its state ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The place; the random states at the beginning of the pass, if in one, before the place's
        next mini-batch was drawn, and now.
        """
        if self._resumes is not None:  # nothing was read since
            return dict(self._resumes) | {"position": asdict(self.position)}
        now = _capture(self._generators)
        states = {"began": self._began, "here": self._here, "now": now, "warm": self._warm}
        return {"position": asdict(self.position), **states, "apart": self._apart}

    def load_state_dict(self, state: Mapping[str, Any], share: float = 1) -> None:
        """Be there with the next call of `train`.

        Args:
            share: of the data that is this replica's now, so many times as much was its before: as
                replicas take turns, 2 where there were two and is one.

        Raises:
            ValueError, TypeError, KeyError, RuntimeError, AttributeError: it is no such state.
        """
        _try_on(state)
        position = Position.of(state["position"])
        self.position = replace(position, mini_batches=round(position.mini_batches * share))
        self._resumes = state
        self._began = None


def _generators_of(loader: Any) -> list[torch.Generator]:
    """What a DataLoader and its samplers draw from."""
    batches = getattr(loader, "batch_sampler", None)
    places = (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None))
    found = [getattr(place, "generator", None) for place in places]
    unique = {id(g): g for g in found if isinstance(g, torch.Generator)}
    return list(unique.values())


def _another(state: Tensor) -> Tensor:
    """A state of torch's generator that follows from this one, and draws nothing like it."""
    generator = torch.Generator()
    generator.set_state(state)
    seed = int(torch.randint(2**63 - 1, (), generator=generator))
    return torch.Generator().manual_seed(seed).get_state()


def _try_on(state: Mapping[str, Any]) -> None:
    """See that the random states are some: they are taken on much later, amid a pass."""
    if state.get("apart") is not None:
        whole("apart", state["apart"])
    own = _capture([])
    try:
        for name in ("now",) if state["began"] is None else ("began", "here", "now"):
            _restore(state[name], [torch.Generator() for _ in state[name]["loader"]])
    finally:
        _restore(own, [])


def _capture(generators: list[torch.Generator]) -> dict[str, Any]:
    """Of this process: the loader's generators, torch's, Python's and, if in use, NumPy's."""
    state = {
        "loader": [generator.get_state() for generator in generators],
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
    }
    if numpy := sys.modules.get("numpy"):
        kind, keys, *rest = numpy.random.get_state()
        state["numpy"] = (kind, torch.from_numpy(keys.astype("int64")), *map(float, rest))
    return state


def _restore(state: Mapping[str, Any], generators: list[torch.Generator]) -> None:
    for generator, saved in zip(generators, state["loader"], strict=False):
        generator.set_state(saved)
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    if "numpy" in state and (numpy := sys.modules.get("numpy")):
        kind, keys, place, has, value = state["numpy"]
        words = keys.numpy().astype("uint32")
        numpy.random.set_state((kind, words, int(place), int(has), value))
