"""How far each variant is from the first one: paired by seed, with a 95% interval of the mean."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..data.checks import import_extra
from .results import Row, best

__all__ = [
    "LEVEL",
    "Difference",
    "difference",
    "differences",
    "differences_table",
    "import_special",
]

LEVEL = 0.95


@dataclass(frozen=True)
class Difference:
    """A variant's score less the first variant's, at the best rate of each.

    Args:
        stages: under which both are compared.
        score: its name.
        mean: over the seeds.
        half: of the interval's width.
    """

    stages: int
    variant: str
    less: str
    score: str
    mean: float
    half: float


def difference(scores: Sequence[float], reference: Sequence[float]) -> tuple[float, float]:
    """The mean of the differences, and half the width of its 95% interval.

    The interval is Student's, for n >= 2 differences that are normally distributed.

    Raises:
        ModuleNotFoundError: scipy is not installed.
    """
    each = [a - b for a, b in zip(scores, reference, strict=True)]
    n = len(each)
    width = float(import_special().stdtrit(n - 1, (1 + LEVEL) / 2))
    return statistics.mean(each), width * statistics.stdev(each) / math.sqrt(n)


def import_special() -> Any:
    """scipy's special functions.

    Raises:
        ModuleNotFoundError: scipy is not installed.
    """
    return import_extra("scipy.special", extra="profile", user="an interval over several seeds")


def differences(rows: Sequence[Row]) -> list[Difference]:
    """Of every variant of which two seeds or more ended, and none diverged, as of the first one."""
    found = []
    for column in sorted({column for row in rows for column in row.case.columns}):
        chosen = [row for row in best(rows, column).values() if not math.isinf(row.loss)]
        first = next((row for row in rows if column in row.case.columns), None)
        if first is None or not chosen or chosen[0].case.variant != first.case.variant:
            continue
        reference, *others = chosen
        seeds = len(reference.outcomes)
        for row in others:
            if len(row.outcomes) != seeds or seeds < 2:
                continue
            shared = (
                name for name in reference.outcomes[0].scores if name in row.outcomes[0].scores
            )
            for name in shared:
                a, b = ([o.scores[name] for o in each.outcomes] for each in (row, reference))
                variants = row.case.variant, reference.case.variant
                found.append(Difference(column, *variants, name, *difference(a, b)))
    return found


def differences_table(found: Sequence[Difference]) -> Table:
    """One line a variant, a column a score."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    names = list(dict.fromkeys(each.score for each in found))
    table.add_column("stages", justify="right")
    table.add_column(f"less {found[0].less}", overflow="fold")
    for name in names:
        table.add_column(f"{name}, {LEVEL:.0%} interval", justify="right")
    for stages, variant in dict.fromkeys((each.stages, each.variant) for each in found):
        own = {e.score: e for e in found if (e.stages, e.variant) == (stages, variant)}
        cells = [
            f"{e.mean:+.4f} ({e.mean - e.half:+.4f} to {e.mean + e.half:+.4f})"
            if (e := own.get(name))
            else ""
            for name in names
        ]
        table.add_row(str(stages), variant, *cells)
    return table
