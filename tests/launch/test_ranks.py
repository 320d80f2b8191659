"""What a process does when torchrun, whose store it needs, has ended, or when it is to end."""

import signal
import subprocess
import sys
from datetime import timedelta

import pytest

from headrace.launch.ranks import recall, say_nothing_of_a_parent_that_ended, tell

from ..distributed.ranks import free_port


def test_a_store_that_is_gone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torch would try to reach it for five minutes, and the rank would be left behind."""
    monkeypatch.setattr("headrace.pipeline.attempt.REACH", timedelta(seconds=1))
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    for call in (lambda: recall("folder"), lambda: tell("folder", "x")):
        with pytest.raises(SystemExit) as ended:
            call()
        assert ended.value.code == 1
        (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("headrace: ")]
        assert line.startswith("headrace: the job's store is gone: torchrun has ended")


STUCK = """
import signal, threading
from headrace.launch.ranks import stop
signal.signal({number}, stop)
try:
    signal.raise_signal({number})
finally:
    threading.Event().wait()
"""


@pytest.mark.parametrize("number", (signal.SIGINT, signal.SIGTERM), ids=lambda n: n.name)
def test_a_signal_ends_what_waits_for_ever(number: signal.Signals) -> None:
    """Once it came while TensorBoard's writer was handed an event: its thread slept through that,
    and closing it waited for the thread.
    """
    done = subprocess.run(
        [sys.executable, "-c", STUCK.format(number=int(number))],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 128 + number
    assert done.stderr == f"headrace: stopped by {number.name}\n"


@pytest.mark.parametrize("error", (ConnectionResetError, EOFError, BrokenPipeError))
def test_a_loaders_worker_says_nothing_of_its_parents_end(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One time in five a parent that a signal ended was just being handed a mini-batch."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    say_nothing_of_a_parent_that_ended(0)
    sys.excepthook(error, error("gone"), None)
    assert capsys.readouterr().err == ""
    sys.excepthook(ValueError, ValueError("of the dataset's own thread"), None)
    assert "ValueError: of the dataset's own thread" in capsys.readouterr().err
