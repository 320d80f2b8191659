"""Ranks of one host listen where only that host can reach them, whatever its name says."""

import pytest

from ..properties.listening import tell_where_we_listen
from .ranks import Launcher

pytestmark = pytest.mark.timeout(90)


def test_one_host_listens_on_its_loopback(launcher: Launcher) -> None:
    """All but torchrun's own store, which the launcher keeps here in its place."""
    outcome = launcher.run(tell_where_we_listen, 2, None)
    outcome.expect(0, 0)
    (first, samples), (second, _) = outcome.results
    assert samples > 0
    assert first and second, "the server's door, and gloo's"
    assert {host for host, _ in first + second} == {"127.0.0.1"}
