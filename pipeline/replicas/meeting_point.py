"""How a stage and the server of its weights find each other in one job: by the job's store."""

from ..address import own_address
from .client import Connection, knock
from .replicas import Meeting
from .server import Checkpoint, Members, Server, Serves

__all__ = ["meet_server", "offer"]


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
        knock(host, int(port)),
        grid.replica,
        watch,
        lambda error: watch.lost(rank, RuntimeError(str(error))),
        meeting.emulated_link,
        own,
    )
