"""Entries of a contest as rows, files and tables, against numbers worked out by hand."""

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from headrace.launch.profiling.contest import Entry, best
from headrace.launch.profiling.prediction import Curve
from headrace.launch.profiling.systems.system import Facts
from headrace.launch.profiling.table import (
    comparison_table,
    curves_table,
    rows_of,
    stages_table,
    write_csv,
    write_json,
)

ONE = Entry("one-device", None, rates=[100.0, 50.0, 80.0])
CEILING = Entry("ceiling", None, rates=[200.0, 100.0, 160.0])
STREAM = Entry(
    "stream:stash",
    None,
    rates=[150.0, 90.0, 120.0],
    facts=[Facts(0.96, 0.03, 1.0, 1, 2, 2), Facts(0.904, math.nan, 0.0, 0, 1)],
    memory=[3.0 * 2**20, 512.0],
)
FLUSH = Entry("1f1b", 4, rates=[60.0], facts=[Facts(), Facts()], memory=[math.nan, 1.0])
REFUSED = Entry("gpipe", 64, refused="64 micro-batches of 32 samples")


def rows(*entries: Entry, **predicted: float) -> list[dict[str, Any]]:
    return rows_of(entries, {(name, None): rate for name, rate in predicted.items()})


def drawn(table: Table) -> str:
    """The table as a terminal of 100 columns shows it, without spaces at the ends of lines."""
    out = Console(file=io.StringIO(), width=100, color_system=None)
    out.print(table)
    assert isinstance(out.file, io.StringIO)
    return "\n".join(line.rstrip() for line in out.file.getvalue().splitlines())


# Entries --------------------------------------------------------------------------------------


def test_an_entry_is_as_fast_as_its_median() -> None:
    assert STREAM.rate == 120.0
    assert Entry("a", 1, rates=[1.0, 4.0]).rate == 2.5
    assert math.isnan(REFUSED.rate)


def test_ratios_are_of_the_same_round() -> None:
    """Of 10, 1 and 0.2; the ratio of the medians would be 2."""
    crossed = Entry("a", None, rates=[100.0, 100.0, 10.0])
    assert crossed.ratio(Entry("b", None, rates=[10.0, 100.0, 50.0])) == 1.0
    assert all(math.isnan(STREAM.ratio(other)) for other in (None, REFUSED))
    assert math.isnan(REFUSED.ratio(ONE))


def test_rounds_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        STREAM.ratio(FLUSH)


def test_the_best_of_each_system_in_their_order() -> None:
    slow, fast = Entry("1f1b", 2, rates=[50.0, 40.0]), Entry("1f1b", 8, rates=[55.0, 65.0])
    entries = [REFUSED, slow, STREAM, FLUSH, fast, Entry("1f1b", 64, refused="too many")]
    assert best(entries) == [REFUSED, FLUSH, STREAM], "two of one rate: the first"
    assert best([slow, fast]) == [fast] and best([fast, slow]) == [fast]


def test_a_refused_entry_stays_only_if_the_system_never_ran() -> None:
    ran, again = Entry("gpipe", 2, rates=[1.0]), Entry("gpipe", 99, refused="again")
    assert best([REFUSED, ran]) == [ran] and best([ran, REFUSED]) == [ran]
    assert best([REFUSED, again]) == [REFUSED]
    assert best([]) == []


# Rows -----------------------------------------------------------------------------------------


def test_a_row_has_plain_values_and_null_for_what_is_not_known() -> None:
    assert rows_of([STREAM, ONE, CEILING], {("stream:stash", None): 130.0})[0] == {
        "system": "stream:stash",
        "micro_batches": None,
        "samples_per_second": 120.0,
        "slowest": 90.0,
        "fastest": 150.0,
        "rounds": 3,
        "over_one_device": 1.5,
        "of_ceiling": 0.75,
        "predicted_samples_per_second": 130.0,
        "busy": [0.96, 0.904],
        "bubble": [0.03, None],
        "staleness": [1.0, 0.0],
        "peak_memory_bytes": [3.0 * 2**20, 512.0],
        "saved_graphs": [2, 1],
        "weight_copies": [2, None],
        "not_run": None,
    }


def test_a_row_of_what_did_not_run_says_why() -> None:
    assert rows(ONE, REFUSED)[1] == {
        "system": "gpipe",
        "micro_batches": 64,
        "samples_per_second": None,
        "slowest": None,
        "fastest": None,
        "rounds": 0,
        "over_one_device": None,
        "of_ceiling": None,
        "predicted_samples_per_second": None,
        "busy": [],
        "bubble": [],
        "staleness": [],
        "peak_memory_bytes": [],
        "saved_graphs": [],
        "weight_copies": [],
        "not_run": "64 micro-batches of 32 samples",
    }


def test_the_ratios_of_a_row_are_of_the_same_round() -> None:
    """10, 1 and 0.2 of one device; the ratio of the medians would be 2."""
    one = Entry("one-device", None, rates=[10.0, 100.0, 50.0])
    ceiling = Entry("ceiling", None, rates=[20.0, 200.0, 100.0])
    row = rows(one, ceiling, Entry("ddp", None, rates=[100.0, 100.0, 10.0]))[2]
    assert (row["over_one_device"], row["of_ceiling"]) == (1.0, 0.5)


def test_a_prediction_is_that_of_the_number_of_micro_batches() -> None:
    predicted = {("1f1b", 4): 61.0, ("1f1b", 2): 51.0, ("gpipe", 64): math.nan}
    got = [row["predicted_samples_per_second"] for row in rows_of([FLUSH, REFUSED], predicted)]
    assert got == [61.0, None]


# Files ----------------------------------------------------------------------------------------


def test_json_is_read_back(tmp_path: Path) -> None:
    written = rows(ONE, STREAM, REFUSED)
    write_json(tmp_path / "t.json", written, {"name": "digits", "emulated": False})
    text = (tmp_path / "t.json").read_text()
    assert json.loads(text) == {"name": "digits", "emulated": False, "rows": written}
    assert "NaN" not in text and text.endswith("}\n")


def test_csv_is_read_back(tmp_path: Path) -> None:
    write_csv(tmp_path / "t.csv", rows(STREAM, ONE, REFUSED), emulated=True)
    with (tmp_path / "t.csv").open(newline="") as file:
        stream, one, refused = csv.DictReader(file)
    assert stream == {
        "system": "stream:stash",
        "micro_batches": "",
        "samples_per_second": "120.0",
        "slowest": "90.0",
        "fastest": "150.0",
        "rounds": "3",
        "over_one_device": "1.5",
        "of_ceiling": "",
        "predicted_samples_per_second": "",
        "busy": "0.96;0.904",
        "bubble": "0.03;",
        "staleness": "1.0;0.0",
        "peak_memory_bytes": "3145728.0;512.0",
        "saved_graphs": "2;1",
        "weight_copies": "2;",
        "not_run": "",
        "emulated": "True",
    }
    assert (one["system"], one["busy"]) == ("one-device", "")
    assert (refused["samples_per_second"], refused["rounds"]) == ("", "0")
    assert (refused["micro_batches"], refused["not_run"]) == (
        "64",
        "64 micro-batches of 32 samples",
    )


# Tables ---------------------------------------------------------------------------------------


def test_the_comparison_is_drawn_without_what_did_not_run() -> None:
    fast = Entry("ddp", None, rates=[12345.6, 12345.6, 12345.6])
    slow = Entry("gpipe", 8, rates=[9.96, 9.96, 9.96])
    assert (
        drawn(comparison_table(rows(ONE, STREAM, REFUSED, slow, fast)))
        == """\
system        m  samples/s  spread  x one device  of ceiling
────────────────────────────────────────────────────────────
one-device    -       80.0  ±31.2%          1.00           -
stream:stash  -        120  ±25.0%          1.50           -
gpipe         8       10.0   ±0.0%          0.12           -
ddp           -     12,346   ±0.0%        154.32           -"""
    )


def test_predictions_have_a_column_if_there_are_any() -> None:
    single = Entry("1f1b", 4, rates=[80.0])
    one, ceiling = Entry("one-device", None, rates=[64.0]), Entry("ceiling", None, rates=[128.0])
    predicted = {("1f1b", 4): 88.0, ("ceiling", None): 1152.0}
    assert (
        drawn(comparison_table(rows_of([one, single, ceiling], predicted)))
        == """\
system      m  samples/s  spread  x one device  of ceiling        predicted
───────────────────────────────────────────────────────────────────────────
one-device  -       64.0       -          1.00       0.500                -
1f1b        4       80.0       -          1.25       0.625      88 (+10.0%)
ceiling     -        128       -          2.00       1.000  1,152 (+800.0%)"""
    )


def test_each_stage_is_shown() -> None:
    assert (
        drawn(stages_table(rows(STREAM, REFUSED, FLUSH)))
        == """\
per stage     busy %  bubble %  peak MiB  staleness  graphs  copies
───────────────────────────────────────────────────────────────────
stream:stash   96 90       3 -   3.0 0.0        1 0     2 1     2 -
1f1b               -         -     - 0.0          -       -       -"""
    )


@pytest.mark.parametrize(("count", "shown"), [(4, "3 2 1 0"), (5, "4 3 … 0"), (64, "63 62 … 0")])
def test_more_than_four_stages_are_elided(count: int, shown: str) -> None:
    facts = [Facts(staleness=float(count - 1 - j)) for j in range(count)]
    entry = Entry("stream:stash", None, rates=[1.0], facts=facts)
    assert drawn(stages_table(rows(entry))).splitlines()[-1].endswith(f" {shown}       -       -")


def test_curves_are_drawn_a_row_each() -> None:
    curves = [Curve("stream", (2.0, 64.0), (1.987, 63.5)), Curve("1F1B", (2.0, 64.0), (1.0, 123.4))]
    assert (
        drawn(curves_table(curves))
        == """\
stages     2    64
──────────────────
stream  1.99  63.5
1F1B       1   123"""
    )
