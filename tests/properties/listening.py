"""Where this process listens, as the system has it; and a job that tells where its ranks do."""

import os
import socket
from pathlib import Path
from typing import Any

import torch
from torch import nn

from headrace.pipeline import Pipeline
from headrace.pipeline.replicas import Downpour

__all__ = ["listening_addresses", "tell_where_we_listen"]

LISTENS = "0A"


def listening_addresses() -> set[tuple[str, int]]:
    """Host and port of every TCP socket at which this process listens."""
    own = {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_open(fd)}
    found = set()
    for file, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for row in Path(f"/proc/self/net/{file}").read_text().splitlines()[1:]:
            fields = row.split()
            if fields[3] == LISTENS and f"socket:[{fields[9]}]" in own:
                host, port = fields[1].split(":")
                words = [bytes.fromhex(host[k : k + 8])[::-1] for k in range(0, len(host), 8)]
                found.add((socket.inet_ntop(family, b"".join(words)), int(port, 16)))
    return found


def _is_open(fd: str) -> bool:
    return os.path.islink(f"/proc/self/fd/{fd}")


def tell_where_we_listen() -> Any:
    """Train two replicas of two stages with parameter servers, and look while all is at work."""
    os.environ.pop("GLOO_SOCKET_IFNAME", None)  # as a user has it, and not the tests
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    batches = [(torch.ones(2, 4), torch.ones(2, 4))] * 12
    with Pipeline(
        model,
        nn.MSELoss(),
        lambda parameters: torch.optim.SGD(parameters, lr=0.01),
        stages=2,
        replicas=Downpour(2, beside=True),
    ) as pipe:
        report = pipe.train(batches)
        return sorted(listening_addresses()), report.samples
