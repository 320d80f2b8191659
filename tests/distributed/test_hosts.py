"""Stages on several hosts, which are namespaces of this machine: numbers, delays, a cut cable."""

import pickle
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace.launch import train as train_command

from ..launch.test_replicas import CONFIG
from ..pipeline.helpers import assert_same
from .across import PAYLOAD, Trip, train, train_among_files, train_here, train_twice
from .failing import FLAG, Plan, misfortune
from .hosts import Host, Network, Unavailable, connected, far_apart

pytestmark = pytest.mark.timeout(120)

Process = subprocess.Popen[str]

TIMEOUT = 3.0
"""Seconds of silence, once there was an update."""

DELAY = 0.01
"""Seconds that the slow cable takes one way."""


@contextmanager
def having(network: AbstractContextManager[Network]) -> Iterator[Network]:
    """The network; a test is skipped where there can be none."""
    try:
        with network as made:
            yield made
    except Unavailable as error:
        pytest.skip(f"no hosts of namespaces here: {error}")


@contextmanager
def running(starts: Sequence[Callable[[], Process]]) -> Iterator[list[Process]]:
    """Processes at work; in the end all are killed, with what they started."""
    processes: list[Process] = []
    try:
        for start in starts:
            processes.append(start())
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate(timeout=20)


def finish(processes: Sequence[Process]) -> list[str]:
    """Wait until all have ended well, and give what each printed."""
    said = [process.communicate(timeout=100) for process in processes]
    assert all(p.returncode == 0 for p in processes), said
    return [out for out, _ in said]


def meet(hosts: Sequence[Host], host: Host, dynamic: bool = False) -> list[str]:
    """The options of torchrun with which the hosts find each other."""
    first = hosts[0].name
    if dynamic:
        return ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{first}:29400", "--rdzv-id", "job"]
    rank = str(hosts.index(host))
    return ["--node-rank", rank, "--master-addr", first, "--master-port", "29400"]


def torchrun(
    hosts: Sequence[Host],
    ranks: Sequence[int],
    folder: Path,
    program: Callable[..., Any],
    *args: Any,
    dynamic: bool = False,
) -> list[Callable[[], Process]]:
    """How to start the real torchrun on each host, with so many ranks on each."""
    (folder / "arguments").write_bytes(pickle.dumps(args))
    play = ["-m", "tests.distributed.play", f"{program.__module__}:{program.__name__}"]

    def start(host: Host, count: int) -> Process:
        size = ["--nnodes", str(len(hosts)), "--nproc-per-node", str(count)]
        run = [sys.executable, "-m", "torch.distributed.run", *size, *meet(hosts, host, dynamic)]
        return host.start([*run, *play], folder)

    return [lambda h=h, n=n: start(h, n) for h, n in zip(hosts, ranks, strict=True)]  # type: ignore[misc]


def results(folder: Path, ranks: int) -> list[Any]:
    return [torch.load(folder / f"result{rank}", weights_only=False) for rank in range(ranks)]


def assert_same_as_one_process(trips: Sequence[Trip]) -> None:
    """To the last bit."""
    alone = train_here(len(trips), 1)
    for trip in trips:
        assert trip.losses == alone.losses
        assert_same(trip.weights, alone.weights)


# Numbers ------------------------------------------------------------------------------------


def test_three_hosts(tmp_path: Path) -> None:
    """Two stages on the first: between those memory is shared, all else takes the cables."""
    with having(connected(3, tmp_path)) as network:
        with running(torchrun(network.hosts, [2, 1, 1], tmp_path, train)) as processes:
            finish(processes)
        sent = [host.bytes_sent() for host in network.hosts]
        stayed = network.hosts[0].bytes_sent("lo")
    trips = results(tmp_path, 4)
    assert [trip.host for trip in trips] == ["host-a", "host-a", "host-b", "host-c"]
    near, far = "HostOutbox", "_Sender"
    assert [trip.links for trip in trips] == [(near, ""), (far, near), (far, far), ("", far)]
    # Downwards go activations and, beside them, targets; upwards go gradients.
    for bytes_sent, payloads in zip(sent, [2, 2 + 1, 1], strict=True):
        assert payloads * PAYLOAD < bytes_sent < (payloads + 0.5) * PAYLOAD
    assert stayed < 0.1 * PAYLOAD
    assert_same_as_one_process(trips)


def test_two_hosts_that_find_each_other(tmp_path: Path) -> None:
    with having(connected(2, tmp_path)) as network:
        starts = torchrun(network.hosts, [1, 1], tmp_path, train, dynamic=True)
        with running(starts) as processes:
            finish(processes)
        assert all(host.bytes_sent() > PAYLOAD for host in network.hosts)
    trips = results(tmp_path, 2)
    assert {trip.host for trip in trips} == {"host-a", "host-b"}
    assert_same_as_one_process(trips)


