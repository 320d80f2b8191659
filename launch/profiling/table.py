"""The comparison as a table for people, as JSON and as CSV."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from headrace.pipeline import Timeline
from headrace.pipeline.timeline import Span, Work

from ..run_files import for_json
from .contest import Entry
from .prediction import Curve

__all__ = [
    "comparison_table",
    "curves_table",
    "rows_of",
    "stages_table",
    "time_table",
    "write_csv",
    "write_json",
]


def rows_of(entries: Sequence[Entry], predicted: Mapping[Any, float]) -> list[dict[str, Any]]:
    """Each entry as plain values; null is what is not known.

    Args:
        predicted: samples a second, by (system, micro-batches).
    """
    one = next((e for e in entries if e.system == "one-device"), None)
    ceiling = next((e for e in entries if e.system == "ceiling"), None)
    rows = []
    for entry in entries:
        rates = entry.rates
        row = {
            "system": entry.system,
            "micro_batches": entry.micro_batches,
            "samples_per_second": entry.rate,
            "slowest": min(rates, default=math.nan),
            "fastest": max(rates, default=math.nan),
            "rounds": len(rates),
            "over_one_device": entry.ratio(one),
            "of_ceiling": entry.ratio(ceiling),
            "predicted_samples_per_second": predicted.get((entry.system, entry.micro_batches)),
            "busy": [fact.busy for fact in entry.facts],
            "bubble": [fact.bubble for fact in entry.facts],
            "staleness": [fact.staleness for fact in entry.facts],
            "peak_memory_bytes": entry.memory,
            "saved_graphs": [fact.graphs for fact in entry.facts],
            "weight_copies": [fact.copies for fact in entry.facts],
            "not_run": entry.refused,
        }
        rows.append(for_json(row))
    return rows


def write_json(path: Path, rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> None:
    """Write the rows, and what they are about."""
    path.write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n", encoding="utf-8")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], emulated: bool) -> None:
    """Write the rows; what each stage has is separated by semicolons."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0], "emulated"])
        writer.writeheader()
        for row in rows:
            writer.writerow({n: _cell(v) for n, v in row.items()} | {"emulated": emulated})


def _cell(value: Any) -> Any:
    return (
        ";".join("" if v is None else str(v) for v in value) if isinstance(value, list) else value
    )


# For people ----------------------------------------------------------------------------------


def comparison_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A row a system: how fast, against one device and the ceiling."""
    shows_predicted = any(row["predicted_samples_per_second"] for row in rows)
    headers = ["system", "m", "samples/s", "spread", "x one device", "of ceiling"]
    table = _table(*headers, *(["predicted"] if shows_predicted else []))
    for row in rows:
        if row["samples_per_second"] is None:
            continue
        rate, half = row["samples_per_second"], (row["fastest"] - row["slowest"]) / 2
        cells = [
            row["system"],
            _text(row["micro_batches"], "d"),
            f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}",
            f"±{half / rate:.1%}" if row["rounds"] > 1 else "-",
            _text(row["over_one_device"], ".2f"),
            _text(row["of_ceiling"], ".3f"),
        ]
        if shows_predicted:
            guess = row["predicted_samples_per_second"]
            cells.append("-" if guess is None else f"{guess:,.0f} ({guess / rate - 1:+.1%})")
        table.add_row(*cells)
    return table


def stages_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A row a system: what each stage did, in per cent of the time, and what it took."""
    headers = ("busy %", "bubble %", "peak MiB", "staleness", "graphs", "copies")
    table = _table("per stage", *headers)
    for row in rows:
        if row["samples_per_second"] is None:
            continue
        table.add_row(
            row["system"],
            _each(row["busy"], lambda v: f"{v:.0%}".rstrip("%")),
            _each(row["bubble"], lambda v: f"{v:.0%}".rstrip("%")),
            _each(row["peak_memory_bytes"], lambda v: f"{v / 2**20:.1f}"),
            *(_each(row[n], "{:g}".format) for n in ("staleness", "saved_graphs", "weight_copies")),
        )
    return table


def time_table(timeline: Timeline, batches: float) -> Table:
    """A row a stage: what a mini-batch's time goes to there, in milliseconds.

    Args:
        batches: how many mini-batches the timeline has.
    """
    kinds = {
        "forward": (Work.FORWARD,),
        "backward": (Work.BACKWARD,),
        "update": (Work.UPDATE,),
        **({"learning": (Work.LEARN,)} if any(map(_learns, timeline.stages)) else {}),
        "sending": (Work.SEND_DOWN, Work.SEND_UP),
        "waiting": (Work.WAIT,),
        "data": (Work.DATA,),
    }
    table = _table("ms a mini-batch", *kinds, "engine", "in all")
    period = 1e3 * timeline.seconds / batches
    for stage in range(len(timeline.stages)):
        parts = [timeline.share(stage, *works) * period for works in kinds.values()]
        engine = 1e3 * sum(end - start for start, end in timeline.idle(stage)) / batches
        table.add_row(f"stage {stage}", *(f"{ms:.3f}" for ms in (*parts, engine, period)))
    return table


def _learns(spans: Sequence[Span]) -> bool:
    return any(span.work is Work.LEARN for span in spans)


def curves_table(curves: Sequence[Curve]) -> Table:
    """A row a curve, a column for each x."""
    table = _table("stages", *(f"{x:.0f}" for x in curves[0].x))
    for curve in curves:
        table.add_row(curve.name, *(f"{y:.3g}" if y < 100 else f"{y:.0f}" for y in curve.y))
    return table


def _each(values: Sequence[Any], write: Any) -> str:
    """Every stage's value; of many the first two and the last."""
    if all(value is None for value in values):
        return "-"
    shown = ["-" if value is None else write(value) for value in values]
    return " ".join(shown if len(shown) <= 4 else [*shown[:2], "…", shown[-1]])


def _text(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)


def _table(*headers: str) -> Table:
    table = Table(
        box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, header_style="bold"
    )
    for header in headers:
        table.add_column(header, justify="left" if header == headers[0] else "right", no_wrap=True)
    return table
