"""How far each variant is from the first one: paired by seed, with a 95% interval of the mean."""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..data.checks import import_extra
from ..display import count
from .results import Row, best

__all__ = [
    "LEVEL",
    "Difference",
    "difference",
    "differences",
    "differences_table",
    "import_special",
    "left_out",
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
    """Of every variant that can be compared with the first one."""
    found = []
    for column, reference, others in _compared(rows):
        for row in others:
            if _why_not(row, reference):
                continue
            shared = [s for s in reference.outcomes[0].scores if s in row.outcomes[0].scores]
            for name in shared:
                a, b = ([o.scores[name] for o in each.outcomes] for each in (row, reference))
                variants = row.case.variant, reference.case.variant
                found.append(Difference(column, *variants, name, *difference(a, b)))
    return found


def left_out(rows: Sequence[Row]) -> list[str]:
    """A line for each variant that cannot be compared with the first one: which, and why."""
    lines = []
    for column, reference, others in _compared(rows):
        stages = count(column, "stage")
        if reference.lost:
            lines.append(f"{stages}, all: {reference.case.variant} {_lost(reference)}")
            continue
        why = {row.case.variant: _why_not(row, reference) for row in others}
        lines += [f"{stages}, {variant}: {words}" for variant, words in why.items() if words]
    return lines


def _compared(rows: Sequence[Row]) -> Iterator[tuple[int, Row, list[Row]]]:
    """For each number of stages the first variant and the others, at the best rate of each."""
    if all(len(row.outcomes) < 2 for row in rows):
        return  # one seed has no spread
    for column in sorted({column for row in rows for column in row.case.columns}):
        reference, *others = best(rows, column).values()
        if others:
            yield column, reference, others


def _why_not(row: Row, reference: Row) -> str:
    """Why the two cannot be compared; empty if they can."""
    if reference.lost or row.lost:
        return _lost(row if row.lost else reference)
    own, seeds = ([config.seed for config in each.case.configs] for each in (row, reference))
    than = reference.case.variant
    if own != seeds:
        return f"its seeds are {_listed(own)}, and those of {than} {_listed(seeds)}"
    if row.tested != reference.tested:
        kinds = ("training", "test")
        mine, other = (kinds[each.tested] for each in (row, reference))
        return f"its loss is of {mine} data, and that of {than} of {other} data"
    return ""


def _lost(row: Row) -> str:
    return f"diverged with {row.lost} of {count(len(row.outcomes), 'seed')}"


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))


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
