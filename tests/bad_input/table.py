"""docs/bad-input.md: a few sentences, and the rows as a table."""

from pathlib import Path

from .rows import ROWS

__all__ = ["PAGE", "page"]

PAGE = Path(__file__).parents[2] / "docs" / "bad-input.md"

INTRODUCTION = """\
# What is said of bad input

What cannot work is refused at once, in one line on standard error that begins with `headrace: `
and names the thing, its value and what to write; the command ends with exit code 2, once for all
ranks. Python raises a built-in error instead (`InputError`, where data, a loss or an optimizer
turned out not to work, is a `ValueError`). What is not finite ends a run in one line, too, and with
1, as a failure does (README, "When something goes wrong").

In a row a command's name is what follows `python -m headrace.launch.`; all others are Python's. `…`
stands for what is left out here.

Every row is a test: `tests/bad_input/rows.py` holds them, and `python -m tests.bad_input.write`
writes this page.

| what | what is said | exit code, or type |
|---|---|---|
"""


def page() -> str:
    """The page as it has to be."""
    rows = (" | ".join(cell.replace("|", "\\|") for cell in row.cells) for row in ROWS)
    return INTRODUCTION + "".join(f"| {row} |\n" for row in rows)
