"""Ranks of one host listen where only that host can reach them, whatever its name says."""

import pytest

from ..properties.listening import tell_where_we_listen
from .ranks import TRANSPORTS, Launcher

pytestmark = pytest.mark.timeout(90)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_one_host_listens_on_its_loopback(launcher: Launcher, transport: str) -> None:
    """All but torchrun's own store, which the launcher keeps here in its place. The doors at which
    neighbours met are closed.
    """
    outcome = launcher.run(tell_where_we_listen, 4, environment=TRANSPORTS[transport])
    outcome.expect(0, 0, 0, 0)
    where = [addresses for addresses, _ in outcome.results]
    assert {host for addresses in where for host, _ in addresses} == {"127.0.0.1"}
    assert [len(addresses) for addresses in where] == [2, 2, 1, 1], "gloo's, and a server's door"
    assert all(samples > 0 for _, samples in outcome.results)