def test_a_slow_cable(tmp_path: Path) -> None:
    """The numbers are the same; asked to, Headrace keeps more in flight."""
    with having(far_apart(DELAY, tmp_path)) as network:
        with running(torchrun(network.hosts, [1, 1], tmp_path, train_twice)) as processes:
            finish(processes)
    told, chosen = zip(*results(tmp_path, 2), strict=True)
    assert_same_as_one_process(told)
    assert all(trip.depths == (2, 0) for trip in told)
    assert chosen[0].depths == chosen[1].depths
    assert chosen[0].depths[0] > 1, "no slack"
    assert_same(chosen[0].weights, chosen[1].weights)


def test_containers_that_share_a_network(tmp_path: Path) -> None:
    """Their processes have the same numbers: neither opens what it takes for the other's memory."""
    clutter = tmp_path / "clutter"
    clutter.write_bytes(b"\xff" * 1_000_000)
    with having(connected(1, tmp_path)) as network:
        (host,) = network.hosts
        (tmp_path / "arguments").write_bytes(pickle.dumps(()))
        program = f"{train_among_files.__module__}:{train_among_files.__name__}"
        command = [sys.executable, "-m", "tests.distributed.play", program]
        job = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        job |= {"MASTER_ADDR": host.name, "MASTER_PORT": "29400"}
        starts = [
            lambda r=r: host.start(command, tmp_path, {**job, "RANK": r})  # type: ignore[misc]
            for r in "01"
        ]
        with running(starts) as processes:
            finish(processes)
    assert clutter.read_bytes() == b"\xff" * 1_000_000
    trips = results(tmp_path, 2)
    assert [trip.links for trip in trips] == [("_Sender", ""), ("", "_Sender")]
    assert_same_as_one_process(trips)


# A cable is cut -----------------------------------------------------------------------------


def reports(process: Process) -> list[str]:
    lines = "\n".join(process.communicate(timeout=20)).splitlines()
    return [line for line in lines if line.startswith("headrace: ")]


def test_a_cut_cable(tmp_path: Path) -> None:
    """Both sides end soon, and each says which host and which stage is out of reach."""
    plan = Plan("nothing", 0, "forward", 50, timeout=(60, TIMEOUT))
    with having(connected(2, tmp_path)) as network:
        starts = torchrun(network.hosts, [1, 1], tmp_path, misfortune, plan, 100_000)
        with running(starts) as processes:
            while not (tmp_path / FLAG).exists():
                assert all(p.poll() is None for p in processes), [reports(p) for p in processes]
                time.sleep(0.01)
            network.cut(network.hosts[1])
            start = time.monotonic()
            assert [process.wait(timeout=30) for process in processes] == [1, 1]
            seconds = time.monotonic() - start
            (first,), (second,) = map(reports, processes)
    print(f"after {seconds:.1f} s", first, second, sep="\n")
    assert TIMEOUT - 1 < seconds < TIMEOUT + 9
    assert re.fullmatch(
        r"headrace: stage 1 of 2 \(rank 1\) has been silent for \d+ s \(process \d+ on host-b\): it "
        "was stopped, or its machine is out of reach",
        first,
    ), first
    assert re.fullmatch(
        r"headrace: stage 1 of 2 \(rank 1\), on host-b: the job's store is gone: torchrun has ended "
        r"at host-a:29400, or that machine is out of reach \(no answer for \d+ s\)",
        second,
    ), second


# Parameter servers --------------------------------------------------------------------------


def test_a_server_on_another_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica that waits for what it asked for is one process's SGD, wherever the server is."""
    (tmp_path / "small.yaml").write_text(CONFIG)
    config = ["--config", "small.yaml", "--stages", "1"]
    with having(connected(2, tmp_path)) as network:
        near, far = network.hosts
        replicas = "{class_path: downpour, init_args: {count: 1, prefetch: 0, address: '%s:29600'}}"
        served = [*config, "--name", "served", "--pipeline.replicas", replicas % near.address]

        def start(host: Host, program: str) -> Process:
            run = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            return host.start([*run, "-m", f"headrace.launch.{program}", *served], tmp_path)

        starts = [lambda: start(near, "serve"), lambda: start(far, "train")]
        with running(starts) as processes:
            server, _ = finish(processes)
        assert all(host.bytes_sent() > 20_000 for host in network.hosts)
    assert f"serving 1 stage to 1 replica at {near.address}:29600" in server
    assert "replica 0 has finished" in server
    assert "server of stage 0: 40 updates" in server
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    train_command.main([*config, "--name", "alone"])
    weights = [
        torch.load(tmp_path / "runs" / name / "weights.pt", weights_only=True)
        for name in ("served", "alone")
    ]
    assert_same(*weights)


# The hosts themselves ------------------------------------------------------------------------


def test_nothing_stays(tmp_path: Path) -> None:
    """Neither a namespace nor a process outlives its block, however that ends."""
    with pytest.raises(ZeroDivisionError), having(connected(1, tmp_path)) as network:
        (host,) = network.hosts
        assert network.namespace in namespaces() and host.namespace in namespaces()
        with running([lambda: host.start(["sleep", "100"], tmp_path)]) as processes:
            raise ZeroDivisionError
    assert not namespaces() & {network.namespace, host.namespace}
    assert processes[0].poll() is not None


def namespaces() -> set[str]:
    return {path.name for path in Path("/run/netns").glob("*")}
