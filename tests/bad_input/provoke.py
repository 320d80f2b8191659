"""Do what a row says, and tell what came of it."""

import contextlib
import io
import os
import shlex
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from unittest import mock

from torch.distributed import TCPStore

from headrace.launch import plan, serve, sharpness, simulate, throughput, train

from .row import Row
from .rows import CONFIG

__all__ = ["provoke"]

COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": train.main,
    "plan": plan.main,
    "serve": serve.main,
    "sharpness": sharpness.main,
    "simulate": simulate.main,
    "throughput": throughput.main,
}


def provoke(row: Row, folder: Path) -> tuple[int | type[Exception], str]:
    """The exit code, or in Python the exception's type; and the one line that was said."""
    (folder / "tiny.yaml").write_text(CONFIG)
    for name, text in row.files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text or "")
    with contextlib.chdir(folder), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if row.act is not None:
            return _python(row.act)
        with _started_by_torchrun(row.ranks):
            return _command(row)


def _python(act: Callable[[], object]) -> tuple[type[Exception], str]:
    try:
        act()
    except Exception as error:
        return type(error), str(error)
    raise AssertionError("nothing was raised")


def _command(row: Row) -> tuple[int, str]:
    given = ["--config", "tiny.yaml"] if row.config else []
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            COMMANDS[row.command]([*given, *shlex.split(row.arguments)])
    except SystemExit as ended:
        lines = err.getvalue().splitlines()
        assert len(lines) == 1 and lines[0].startswith("headrace: "), err.getvalue()
        return int(str(ended.code)), lines[0].removeprefix("headrace: ")
    except Exception as error:  # Python prints a traceback, and ends with 1
        return 1, f"{type(error).__name__}: {error}"
    raise AssertionError("the command did not refuse")


@contextlib.contextmanager
def _started_by_torchrun(ranks: int) -> Iterator[None]:
    """As the first of so many processes: with torchrun's store, in which one speaks for all."""
    if not ranks:
        yield
        return
    store = TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=10)
    )
    environment = {
        "TORCHELASTIC_RUN_ID": "test",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "False",
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
    }
    with mock.patch.dict(os.environ, environment):
        yield
