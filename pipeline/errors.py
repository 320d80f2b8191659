"""The errors of our own, and the words in which they are told."""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["InputError", "NonFiniteError", "first_line", "told", "told_in"]


class InputError(ValueError):
    """Data, a loss or a configuration that cannot work, found before or while it is used.

    The launcher prints its message as one line and ends with exit code 2.
    """


class NonFiniteError(FloatingPointError):
    """An output, a loss or a gradient that is not finite, found where it arose.

    Its message says where, and a traceback says no more: the launcher prints it as one line and
    ends with exit code 1.
    """


_words: list[Callable[[str], str]] = [str]


@contextmanager
def told_in(words: Callable[[str], str]) -> Iterator[None]:
    """Within a block ranks report our own errors in other words, such as a configuration's keys
    for Python's arguments; on whatever thread.
    """
    _words.append(words)
    try:
        yield
    finally:
        _words.pop()


def told(error: Exception) -> str:
    """What it says, in the words of whoever drives the pipeline; what it quotes of a user's error
    stays as it is.
    """
    words, text, cause = _words[-1], str(error), error.__cause__
    theirs = first_line(cause) if cause is not None and not _is_ours(cause) else ""
    before, theirs, after = text.partition(theirs) if theirs else (text, "", "")
    return words(before) + theirs + words(after)


def _is_ours(error: BaseException) -> bool:
    """Whether it was raised in this package."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).is_relative_to(Path(__file__).parent)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its class where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
