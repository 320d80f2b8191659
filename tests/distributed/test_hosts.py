"""Stages on several hosts, which are namespaces of this machine: numbers, delays, a cut cable."""

import pickle
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace.launch import train as train_command

from ..launch.test_replicas import CONFIG
from ..pipeline.helpers import assert_same
from .across import (
    PAYLOAD,
    Trip,
    measure_paces,
    train_among_files,
    train_and_wait,
    train_here,
    train_twice,
)
from .failing import FLAG, Plan
from .hosts import Host, Network, UnavailableError, connected, far_apart

pytestmark = pytest.mark.timeout(120)

Process = subprocess.Popen[str]

TIMEOUT = 3.0
"""Seconds of silence, once there was an update."""

DELAY = 0.005
"""Seconds that the slow cable takes one way."""


@contextmanager
def having(network: AbstractContextManager[Network]) -> Iterator[Network]:
    """The network; a test is skipped where there can be none."""
    try:
        with network as made:
            yield made
    except UnavailableError as error:
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


# Three hosts, then a cable is cut ------------------------------------------------------------


@dataclass(frozen=True)
class Voyage:
    """What became of a job whose last host was cut off.

    Args:
        sent: bytes that left each host while it trained. stayed: by the first one's loopback.
        seconds: from the cut to the end of the last torchrun.
        reports: what Headrace said on each host.
    """

    trips: list[Trip]
    sent: list[int]
    stayed: int
    codes: list[int]
    seconds: float
    reports: list[list[str]]


@pytest.fixture(scope="module")
def voyage(tmp_path_factory: pytest.TempPathFactory) -> Voyage:
    """Two stages on the first host, one on each of the others."""
    folder = tmp_path_factory.mktemp("voyage")
    plan = Plan("nothing", 0, "forward", 50, timeout=(60, TIMEOUT))
    with having(connected(3, folder)) as network:
        starts = torchrun(network.hosts, [2, 1, 1], folder, train_and_wait, plan)
        with running(starts) as processes:
            wait_for(folder, processes, *(f"trained{rank}" for rank in range(4)))
            sent = [host.bytes_sent() for host in network.hosts]
            stayed = network.hosts[0].bytes_sent("lo")
            (folder / "go").touch()
            wait_for(folder, processes, FLAG)
            network.cut(network.hosts[2])
            start = time.monotonic()
            codes = [process.wait(timeout=30) for process in processes]
            seconds = time.monotonic() - start
            said = [reports(process) for process in processes]
    return Voyage(results(folder, 4), sent, stayed, codes, seconds, said)


def wait_for(folder: Path, processes: Sequence[Process], *names: str) -> None:
    """Wait until there are these files, which ranks make."""
    while not all((folder / name).exists() for name in names):
        assert all(process.poll() is None for process in processes), list(map(reports, processes))
        time.sleep(0.01)


def reports(process: Process) -> list[str]:
    lines = "\n".join(process.communicate(timeout=20)).splitlines()
    return [line for line in lines if line.startswith("headrace: ")]


def test_the_numbers_are_those_of_one_process(voyage: Voyage) -> None:
    assert [trip.host for trip in voyage.trips] == ["host-a", "host-a", "host-b", "host-c"]
    assert_same_as_one_process(voyage.trips)


def test_memory_is_shared_within_a_host_alone(voyage: Voyage) -> None:
    near, far = "HostOutbox", "TcpOutbox"
    ways = [(near, ""), (far, near), (far, far), ("", far)]
    assert [trip.links for trip in voyage.trips] == ways
    # Downwards go activations and, beside them, targets; upwards go gradients.
    for bytes_sent, payloads in zip(voyage.sent, [2, 2 + 1, 1], strict=True):
        assert payloads * PAYLOAD < bytes_sent < (payloads + 0.5) * PAYLOAD
    assert voyage.stayed < 0.1 * PAYLOAD


def test_a_cut_cable_ends_all(voyage: Voyage) -> None:
    """Those who still reach each other say once who is missing; whoever is alone says so too."""
    print(f"after {voyage.seconds:.1f} s", *voyage.reports, sep="\n")
    assert voyage.codes == [1, 1, 1]
    assert TIMEOUT - 1 < voyage.seconds < TIMEOUT + 20
    (missing,) = voyage.reports[0] + voyage.reports[1]
    assert re.fullmatch(
        r"headrace: stage 3 of 4 \(rank 3\) has been silent for \d+ s \(process \d+ on host-c\): "
        "it was stopped, or its machine is out of reach",
        missing,
    ), missing
    (alone,) = voyage.reports[2]
    assert re.fullmatch(
        r"headrace: stage 3 of 4 \(rank 3\), on host-c: the job's store is gone: torchrun has "
        r"ended at host-a:29400, or that machine is out of reach \(no answer for \d+ s\)",
        alone,
    ), alone


# Two hosts ----------------------------------------------------------------------------------


def test_a_slow_cable(tmp_path: Path) -> None:
    """The numbers are the same; asked to, Headrace keeps more in flight."""
    with having(far_apart(DELAY, tmp_path)) as network:
        starts = torchrun(network.hosts, [1, 1], tmp_path, train_twice, dynamic=True)
        with running(starts) as processes:
            finish(processes)
    told, chosen = zip(*results(tmp_path, 2), strict=True)
    assert_same_as_one_process(told)
    assert all(trip.depths == (2, 0) for trip in told)
    assert chosen[0].depths == chosen[1].depths
    assert chosen[0].depths[0] > 1, "no slack"
    assert_same(chosen[0].weights, chosen[1].weights)


def test_slack_hides_what_a_cable_takes(tmp_path: Path) -> None:
    """Large messages, each of whose tensors would take gloo a round trip, whatever is in flight.

    At slack 0 a micro-batch takes at least as long as the cable one way; at slack 16, when 17 share
    a round trip, a few milliseconds: a busy machine, too, stays below half.
    """
    delay = 0.05
    with having(far_apart(delay, tmp_path)) as network:
        starts = torchrun(network.hosts, [1, 1], tmp_path, measure_paces, 256, 64, [0, 16], 40)
        with running(starts) as processes:
            finish(processes)
    for (waits, _), (hides, depth) in results(tmp_path, 2):
        print(f"ms a micro-batch: slack 0 {1000 * waits:.1f}, slack 16 {1000 * hides:.1f}")
        assert depth in (17, 0)
        assert waits > delay and 2 * hides < waits


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
    assert [trip.links for trip in trips] == [("TcpOutbox", ""), ("", "TcpOutbox")]
    assert_same_as_one_process(trips)


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
