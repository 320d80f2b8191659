"""Fork ranks on request: a line of JSON on standard input each, a line on output for each death."""

import gc
import json
import os
import select
import signal
import socket
import sys
import time
from contextlib import suppress
from typing import Any

import torch

import headrace.pipeline  # noqa: F401
from tests.distributed import (  # noqa: F401
    commands,
    failing,
    nonfinite,
    payloads,
    profiling,
    refused,
    scripts,
    training,
)
from tests.distributed.play import play


def warm_up() -> None:
    """Have imported what torch imports when it is first used, and start no thread."""
    torch.set_num_threads(1)
    weight = torch.zeros(1, requires_grad=True)
    weight.grad = torch.zeros(1)
    torch.optim.SGD([weight], lr=0.0).step()
    gc.collect()
    gc.freeze()


def serve() -> dict[str, Any]:
    """Fork for each request; returns in the forked process alone, with its request."""
    control = os.dup(sys.stdout.fileno())
    children: set[int] = set()
    buffer = b""

    def say(*what: Any) -> None:
        os.write(control, (json.dumps(what) + "\n").encode())

    while True:
        if select.select([0], [], [], 0.01 if children else None)[0]:
            chunk = os.read(0, 65536)
            if not chunk:
                for child in children:
                    os.killpg(child, signal.SIGKILL)
                os._exit(0)
            buffer += chunk
        while b"\n" in buffer:
            line, buffer = buffer.split(b"\n", 1)
            request: dict[str, Any] = json.loads(line)
            child = os.fork()
            if child == 0:
                os.close(control)
                return request
            say(child, None, time.time())
            with suppress(OSError):  # it does so itself; whoever comes first
                os.setpgid(child, child)
            children.add(child)
        for child in list(children):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                children.remove(child)
                say(child, os.waitstatus_to_exitcode(status), time.time())


def become_rank(request: dict[str, Any]) -> None:
    """Take the rank's environment, folder and files; and its own process group."""
    os.setpgid(0, 0)
    os.environ.update(request["environment"])
    if "APART" in os.environ:
        del socket.AF_UNIX  # as on a system without: ranks cannot tell that they share a host
    os.chdir(request["folder"])
    rank = os.environ["RANK"]
    nothing = os.open(os.devnull, os.O_RDONLY)
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    for target, source in enumerate(
        (nothing, os.open(f"out{rank}", flags), os.open(f"err{rank}", flags))
    ):
        os.dup2(source, target)
        os.close(source)


if __name__ == "__main__":
    warm_up()
    mine = serve()
    become_rank(mine)
    play(mine["program"])
