"""Who takes part: the ranks that torchrun started, the store they share, their devices."""

import atexit
import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import (  # type: ignore[attr-defined]
    PrefixStore,
    Store,
    distributed_c10d,
    rendezvous,
)

from .attempt import attempt
from .errors import InputError, first_line

__all__ = ["World", "choose_device", "meet"]


@dataclass(frozen=True)
class World:
    """This process among those of its job; `local` counts those on one host."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    store: Store


def meet() -> World | None:
    """Join the job that torchrun started; None where this process stands alone.

    Raises:
        InputError: the address to meet at cannot be had.
    """
    if not dist.is_initialized():
        if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
            return None
        _stay_at_home()
        try:
            start = attempt()
            # It stays until this process exits: made a second time in one job, it would find
            # the first one's keys in the store. Left to the end of the process, its threads now
            # and then abort that (1 in 100 processes).
            store, rank, size = next(iter(rendezvous("env://")))
            own = PrefixStore(f"headrace/start {start}", store)
            dist.init_process_group("gloo", store=own, rank=rank, world_size=size)
            atexit.register(_part)
            _wait_until_all_have_met()
        except dist.DistNetworkError as error:
            address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise InputError(
                f"the ranks cannot meet at {address}: {first_line(error)}; if another job holds "
                "that port, choose another with torchrun --master-port, or use --standalone"
            ) from error
    rank, size = dist.get_rank(), dist.get_world_size()
    return World(
        rank=rank,
        size=size,
        local_rank=int(os.environ.get("LOCAL_RANK", rank)),
        local_size=int(os.environ.get("LOCAL_WORLD_SIZE", size)),
        store=distributed_c10d._get_default_store(),
    )


def _stay_at_home() -> None:
    """Where all ranks are of one host, have gloo listen where only that host can reach it; it would
    at the address of the host's name.
    """
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        loopbacks = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
        if loopbacks:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", loopbacks[0])


def _part() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _wait_until_all_have_met() -> None:
    """A rank that is refused and leaves before all others have connected would break their
    connecting, and their error would hide its own.
    """
    store = distributed_c10d._get_default_store()
    key = "headrace/met/{}".format
    store.set(key(dist.get_rank()), "")
    with suppress(dist.DistError):  # who is missing is for `watch` to say
        store.wait([key(rank) for rank in range(dist.get_world_size())], timedelta(minutes=1))


def choose_device(
    device: str | torch.device | None, world: World | None
) -> tuple[torch.device, bool]:
    """This process's device, and whether processes of this host share it.

    Args:
        device: None takes a GPU for each rank where there are enough, the CPU otherwise;
            'cuda' deals the ranks of a host out over its GPUs; 'cuda:0', 'cpu' are taken as said.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    local_rank, local_size = (world.local_rank, world.local_size) if world else (0, 1)
    if device is None:
        device = "cuda" if 0 < local_size <= gpus else "cpu"
    chosen = torch.device(device)
    if chosen.type == "cuda":
        if not gpus:
            raise ValueError(f"device={str(device)!r}: torch sees no GPU here; write device='cpu'")
        shared = local_size > gpus if chosen.index is None else local_size > 1
        index = local_rank % gpus if chosen.index is None else chosen.index
        chosen = torch.device("cuda", index)
        torch.cuda.set_device(chosen)
        return chosen, shared
    return chosen, local_size > 1 and chosen.type != "cpu"
