"""Where updates end: the first stage counts what it feeds, and marks what closes an update.

The others follow the mark, which rides with the micro-batch. So an update's size may change while
micro-batches are in flight, and nothing drains for it.
"""

from .batch_size import Growth
from .batch_size.sampled import UNKNOWN
from .errors import InputError
from .report import Books
from .stateful import Stateful

__all__ = ["Gathering"]


class Gathering(Stateful):
    """What has been fed towards the update at hand.

    Args:
        every: micro-batches to an update, or mini-batches under a flush, where nothing grows.
        growth: of the samples of an update; None where nothing grows.
        flushes: an update ends with a mini-batch only.
        books: know what the stages have told; None where none has.
    """

    state = ("_epoch", "_fed", "_size", "_updates", "_samples", "_parts", "_micro_batches")

    def __init__(
        self, every: int, growth: Growth | None, flushes: bool, books: Books | None = None
    ) -> None:
        self._every, self._growth, self._flushes, self._books = every, growth, flushes, books
        self._epoch, self._fed = 0, False
        self._size = growth.start if growth else 0
        self._updates = self._samples = self._parts = self._micro_batches = 0

    def begin(self) -> None:
        """A call of `train` begins; one that fed nothing does not count."""
        self._epoch += self._fed
        self._fed = False

    def closes(self, samples: int, last: bool) -> bool:
        """Whether the next micro-batch closes an update.

        Args:
            samples: in it.
            last: of its mini-batch.

        Raises:
            InputError: an update would have more samples than it is to have, for it is one
                micro-batch, or the first one too few micro-batches to measure on; the micro-batch
                does not count then.
        """
        if self._growth and self._updates and not self._micro_batches:
            sampled = self._books.sampled if self._books and self._growth.measures else UNKNOWN
            self._size = self._growth.next(self._size, self._epoch, sampled)
        ends = last or not self._flushes
        gathered, parts = self._samples + samples, self._parts + ends
        micro_batches = self._micro_batches + 1
        closes = ends and (gathered >= self._size if self._growth else parts >= self._every)
        if closes and self._growth:
            self._check(self._growth, gathered, parts, micro_batches)
        self._fed = True
        self._updates += closes
        left = (0, 0, 0) if closes else (gathered, parts, micro_batches)
        self._samples, self._parts, self._micro_batches = left
        return closes

    def _check(self, growth: Growth, samples: int, parts: int, micro_batches: int) -> None:
        kind, start, first = type(growth).__name__, growth.start, not self._updates
        if parts == 1 and samples > self._size:
            part = "mini-batch" if self._flushes else "micro-batch"
            where = "starts at" if first else "has come to"
            raise InputError(
                f"batch_size= is a {kind} that {where} {self._size} samples, and a {part} has "
                f"{samples}: {'start at' if first else 'give'} {samples} or more, or make the "
                "loader's mini-batches smaller"
                + ("" if self._flushes else ", or micro_batches= larger")
            )
        if first and growth.measures and micro_batches == 1:
            raise InputError(
                f"batch_size= is a {kind} that starts at {start} samples, which is one "
                "micro-batch, and how much samples differ shows in two or more: start at "
                f"{samples + 1} or more, or write micro_batches=2 or more"
            )
