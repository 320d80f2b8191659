"""The address under which other machines reach this one."""

import fcntl
import ipaddress
import os
import socket
import struct
import sys
from contextlib import suppress
from pathlib import Path

__all__ = ["own_address"]

ANYWHERE = "10.255.255.255"
"""No machine of ours: the way to it leads by the interface of the default route."""

SIOCGIFADDR = 0x8915
"""Linux's request for an interface's address."""

GLOBAL = "00"
"""In /proc/net/if_inet6, the scope of an address that needs no interface beside it."""


def own_address(toward: str | None = None) -> str:
    """Where to listen: the loopback, where all ranks of a job are on one host.

    Args:
        toward: a machine that the others are as near to; None: the other ranks of this job. They
            are reached by the interface that `GLOO_SOCKET_IFNAME` names, if it does, else by the
            one that leads to where torchrun's ranks meet.
    """
    if toward is not None:
        return _toward(toward)
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE"):
        return "127.0.0.1"  # nobody else has business here
    named = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    found = _address_of(named) or _toward(os.environ.get("MASTER_ADDR", "127.0.0.1"))
    if not named and ipaddress.ip_address(found).is_loopback:
        found = _toward(ANYWHERE)  # torchrun's host may know itself by its loopback
    return found


def _toward(host: str) -> str:
    with suppress(OSError):
        for family, kind, _, _, where in socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM):
            with suppress(OSError), socket.socket(family, kind) as probe:
                probe.connect(where)  # sends nothing
                return str(probe.getsockname()[0])
    return "127.0.0.1"


def _address_of(interface: str) -> str | None:
    """An interface's address, that of IPv4 if it has both; None if there is no such thing."""
    if not interface or sys.platform != "linux":
        return None
    request = struct.pack("256s", interface.encode())
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        return socket.inet_ntoa(fcntl.ioctl(probe, SIOCGIFADDR, request)[20:24])
    for row in Path("/proc/net/if_inet6").read_text().splitlines():
        digits, _, _, scope, _, name = row.split()
        if name == interface and scope == GLOBAL:
            return socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits))
    return None
