"""Hosts that are none: network namespaces of this machine, each with a name and an address.

What a process of one can reach of another is the cable alone. Unix sockets end at a network
namespace, `/proc` at a process namespace, names at a UTS namespace: so it is between machines.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from .ranks import ROOT

__all__ = ["CABLE", "Host", "Network", "UnavailableError", "connected", "far_apart"]

CABLE = "cable"
"""The name of every host's interface."""


class UnavailableError(Exception):
    """Why there can be no such hosts here."""


@dataclass(frozen=True)
class Host:
    """One of them: `host-a`, `host-b`, …

    Args:
        names: a file that says, as /etc/hosts does, where all of them are.
    """

    name: str
    namespace: str
    address: str
    names: Path

    def start(
        self, command: Sequence[str], folder: Path, environment: dict[str, str] | None = None
    ) -> "subprocess.Popen[str]":
        """Start a command; when the process that this gives is killed, so are all it started."""
        enter = f'hostname {self.name} && mount --bind {self.names} /etc/hosts && exec "$@"'
        named = ["sh", "-c", enter, "sh", *command]
        apart = ["unshare", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        own = {
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": CABLE,
            "RES_OPTIONS": "timeout:1 attempts:1",
        }
        return subprocess.Popen(
            ["ip", "netns", "exec", self.namespace, *apart, *named],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=folder,
            env={**os.environ, **own, **(environment or {})},
        )

    def bytes_sent(self, interface: str = CABLE) -> int:
        """How much has left by an interface, `lo` for what stays on this host."""
        (link,) = json.loads(_ip("-n", self.namespace, "-s", "-j", "link", "show", interface))
        return int(link["stats64"]["tx"]["bytes"])


@dataclass(frozen=True)
class Network:
    """Hosts, and what joins their cables, which has a namespace of its own."""

    namespace: str
    names: Path
    hosts: list[Host] = field(default_factory=list)

    def add_host(self) -> Host:
        """Another one, which has no cable yet."""
        number = len(self.hosts)
        name = f"host-{'abcdefgh'[number]}"
        address = f"10.123.0.{number + 1}"
        host = Host(name, f"{self.namespace}-{name}", address, self.names)
        _ip("netns", "add", host.namespace)
        self.hosts.append(host)
        with self.names.open("a") as file:
            file.write(f"{address} {name}\n")
        return host

    def plug_in(self, host: Host) -> None:
        """Lead a cable from a host to the switch."""
        other = ["type", "veth", "peer", "name", CABLE, "netns", host.namespace]
        _ip("-n", self.namespace, "link", "add", host.name, *other)
        _ip("-n", self.namespace, "link", "set", host.name, "master", "switch", "up")
        _raise_interfaces(host)

    def cut(self, host: Host) -> None:
        """Nothing passes its cable any more, and nobody is told."""
        _ip("-n", self.namespace, "link", "set", host.name, "down")


@contextmanager
def connected(count: int, folder: Path) -> Iterator[Network]:
    """So many hosts on one switch, until the end of the block; the folder is for their names.

    Raises:
        UnavailableError: this system or this user cannot make them.
    """
    with _network(count, folder) as network, _as_unavailable():
        _ip("-n", network.namespace, "link", "add", "switch", "type", "bridge")
        _ip("-n", network.namespace, "link", "set", "switch", "up")
        for host in network.hosts:
            network.plug_in(host)
        yield network


@contextmanager
def far_apart(seconds: float, folder: Path) -> Iterator[Network]:
    """Two hosts and one cable, on which everything takes so long one way.

    Raises:
        UnavailableError: this system or this user cannot make them.
    """
    with _network(2, folder) as network, _as_unavailable():
        cable = _lay_slow_cable(network, seconds)
        try:
            for host in network.hosts:
                _ip("-n", network.namespace, "link", "set", host.name, "netns", host.namespace)
                _ip("-n", host.namespace, "link", "set", host.name, "name", CABLE)
                _raise_interfaces(host)
            yield network
        finally:
            cable.kill()
            cable.communicate()


def _lay_slow_cable(network: Network, seconds: float) -> "subprocess.Popen[str]":
    if not Path("/dev/net/tun").exists():
        raise UnavailableError("there is no /dev/net/tun, of which a slow cable is made")
    program = str(Path(__file__).with_name("slow_cable.py"))
    names = [host.name for host in network.hosts]
    cable = subprocess.Popen(
        ["ip", "netns", "exec", network.namespace, sys.executable, program, *names, str(seconds)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert cable.stdout is not None
    if cable.stdout.readline() != "ready\n":
        raise UnavailableError(f"a slow cable: {cable.communicate()[1]}")
    return cable


@contextmanager
def _network(count: int, folder: Path) -> Iterator[Network]:
    """So many hosts without a cable; whatever comes of it, they are taken away."""
    _check_system()
    names = folder / "hosts"
    names.write_text("127.0.0.1 localhost\n")
    network = Network(f"headrace-{os.getpid()}", names)
    try:
        with _as_unavailable():
            _ip("netns", "add", network.namespace)
            for _ in range(count):
                network.add_host()
        yield network
    finally:
        for namespace in [host.namespace for host in network.hosts] + [network.namespace]:
            if Path("/run/netns", namespace).exists():
                _ip("netns", "delete", namespace)


def _raise_interfaces(host: Host) -> None:
    """Give a host its loopback, and its address on the cable."""
    _ip("-n", host.namespace, "link", "set", "lo", "up")
    _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", CABLE)
    _ip("-n", host.namespace, "link", "set", CABLE, "up")


def _check_system() -> None:
    if sys.platform != "linux":
        raise UnavailableError(f"network namespaces are Linux's, and this is {sys.platform}")
    missing = [tool for tool in ("ip", "unshare") if shutil.which(tool) is None]
    if missing:
        raise UnavailableError(f"not installed: {', '.join(missing)} (iproute2, util-linux)")
    if os.geteuid():
        raise UnavailableError(f"only root makes them, and this is user {os.geteuid()}")


@contextmanager
def _as_unavailable() -> Iterator[None]:
    try:
        yield
    except subprocess.CalledProcessError as error:
        raise UnavailableError(f"{' '.join(error.cmd)}: {error.stderr.strip()}") from error


def _ip(*arguments: str) -> str:
    command = ["ip", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout
