"""The one error of our own: input that can only be refused."""

__all__ = ["InputError", "first_line"]


class InputError(ValueError):
    """Data, a loss or a configuration that cannot work, found before or while it is used.

    The launcher prints its message as one line and ends with exit code 2.
    """


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its class where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
