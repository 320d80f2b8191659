"""Replicas in step: they average their gradients before every update."""

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from ..gradient import Gradient
from ..message import Kind, Message
from .peers import Peers, Steps
from .replicas import Meeting, Replicas

if TYPE_CHECKING:
    from ..engine import Engine
    from ..stage import Stage

__all__ = ["Allreduce"]

SMALL = 1 << 18
"""Bytes of a stage's weights up to which gradients are passed round whole: one lap, not three."""


class Allreduce(Replicas):
    """Every update moves all replicas alike, on the mean gradient over all their samples.

    As one pipeline on their mini-batches joined, and as slow as the slowest of them. The sum goes
    round a ring (of a large gradient 2(R-1)/R of its bytes through each link), and is the same
    everywhere to the last bit. A replica that has run out of data takes part with nothing until all
    have.
    """

    connects = True

    def join(self, meeting: Meeting) -> Peers:
        for name, module in meeting.layers.named_modules():
            if getattr(module, "sparse", False) is True and isinstance(module, torch.nn.Module):
                raise ValueError(
                    f"layer {name!r} ({type(module).__name__}) gives sparse gradients, and "
                    "replicas: allreduce averages dense ones: write sparse=False there, or share "
                    "the weights by hogwild or downpour"
                )
        return _Ring(meeting.grid.replica, meeting.grid.replicas)


class _Ring(Peers):
    """One stage's place among its peers.

    In each round all take part: with a gradient, or with nothing where one has come to a rest. The
    rounds of a rest end when all are at rest. Who was asked to stop says so in a round, too: then
    all stop at the same place.
    """

    def __init__(self, replica: int, count: int) -> None:
        self._replica, self._count = replica, count
        self._asked = self._stops = False

    def stops(self, asked: bool) -> bool:
        self._asked = asked
        return self._stops

    def combine(self, engine: "Engine") -> Steps:
        yield from self._round(engine, rests=False)

    def rest(self, engine: "Engine") -> Steps:
        stage = engine.stage
        kept, stage.gradient = stage.gradient, Gradient()  # of an update that is not due yet
        while (yield from self._round(engine, rests=True)):
            yield from cast(Steps, engine.apply())
        stage.gradient = kept

    def settle(self, engine: "Engine") -> Steps:
        yield from self.rest(engine)
        # Statistics of normalisation are each replica's own until here: the first one's are kept.
        own = [b for b in engine.stage.layers.buffers() if b.layout is torch.strided]
        rows = yield from self._gather(engine, [b.detach().clone() for b in own])
        with torch.no_grad():
            for buffer, first in zip(own, rows[0], strict=True):
                buffer.copy_(first)

    def _round(self, engine: "Engine", rests: bool) -> Steps:
        """Make the stage's gradient everybody's; whether anybody had one to bring."""
        stage, gradient = engine.stage, engine.stage.gradient
        has = [float(name in gradient.sums) for name in stage.trainable]
        head = [gradient.weight, gradient.samples, not gradient.finite, rests, self._asked, *has]
        # A small gradient goes along with it.
        small = sum(t.numel() * t.element_size() for t in stage.trainable.values()) <= SMALL
        own = self._weighted(stage, list(stage.trainable)) if small else []
        rows = yield from self._gather(engine, [torch.tensor(head, dtype=torch.float64), *own])
        heads, *sums = [sum(each[1:], each[0]) for each in zip(*rows, strict=True)]
        weight, samples, spoilt, at_rest, asked, *have = heads.tolist()
        self._stops = self._stops or asked > 0
        if at_rest == self._count:
            return False
        names = [name for name, some in zip(stage.trainable, have, strict=True) if some]
        if not small:
            sums = yield from self._sum(engine, self._weighted(stage, names) if weight else [])
        else:
            sums = [total for total, some in zip(sums, have, strict=True) if some]
        if weight:
            both = zip(names, sums, strict=True)
            gradient.sums = {name: total.div_(weight) for name, total in both}
        gradient.samples, gradient.first, gradient.weight = int(samples), weight, weight
        gradient.finite = not spoilt
        return True

    def _weighted(self, stage: "Stage", names: list[str]) -> list[Tensor]:
        """The stage's gradients times their weight; zeros where it has none."""
        gradient = stage.gradient
        return [
            gradient.sums[name] * gradient.first
            if name in gradient.sums
            else torch.zeros_like(stage.trainable[name], requires_grad=False)
            for name in names
        ]

    def _gather(self, engine: "Engine", mine: list[Tensor]) -> Steps:
        """Everybody's tensors, in the replicas' order."""
        rows: list[list[Tensor]] = [mine] * self._count
        passing = mine
        for step in range(1, self._count):
            passing = yield from self._exchange(engine, passing)
            rows[(self._replica - step) % self._count] = passing
        return rows

    def _sum(self, engine: "Engine", tensors: list[Tensor]) -> Steps:
        """The sum of everybody's tensors, by a ring: each adds to a part and passes it on, until
        the parts are whole; then those go round.
        """
        if not tensors:
            return []
        count, me = self._count, self._replica
        flat = {dtype: [t for t in tensors if t.dtype is dtype] for dtype in _dtypes(tensors)}
        joined = [torch.cat([t.reshape(-1) for t in group]) for group in flat.values()]
        parts = [[*torch.tensor_split(one, count)] for one in joined]
        for step in range(count - 1):
            sent, got = (me - step) % count, (me - step - 1) % count
            for each, part in zip(
                parts, (yield from self._exchange(engine, [p[sent] for p in parts])), strict=True
            ):
                each[got].add_(part)
        for step in range(count - 1):
            sent, got = (me + 1 - step) % count, (me - step) % count
            for each, part in zip(
                parts, (yield from self._exchange(engine, [p[sent] for p in parts])), strict=True
            ):
                each[got].copy_(part)
        whole = {
            dtype: iter(torch.split(one, [t.numel() for t in group]))
            for (dtype, group), one in zip(flat.items(), joined, strict=True)
        }
        return [next(whole[t.dtype]).view(t.shape) for t in tensors]

    def _exchange(self, engine: "Engine", tensors: list[Tensor]) -> Steps:
        """Pass tensors on to the next replica, and take the previous one's."""
        if self._count == 1:
            return tensors
        links = engine.links
        assert links.to_next is not None
        links.to_next.send(Message(Kind.VALUE, body=[*tensors]))
        message = yield from engine.take(links.from_previous)
        return [*cast(list[Tensor], message.body)]


def _dtypes(tensors: list[Tensor]) -> list[torch.dtype]:
    return [*dict.fromkeys(t.dtype for t in tensors)]
