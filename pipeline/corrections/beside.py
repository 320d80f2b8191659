"""Which corrections can be beside each other."""

from collections.abc import Sequence

from ..errors import InputError
from .correction import Correction

__all__ = ["check_beside"]

_ONE_OF = (
    ("predict the weights", "predicts"),
    ("stand in for the weights", "stands_in"),
    ("change how momentum steps, Nesterov's way or another", "takes_momentum"),
)


def check_beside(corrections: Sequence[Correction]) -> None:
    """Refuse to do the same twice, and what undoes each other.

    Raises:
        InputError: with who chose the correction, where it was not written.
    """
    for kind in map(type, corrections):
        _one_of([each for each in corrections if type(each) is kind], "are the same")
    for word, many in _ONE_OF:
        _one_of([each for each in corrections if getattr(each, many)], f"both {word}")
    turning = [_named(each) for each in corrections if each.turns_moments]
    reading = [_named(each) for each in corrections if each.reads_moments]
    if turning and reading:
        raise InputError(
            f"corrections= has {reading[0]}, which goes by the optimizer's moments, and "
            f"{turning[0]}, which keeps them in another basis than the weights: leave one of them "
            "out, or write weight_prediction with form='last_update'"
        )


def _one_of(found: Sequence[Correction], what: str) -> None:
    if len(found) > 1:
        names = " and ".join(map(_named, found))
        raise InputError(f"corrections= has {names}, which {what}: leave out all but one")


def _named(correction: Correction) -> str:
    chooser = correction.chosen_by
    return f"{correction.name} (chosen by {chooser})" if chooser else correction.name
