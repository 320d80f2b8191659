"""Each row of docs/bad-input.md is given for real, and what it says must be said."""

import signal
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from .provoke import COMMANDS, provoke
from .row import Row
from .rows import ROWS
from .table import PAGE, page

pytestmark = pytest.mark.timeout(60)

NAMES = [f"{row.command or 'Python'}: {row.what}" for row in ROWS]


@pytest.fixture(autouse=True)
def undone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Imports, paths and signals that a command leaves behind."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for name in [name for name in sys.modules if name.startswith("my_")]:
        del sys.modules[name]


@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_what_is_said(row: Row, tmp_path: Path) -> None:
    code, said = provoke(row, tmp_path)
    assert row.pattern.fullmatch(said), f"{row.message}\n  was wanted, and this was said:\n{said}"
    assert code == row.code


def test_the_page_is_what_the_rows_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "write it: python -m tests.bad_input.write"


def test_the_rows_cover_every_command_and_are_told_apart() -> None:
    assert len(ROWS) >= 40
    assert {row.command for row in ROWS} == {*COMMANDS, ""}
    assert max(Counter(NAMES).values()) == 1
    for row in ROWS:
        assert len(row.message.replace("…", "")) > 10, "a pattern that anything would fit"
        assert bool(row.command) == isinstance(row.code, int) == (row.act is None)


def test_a_row_that_is_not_so_fails(tmp_path: Path) -> None:
    """Guards the tests above: they must be able to fail."""
    right = next(row for row in ROWS if row.arguments == "--epochs 0")
    code, said = provoke(right, tmp_path)
    assert (code, said) == (2, "epochs must be at least 1, not 0")
    assert not Row("", "epochs must be at least 1", 2).pattern.fullmatch(said)
    assert Row("", "epochs … not 0", 2).pattern.fullmatch(said)
    with pytest.raises(AssertionError, match="the command did not refuse"):
        provoke(Row("a sound run", "", command="train"), tmp_path)
