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

__all__ = ["CABLE", "Host", "Unavailable", "connected", "ended"]

CABLE = "cable"
"""The name of every host's interface."""


class Unavailable(Exception):
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
class Switch:
    """What joins the hosts' cables: a bridge in a namespace of its own."""

    namespace: str
    names: Path
    hosts: list[Host] = field(default_factory=list)

    def plug_in(self, name: str) -> Host:
        """Another host, at the other end of a new cable."""
        number = len(self.hosts) + 1
        host = Host(name, f"{self.namespace}-{name}", f"10.123.0.{number}", self.names)
        _ip("netns", "add", host.namespace)
        self.hosts.append(host)
        with self.names.open("a") as file:
            file.write(f"{host.address} {name}\n")
        other = ["type", "veth", "peer", "name", CABLE, "netns", host.namespace]
        _ip("-n", self.namespace, "link", "add", name, *other)
        _ip("-n", self.namespace, "link", "set", name, "master", "switch", "up")
        raise_interfaces(host)
        return host

    def cut(self, host: Host) -> None:
        """Nothing passes any more, and nobody is told."""
        _ip("-n", self.namespace, "link", "set", host.name, "down")


def raise_interfaces(host: Host) -> None:
    """Give a host its loopback, and its address on the cable."""
    _ip("-n", host.namespace, "link", "set", "lo", "up")
    _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", CABLE)
    _ip("-n", host.namespace, "link", "set", CABLE, "up")


@contextmanager
def connected(count: int, folder: Path) -> Iterator[Switch]:
    """So many hosts on one switch, until the end of the block; the folder is for their names.

    Raises:
        Unavailable: this system or this user cannot make them.
    """
    names = folder / "hosts"
    names.write_text("127.0.0.1 localhost\n")
    switch = Switch(f"headrace-{os.getpid()}", names)
    try:
        _check_system()
        try:
            _ip("netns", "add", switch.namespace)
            _ip("-n", switch.namespace, "link", "add", "switch", "type", "bridge")
            _ip("-n", switch.namespace, "link", "set", "switch", "up")
            for letter in "abcdefgh"[:count]:
                switch.plug_in(f"host-{letter}")
        except subprocess.CalledProcessError as error:
            raise Unavailable(f"{' '.join(error.cmd)}: {error.stderr.strip()}") from error
        yield switch
    finally:
        for namespace in [host.namespace for host in switch.hosts] + [switch.namespace]:
            if Path("/run/netns", namespace).exists():
                _ip("netns", "delete", namespace)


def _check_system() -> None:
    if sys.platform != "linux":
        raise Unavailable(f"network namespaces are Linux's, and this is {sys.platform}")
    missing = [tool for tool in ("ip", "unshare") if shutil.which(tool) is None]
    if missing:
        raise Unavailable(f"not installed: {', '.join(missing)} (iproute2, util-linux)")
    if os.geteuid():
        raise Unavailable(f"only root makes them, and this is user {os.geteuid()}")


def _ip(*arguments: str) -> str:
    command = ["ip", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout
