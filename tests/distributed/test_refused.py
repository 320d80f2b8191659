"""What cannot work is refused on all ranks: one line, exit code 2, before anything hangs."""

import re
import socket

import pytest

from .ranks import TRANSPORTS, Launcher, Outcome
from .refused import REFUSED, behind_a_firewall, refuse
from .scripts import end_without_close

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def outcomes(launcher: Launcher) -> dict[str, Outcome]:
    return launcher.run_many(refuse, 2, {name: name for name in REFUSED})


@pytest.mark.parametrize("name", REFUSED)
def test_refused(outcomes: dict[str, Outcome], name: str) -> None:
    outcome = outcomes[name]
    outcome.expect(2, 2)
    assert re.match(f"headrace: {REFUSED[name][1]}", outcome.report), outcome.report
    assert outcome.tracebacks == 0, f"{outcome}"
    assert outcome.seconds_from_first_to_last() < 20


def test_port_in_use(launcher: Launcher) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        taken = {"MASTER_PORT": port, "WORLD_SIZE": "2"}
        outcome = launcher.run(end_without_close, 1, None, agent=False, environment=taken)
    outcome.expect(2)
    assert re.match(
        f"headrace: the ranks cannot meet at 127.0.0.1:{port}: .*in use", outcome.report
    )
    assert outcome.tracebacks == 0


def test_a_port_that_cannot_be_reached(launcher: Launcher) -> None:
    outcome = launcher.run(behind_a_firewall, 2, environment=TRANSPORTS["hosts apart"])
    outcome.expect(2, 2)
    assert re.match(
        r"headrace: rank 0 cannot reach rank 1 on \S+, at 127\.0\.0\.1 port \d+: "
        "Connection refused; between a job's hosts open all TCP ports",
        outcome.report,
    )
    assert outcome.tracebacks == 0
