"""Outcomes as rows: means and spreads over seeds, for people, for JSON and for CSV."""

import csv
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..config import to_yaml
from ..run_files import for_json
from .plan import Case
from .run import Outcome

__all__ = [
    "Row",
    "best",
    "loss_title",
    "results_table",
    "smooth",
    "spread",
    "updates_until",
    "write_csv",
    "write_json",
]


@dataclass(frozen=True)
class Row:
    """A case, and what became of its runs, one a seed."""

    case: Case
    outcomes: tuple[Outcome, ...]

    @property
    def finished(self) -> list[Outcome]:
        """Those that did not diverge."""
        return [outcome for outcome in self.outcomes if outcome.diverged is None]

    @property
    def lost(self) -> int:
        """How many diverged."""
        return len(self.outcomes) - len(self.finished)

    @property
    def tested(self) -> bool:
        """Whether its scores are of test data, not the last epoch's training loss."""
        return self.case.configs[0].data.test is not None

    @property
    def loss(self) -> float:
        """The mean over all seeds; infinite if one diverged."""
        if self.lost:
            return float("inf")
        return statistics.mean(outcome.scores["loss"] for outcome in self.outcomes)

    @property
    def seconds(self) -> float:
        """The median over the seeds; NaN if all diverged."""
        times = [outcome.seconds for outcome in self.finished]
        return statistics.median(times) if times else float("nan")


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and the standard deviation where there are two values at least."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def smooth(curve: Sequence[tuple[int, float]], points: int) -> list[tuple[float, float]]:
    """Means over runs of neighbouring points, so that at most `points` are left."""
    size = max(1, math.ceil(len(curve) / points))
    pieces = [curve[k : k + size] for k in range(0, len(curve), size)]
    return [
        (statistics.mean(x for x, _ in piece), statistics.mean(y for _, y in piece))
        for piece in pieces
    ]


def best(rows: Sequence[Row], column: int) -> dict[str, Row]:
    """Each variant's row of the lowest loss, under one number of stages.

    Rows of fewer seeds are those that were not chosen on the first one (`--tune`): what was chosen
    stays so, though it may diverge on a later one.
    """
    found: dict[str, Row] = {}
    for row in rows:
        if column in row.case.columns:
            name = row.case.variant
            found[name] = min(found.get(name, row), row, key=_rank)
    return found


def _rank(row: Row) -> tuple[int, float]:
    return -len(row.outcomes), row.loss


def _reference(rows: Sequence[Row], row: Row) -> Row | None:
    """The same on one stage, to compare the time with."""
    for each in rows:
        case = each.case
        same = case.rate == row.case.rate and set(case.columns) & set(row.case.columns)
        if case.stages == 1 and same:
            return each
    return None


def updates_until(outcome: Outcome, loss: float) -> float:
    """Updates after which the training loss, a mean over a fiftieth of the run, is this low; NaN if
    it never is.
    """
    curve = smooth(outcome.curve, points=50)
    samples = next((x for x, y in curve if y <= loss), math.nan)
    return samples / outcome.curve[-1][0] * outcome.updates if outcome.curve else math.nan


def results_table(rows: Sequence[Row], until: float | None = None) -> Table:
    """One line a row; of several learning rates, each variant's best has a star.

    Args:
        until: a training loss, for a column of the updates that it took; None for none.
    """
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    rates = any(row.case.rate is not None for row in rows)
    names = list(dict.fromkeys(name for row in rows for o in row.outcomes for name in o.scores))
    table.add_column("stages", justify="right")
    table.add_column("variant", overflow="fold")
    if rates:
        table.add_column("rate", justify="right")
    for name in names or ["loss"]:
        table.add_column(name if name != "loss" else loss_title(rows), justify="right")
    for title in ("staleness", "updates", *([f"to {until:g}"] if until else []), "time"):
        table.add_column(title, justify="right")
    columns = sorted({column for row in rows for column in row.case.columns})
    for column in columns:
        champions = best(rows, column)
        for row in (row for row in rows if column == row.case.columns[0]):
            # Where the depth follows the stages, one stage is there for each of them.
            alone = row.case.stages != column and row.case.columns == (column,) != tuple(columns)
            depth = f" (depth of {column})" if alone else ""
            cells = [str(row.case.stages), row.case.variant + depth]
            if rates:
                star = "* " if row is champions[row.case.variant] else ""
                cells.append(f"{star}{row.case.rate:g}" if row.case.rate is not None else "")
            cells += _scores(row, names or ["loss"])
            table.add_row(*cells, *_figures(rows, row, until))
        table.add_section()
    return table


def loss_title(rows: Sequence[Row]) -> str:
    """Of what data the losses at the end are."""
    tested = {row.tested for row in rows}
    if len(tested) > 1:
        return "test or training loss"
    return "test loss" if tested == {True} else "training loss"


def _scores(row: Row, names: Sequence[str]) -> list[str]:
    if not row.finished:
        return ["diverged", *[""] * (len(names) - 1)]
    cells = []
    for name in names:
        if name not in row.finished[0].scores:
            cells.append("")
            continue
        mean, deviation = spread([outcome.scores[name] for outcome in row.finished])
        cells.append(f"{mean:.4f}" + (f" ± {deviation:.4f}" if deviation is not None else ""))
    if row.lost:
        cells[0] += f", {row.lost} of {len(row.outcomes)} diverged"
    return cells


def _figures(rows: Sequence[Row], row: Row, until: float | None) -> list[str]:
    if not row.finished:
        made = f"{max(outcome.updates for outcome in row.outcomes):,}"
        return ["", made, *([""] if until else []), ""]
    first = row.finished[0]
    reference = _reference(rows, row)
    time = f"{row.seconds:.1f} s"
    if reference is not None and reference is not row and reference.seconds:
        time = f"{row.seconds / reference.seconds:.2f}x"
    cells = [f"{first.staleness[0]:.2f}", f"{first.updates:,}"]
    if until:
        took = statistics.mean(updates_until(outcome, until) for outcome in row.finished)
        cells.append("never" if math.isnan(took) else f"{took:,.0f}")
    return [*cells, time]


def write_json(path: Path, rows: Sequence[Row], about: Mapping[str, Any]) -> None:
    """Write everything: each run's configuration, figures and curve."""
    runs = [
        {
            "variant": row.case.variant,
            "stages": row.case.stages,
            "rate": row.case.rate,
            "seed": config.seed,
            **asdict(outcome),
            "config": to_yaml(config),
        }
        for row in rows
        for config, outcome in zip(row.case.configs, row.outcomes, strict=True)
    ]
    text = json.dumps(for_json({**about, "runs": runs}), indent=1)
    path.write_text(text + "\n", encoding="utf-8")


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write a line a run."""
    names = list(dict.fromkeys(name for row in rows for o in row.outcomes for name in o.scores))
    head = ["stages", "variant", "rate", "seed", *names, "diverged", "staleness", "updates"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*head, "seconds"])
        for row in rows:
            for config, outcome in zip(row.case.configs, row.outcomes, strict=True):
                case = row.case
                writer.writerow(
                    [
                        *(case.stages, case.variant, case.rate, config.seed),
                        *(outcome.scores.get(name) for name in names),
                        outcome.diverged is not None,
                        outcome.staleness[0] if outcome.staleness else None,
                        outcome.updates,
                        f"{outcome.seconds:.3f}",
                    ]
                )
