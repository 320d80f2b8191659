"""What the first stage is fed: a user's loader as messages, and what is wrong with it."""

import traceback
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

from torch import Tensor
from torch.utils.data import DistributedSampler

from .channel import Inbox
from .course import Course
from .engine import Call
from .errors import InputError, first_line
from .grid import Grid
from .message import Kind, Message
from .microbatch import samples, split
from .nest import Nest

__all__ = ["Source", "begin", "deal", "feed", "read"]


class Source(Inbox):
    """The first stage's upstream channel: its messages are made when they are asked for.

    A loader at fault ends the call on all stages as its last mini-batch would; then the error goes
    its way (`finish`), and the stages are whole.
    """

    def __init__(self) -> None:
        self._messages: Iterator[Message] = iter(())
        self._error: InputError | None = None

    def open(self, messages: Iterator[Message]) -> None:
        """Go on with these messages."""
        self._messages = messages

    def poll(self) -> Message | None:
        """Give the next message, if there is one."""
        try:
            return next(self._messages, None)
        except InputError as error:
            self._error = error
            return Message(Kind.END)

    def finish(self) -> None:
        """Raise what the loader did wrong in the call that is over."""
        error, self._error = self._error, None
        if error is not None:
            raise error


def begin(call: Call) -> Iterator[Message]:
    """The message that begins a call."""
    yield Message(Kind.BEGIN, int(call))


def feed(
    call: Call,
    batches: Iterable[tuple[Nest, Nest]],
    parts: int,
    start: int,
    tune_at: int | None,
    closes: Callable[[int, bool], bool] = lambda samples, last: False,
    course: Course | None = None,
    mark: Callable[[], Kind | None] = lambda: None,
    together: Callable[[], bool] | None = None,
) -> Iterator[Message]:
    """The messages of a call over a loader: begin, each micro-batch with its samples, end.

    Args:
        parts: micro-batches to a mini-batch.
        start: the first micro-batch's index.
        tune_at: the index before which to measure the links; None for never.
        closes: whether a micro-batch of so many samples, the last of its mini-batch or not, closes
            an update; asked when it is fed.
        course: is told of each mini-batch that went in.
        mark: asked before each mini-batch is drawn, and at the end: SAVE, to make a checkpoint
            before it goes in; END, to end the call early, if there is one.
        together: of replicas, which save between calls: a SAVE ends the call, and so does the end
            of the data until this says that all have come there; each time another one begins.
    """
    again = [Message(Kind.END, last=True), *begin(call)]
    yield from begin(call)
    iterator = iter(batches)
    while True:
        before = mark()
        batch = next(iterator, None)
        if before is Kind.SAVE:
            yield from again if together else [Message(Kind.SAVE, start)]
        if before is Kind.END:
            yield Message(Kind.END, last=True)
            return
        if batch is None:
            break
        pieces = split(batch, parts)
        sizes = [samples(piece) for piece in pieces]
        for k, (piece, size) in enumerate(zip(pieces, sizes, strict=True)):
            if start == tune_at:
                yield Message(Kind.TUNE)
            last = k == len(pieces) - 1
            numbers = (float(size), float(closes(size, last)))
            yield Message(Kind.MICRO_BATCH, start, last, numbers, piece)
            start += 1
        if course is not None:
            course.feed(len(pieces), sum(sizes))
    while together and not together():
        yield from again
    yield Message(Kind.END)


def read(loader: Iterable[Any], pairs_only: bool) -> Iterator[tuple[Nest, Nest]]:
    """Read (input, target) pairs, and look at each before it goes in.

    Args:
        pairs_only: refuse an input without a target; otherwise its target is None.

    Raises:
        InputError: the loader raises, gives nothing, or gives what cannot be cut into samples.
    """
    if isinstance(loader, Tensor | dict):
        raise InputError(
            f"the loader is one {type(loader).__name__}, and a pass over it would give its parts: "
            "give an iterable of mini-batches, a DataLoader, or a list as in [inputs]"
        )
    number = 0
    iterator = None
    while True:
        try:
            iterator = iter(loader) if iterator is None else iterator
            item = next(iterator)
        except StopIteration:
            break
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise InputError(
                f"the loader raised {type(error).__name__}: {first_line(error)} while making "
                f"mini-batch {number} ({place.filename}:{place.lineno} in {place.name})"
            ) from error
        yield _pair(item, number, pairs_only)
        number += 1
    if number == 0:
        raise InputError(
            "the loader gave no mini-batch: give a DataLoader or a list of (input, target) pairs; "
            "a generator can be read only once, and drop_last=True drops a lone short batch"
        )


def deal(
    batches: Iterator[tuple[Nest, Nest]], loader: Any, grid: Grid
) -> Iterator[tuple[Nest, Nest]]:
    """A replica's own mini-batches of those that all replicas read: r, r+R, r+2R, …

    A loader with a DistributedSampler gives each replica its own already.

    Raises:
        ValueError: the DistributedSampler is another replica's.
        InputError: there are fewer mini-batches than replicas.
    """
    sampler = getattr(loader, "sampler", None)
    sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", sampler)
    replica, replicas = grid.share
    if isinstance(sampler, DistributedSampler):
        if (sampler.num_replicas, sampler.rank) != (replicas, replica):
            raise ValueError(
                f"the loader's DistributedSampler has num_replicas={sampler.num_replicas}, "
                f"rank={sampler.rank}, and this is replica {replica} of {replicas}: "
                "write DistributedSampler(dataset, pipe.replicas, pipe.replica)"
            )
        yield from batches
        return
    none = True
    for batch in islice(batches, replica, None, replicas):
        none = False
        yield batch
    if none:
        raise InputError(
            f"the loader has no mini-batch for replica {replica} of {replicas}: each "
            "takes every R-th, so give at least as many as there are replicas"
        )


def _pair(item: Any, number: int, pairs_only: bool) -> tuple[Nest, Nest]:
    if isinstance(item, tuple | list) and len(item) == 2:
        pair = (item[0], item[1])
    elif pairs_only:
        size = f" of {len(item)}" if isinstance(item, tuple | list) else ""
        raise InputError(
            f"mini-batch {number} is a {type(item).__name__}{size}: a loader must give pairs "
            "(input, target), each a tensor or a nest of tensors"
        )
    else:
        single = isinstance(item, tuple | list) and len(item) == 1
        pair = (item[0] if single else item, None)
    try:
        samples(pair)
    except TypeError as error:
        raise InputError(f"mini-batch {number}: {error}") from error
    return pair
