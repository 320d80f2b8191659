"""How a stage and the server of its weights find each other in one job: by the job's store."""

import os
import socket

from ..socket_channel import dial
from .client import Connection
from .replicas import Meeting
from .server import Checkpoint, Members, Server, Serves

__all__ = ["meet_server", "offer", "own_address"]

PATIENCE = 30.0


def offer(
    shard: Serves, members: Members, meeting: Meeting, checkpoint: Checkpoint | None
) -> Server:
    """Start a server, and let the replicas know where it is."""
    watch, host = meeting.watch, own_address()
    server = Server(
        shard,
        members,
        lambda error: watch.fail_by(error, f"serving the weights of stage {shard.stage}"),
        host,
        emulated_link=meeting.emulated_link,
        checkpoint=checkpoint,
    )
    watch.share(f"server/{shard.stage}", f"{host} {server.port}")
    return server


def meet_server(meeting: Meeting, own: Server | None) -> Connection:
    """Connect a stage with its server.

    Args:
        own: the server, where it lives in this process.
    """
    grid, watch = meeting.grid, meeting.watch
    host, port = watch.learn(f"server/{grid.stage}").split()
    rank = (grid.replicas if grid.servers else 0) * grid.stages + grid.stage
    return Connection(
        dial(host, int(port), PATIENCE),
        grid.replica,
        watch,
        lambda error: watch.lost(rank, RuntimeError(str(error))),
        meeting.emulated_link,
        own,
    )


def own_address(toward: str | None = None) -> str:
    """The address under which others reach this machine.

    Args:
        toward: a machine that they are as near to; None: where torchrun's ranks meet.
    """
    one_host = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    if toward is None and one_host:
        return "127.0.0.1"  # nobody else has business here
    found = _toward(toward or os.environ.get("MASTER_ADDR", "127.0.0.1"))
    if toward is None and found.startswith("127."):
        found = _toward("10.255.255.255")  # torchrun's host may know itself by its loopback
    return found


def _toward(host: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # sends nothing
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"
