"""Where a rank listens for others."""

import socket

import pytest

from headrace.pipeline import address
from headrace.pipeline.address import own_address


@pytest.fixture
def several_hosts(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment of a rank that has one host of four to itself; its first host is this one."""
    for name, value in (("WORLD_SIZE", "4"), ("LOCAL_WORLD_SIZE", "1"), ("MASTER_ADDR", "node7")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    return monkeypatch


def test_one_host_is_its_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun without --standalone says the host's name, at whose address others can knock."""
    monkeypatch.setenv("MASTER_ADDR", "192.0.2.1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert own_address() == "127.0.0.1"
    assert own_address("127.0.0.1") == "127.0.0.1"


def test_a_named_interface_is_taken(several_hosts: pytest.MonkeyPatch) -> None:
    several_hosts.setattr(address, "_toward", lambda host: "192.0.2.7")
    several_hosts.setenv("GLOO_SOCKET_IFNAME", "lo,eth9")
    assert own_address() == "127.0.0.1"


def test_one_without_an_address_is_none(several_hosts: pytest.MonkeyPatch) -> None:
    """gloo has something to say about it before we are asked."""
    several_hosts.setattr(address, "_toward", lambda host: f"192.0.2.7 to {host}")
    several_hosts.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    assert own_address() == "192.0.2.7 to node7"


def test_else_the_way_to_the_first_host(several_hosts: pytest.MonkeyPatch) -> None:
    several_hosts.setattr(address, "_toward", {"node7": "192.0.2.7"}.__getitem__)
    assert own_address() == "192.0.2.7"


@pytest.mark.parametrize("loopback", ["127.0.1.1", "::1"])
def test_the_first_host_knows_itself_by_its_loopback(
    several_hosts: pytest.MonkeyPatch, loopback: str
) -> None:
    ways = {"node7": loopback, address.ANYWHERE: "192.0.2.7"}
    several_hosts.setattr(address, "_toward", ways.__getitem__)
    assert own_address() == "192.0.2.7"


def test_ipv6() -> None:
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError as error:
            pytest.skip(f"no IPv6 here: {error}")
    assert own_address("::1") == "::1"


def test_a_host_that_nobody_knows() -> None:
    assert own_address("no.such.host.invalid") == "127.0.0.1"
