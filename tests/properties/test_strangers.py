"""Whoever finds the port of a running server may say what they like."""

import errno
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from headrace.pipeline import door as door_module
from headrace.pipeline.door import greet, listen
from headrace.pipeline.errors import InputError
from headrace.pipeline.grid import Grid
from headrace.pipeline.message import LONGEST_FRAME, Kind, Message, Note, encode
from headrace.pipeline.partition import LayerCost, Partition
from headrace.pipeline.replicas import Downpour
from headrace.pipeline.replicas.elastic import Centre
from headrace.pipeline.replicas.rendezvous import Rendezvous
from headrace.pipeline.replicas.request import check_join, most_bytes, read_request, unpack
from headrace.pipeline.replicas.server import GREETING, Serves
from headrace.pipeline.replicas.serving import _Job
from headrace.pipeline.settings import Settings
from headrace.pipeline.socket_channel import SocketInbox

from ..distributed.ranks import free_port
from ..pipeline.test_server import (
    NAMES,
    PATIENCE,
    Open,
    Place,
    Replica,
    assert_same,
    gradients,
    make_shard,
    seeded,
    start_weights,
    subtract,
)
from .listening import listening_addresses


def frame(kind: Kind, *numbers: float, body: Any = None) -> bytes:
    head, following = encode(Message(kind, numbers=tuple(map(float, numbers)), body=body))
    return bytes(head) + b"".join(t.contiguous().numpy().tobytes() for t in following)


def huge(elements: int) -> bytes:
    """A PUSH that announces one tensor of float32s, and stops before its first byte."""
    codes = [1, 0, 1, 0, 0, 1, 1, elements]
    size = 56 + 8 * len(codes)
    return struct.pack(f"7q{len(codes)}q", size, Kind.PUSH, 0, 0, 0, 0, len(codes), *codes)


SAID = {
    "nothing": b"",
    "another protocol": b"GET / HTTP/1.1\r\n\r\n",
    "half a greeting": GREETING[:7],
    "a greeting": GREETING,
    "half a header": GREETING + struct.pack("q", 56)[:4],
    "half a frame": GREETING + frame(Kind.JOIN, 1)[:-4],
    "a huge length": GREETING + struct.pack("q", 2**62),
    "a negative length": GREETING + struct.pack("q", -1),
    "the longest frame": GREETING + struct.pack("q", LONGEST_FRAME),
    "zeros": GREETING + bytes(4096),
    "ones": GREETING + b"\xff" * 4096,
    "a petabyte": GREETING + huge(1 << 48),
    "a push": GREETING + frame(Kind.PUSH, 1, 0, body=[torch.ones(1)]),
    "a fetch": GREETING + frame(Kind.FETCH),
    "new weights": GREETING + frame(Kind.LOAD, body=[*start_weights().values()]),
    "a farewell": GREETING + frame(Kind.CLOSE),
    "another's number": GREETING + frame(Kind.JOIN, 0),
    "no replica's number": GREETING + frame(Kind.JOIN, 7),
    "no number": GREETING + frame(Kind.JOIN),
    "not a number": GREETING + frame(Kind.JOIN, float("nan")),
    "infinity": GREETING + frame(Kind.JOIN, float("inf")),
    "a negative number": GREETING + frame(Kind.JOIN, -1),
    "a number after nonsense": GREETING + frame(Kind.FETCH) + frame(Kind.JOIN, 1),
    "a farewell after nonsense": GREETING + frame(Kind.FETCH) + frame(Kind.CLOSE),
    "a tensor elsewhere": GREETING
    + bytes(encode(Message(Kind.PUSH, body=torch.ones(900)), lambda _: Note(1, 2, 4096, 3))[0]),
}


def assert_at_work(place: Place) -> None:
    """The first replica, which has joined, is served; and nobody has been missed or taken in."""
    place.replicas[0].push({}, 0)
    assert_same(place.replicas[0].fetch(), start_weights())
    assert place.server.connected == 1 and place.joined.empty() and place.left.empty()


@pytest.mark.timeout(60)
def test_strangers_disturb_nobody(open_server: Open) -> None:
    """All of them stay connected, too, until the others are done."""
    place = open_server(make_shard(), {0, 1})
    (first,) = place.meet(0)
    address, strangers = ("127.0.0.1", place.server.port), []
    for said in SAID.values():
        strangers.append(socket.create_connection(address, timeout=PATIENCE))
        with suppress(OSError):
            strangers[-1].sendall(said)
        assert_same(first.fetch(), start_weights())
    (second,) = place.meet(1)
    pushed = gradients(seeded(3))
    second.push(pushed, 0)
    assert_same(second.fetch(), subtract(start_weights(), pushed))
    assert place.server.connected == 2 and place.joined.empty() and place.left.empty()
    for stranger in strangers:
        stranger.close()


def test_who_talks_nonsense_is_shown_the_door(open_server: Open) -> None:
    place = open_server(make_shard(), {0, 1})
    place.meet(0)
    stay = {"nothing", "half a greeting", "a greeting", "half a header", "half a frame"}
    stay.add("the longest frame")  # they may have more to say
    for name in SAID.keys() - stay:
        with socket.create_connection(("127.0.0.1", place.server.port), PATIENCE) as stranger:
            stranger.sendall(SAID[name])
            heard = b"more"
            with suppress(ConnectionResetError):
                while heard:
                    heard = stranger.recv(4096)
    assert_at_work(place)


@given(st.lists(st.binary(max_size=200), max_size=3))
def test_strangers_who_say_anything(said: list[bytes]) -> None:
    """As an inbox hears it: it ends, and tells why, once."""
    near, far = socket.socketpair()
    lost: list[Exception] = []
    inbox = SocketInbox(far, lambda: None, lost.append)
    inbox.start()
    for part in said:
        near.sendall(part)
    near.close()
    inbox.join(PATIENCE)
    assert not inbox.is_alive() and len(lost) == 1
    assert isinstance(lost[0], ValueError | EOFError) and str(lost[0])
    assert inbox.poll() is None
    far.close()


@pytest.mark.parametrize(
    "said",
    [
        frame(Kind.BEAT, body=[None] * 5),
        frame(Kind.BEAT, 1.0),
        frame(Kind.BEAT, body=torch.ones(1)),
    ],
    ids=["a nest", "a number", "a tensor"],
)
def test_a_beat_says_nothing(said: bytes) -> None:
    """They come as often as anybody likes, and nobody looks at what is in them."""
    near, far = socket.socketpair()
    lost: list[Exception] = []
    inbox = SocketInbox(far, lambda: None, lost.append)
    inbox.start()
    near.sendall(frame(Kind.BEAT) + said)
    near.shutdown(socket.SHUT_WR)
    inbox.join(PATIENCE)
    assert [str(error) for error in lost] == ["a beat that says something"]
    near.close()
    far.close()


def memory() -> int:
    """Bytes that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("said", "parts"),
    [(struct.pack("q", LONGEST_FRAME), 20), (huge(1 << 28), 20), (huge(1 << 27), 20)],
    ids=["a frame of 64 MiB", "a tensor of 1 GiB", "a tensor of 512 MiB"],
)
def test_memory_is_taken_for_what_has_come_and_not_for_what_is_said(
    said: bytes, parts: int
) -> None:
    before, ends = memory(), []
    for _ in range(parts):
        near, far = socket.socketpair()
        lost: list[Exception] = []
        inbox = SocketInbox(far, lambda: None, lost.append, most=1 << 30)
        inbox.start()
        near.sendall(said + bytes(1000))
        ends.append((near, far, inbox))
    end = time.monotonic() + 0.3
    while time.monotonic() < end:
        assert memory() - before < 60 << 20
        time.sleep(0.01)
    for near, far, inbox in ends:
        near.close()
        inbox.join(PATIENCE)
        far.close()


def test_a_message_larger_than_any_replicas_is_refused() -> None:
    weights = {"w": torch.zeros(1000)}
    assert most_bytes(weights) == (1 << 30) + 64 * 4000
    near, far = socket.socketpair()
    lost: list[Exception] = []
    inbox = SocketInbox(far, lambda: None, lost.append, most=most_bytes(weights))
    inbox.start()
    near.sendall(huge(1 << 29))
    inbox.join(PATIENCE)
    assert str(lost[0]) == (
        "a message with 2,147,483,648 bytes of tensors: 1,073,997,824 are allowed"
    )
    near.close()
    far.close()


# Who has joined, and then talks nonsense ---------------------------------------------------------

SIZE, ROWS = torch.tensor([50, 3, 0]), torch.tensor([1, 0, 0])


def sparse(row: int, rows: int = 1, size: Tensor = SIZE) -> list[Tensor]:
    return [torch.tensor([[row] * rows]), torch.ones(rows, 3, dtype=torch.float64), size]


NONSENSE: dict[str, tuple[Message, str]] = {
    "too few tensors": (Message(Kind.PUSH, numbers=(1.0, 0.0), body=[None]), "for 3 weights"),
    "no tensors": (Message(Kind.PUSH, numbers=(1.0, 0.0)), "None for 3 weights"),
    "another shape": (
        Message(Kind.PUSH, numbers=(1.0, 0.0), body=[None, torch.ones(3).double(), None]),
        r"float64\[3\] for the weight 'small', float64\[2\]",
    ),
    "another dtype": (
        Message(Kind.PUSH, numbers=(1.0, 0.0), body=[None, torch.ones(2), None]),
        r"float32\[2\] for the weight 'small', float64\[2\]",
    ),
    "a nest": (
        Message(Kind.PUSH, numbers=(1.0, 0.0), body=[None, {"a": torch.ones(2)}, None]),
        r"\{a: float32\[2\]\} for the weight 'small'",
    ),
    "no versions": (Message(Kind.PUSH, numbers=(1.0,), body=[None] * 3), "PUSH with 1 numbers"),
    "a version that is none": (
        Message(Kind.PUSH, numbers=(1.0, 0.5), body=[None] * 3),
        "which are no counts",
    ),
    "a version to come": (
        Message(Kind.PUSH, numbers=(1.0, 1e6), body=[None] * 3),
        "a gradient of version 1000000, and 0 is the newest",
    ),
    "a row that is not there": (
        Message(Kind.PUSH, numbers=(1.0, 0.0), body=[None, None, sparse(50)]),
        "a sparse tensor that is none: .*size",
    ),
    "a row before the first": (
        Message(Kind.PUSH, numbers=(1.0, 0.0), body=[None, None, sparse(-1)]),
        "a sparse tensor that is none",
    ),
    "a sparse tensor of another size": (
        Message(Kind.PUSH, numbers=(1.0, 0.0), body=[None, None, sparse(0, 1, SIZE + 9 * ROWS)]),
        "for the weight 'table'",
    ),
    "a sparse tensor without size": (
        Message(Kind.PUSH, numbers=(1.0, 0.0), body=[None, None, sparse(0, 1, SIZE[:1])]),
        r"int64\[1\] for the size of float64\[50, 3\]",
    ),
    "half a sparse tensor": (
        Message(Kind.PUSH, numbers=(1.0, 0.0), body=[None, None, sparse(0)[:2]]),
        "for a sparse tensor",
    ),
    "weights that are missing": (
        Message(Kind.LOAD, body=[None] * 3),
        "LOAD without all weights: 'large' is missing",
    ),
    "rows of a weight": (
        Message(Kind.LOAD, body=[*[*start_weights().values()][:2], sparse(0)]),
        "LOAD without all weights: 'table' is sparse",
    ),
    "buffers that are none": (Message(Kind.SETTLE, body=[None]), "SETTLE with"),
    "no list of buffers": (Message(Kind.BUFFERS, body=torch.ones(2)), "BUFFERS with float32"),
    "a fetch of something": (Message(Kind.FETCH, body=torch.ones(2)), "FETCH with float32"),
    "a micro-batch": (Message(Kind.MICRO_BATCH), "MICRO_BATCH with None, which no replica says"),
    "what a server says": (Message(Kind.WEIGHTS), "WEIGHTS with None, which no replica says"),
    "to join again": (Message(Kind.JOIN, numbers=(1.0,)), "JOIN with None, which no replica says"),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_told(name: str) -> None:
    message, match = NONSENSE[name]
    with pytest.raises(ValueError, match=match):
        read_request(message, start_weights(), 0)


def test_nonsense_ends_its_senders_connection_alone(open_server: Open) -> None:
    place = open_server(make_shard(replicas=len(NONSENSE) + 1), None)
    (first,) = place.meet(0)
    for k, (message, _) in enumerate(NONSENSE.values(), start=1):
        (bad,) = place.meet(k)
        bad.outbox.send(message)
        assert place.left.get(timeout=PATIENCE) == (k, False)
        assert_same(first.fetch(), start_weights())
    assert place.server.connected == 1


UNFIT: dict[str, tuple[Callable[[], Serves], Message, str]] = {
    "a gradient over nothing": (
        lambda: make_shard(replicas=0),
        Message(Kind.PUSH, numbers=(0.0, 0.0), body=[*start_weights().values()]),
        "PUSH of a gradient over 0 samples, and 1 is the least",
    ),
    "no weight": (
        lambda: Centre(0, start_weights(), 0.5),
        Message(Kind.PUSH, numbers=(0.0, 0.0), body=[None] * 3),
        "PUSH without all weights: 'large' is missing",
    ),
    "all weights but one": (
        lambda: Centre(0, start_weights(), 0.5),
        Message(Kind.PUSH, numbers=(0.0, 0.0), body=[*[*start_weights().values()][:2], None]),
        "PUSH without all weights: 'table' is missing",
    ),
    "rows of a weight": (
        lambda: Centre(0, start_weights(), 0.5),
        Message(Kind.PUSH, numbers=(0.0, 0.0), body=[*[*start_weights().values()][:2], sparse(0)]),
        "PUSH without all weights: 'table' is sparse",
    ),
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_push_that_cannot_be_taken_in_ends_its_senders_connection_alone(
    open_server: Open, name: str
) -> None:
    make, message, words = UNFIT[name]
    told: list[str] = []
    place = open_server(make())
    place.server.members.left = lambda replica, lost: told.append(f"{replica}: {lost}")
    first, bad = place.meet(0, 1)
    bad.outbox.send(message)
    bad.hear(Kind.CLOSE)
    assert first.ask().updates == 0 and place.server.connected == 1
    assert told == [f"1: {words}"]


def test_a_fetch_before_an_offer_harms_no_centre(open_server: Open) -> None:
    """Elastic averaging: who has offered nothing stays where it is."""
    place = open_server(Centre(0, start_weights(), 0.5))
    (replica,) = place.meet(0)
    moves = replica.fetch()
    assert list(moves) == NAMES and not any(move.any() for move in moves.values())


def test_what_is_sound_is_read() -> None:
    weights, sent = start_weights(), gradients(seeded(1))
    table = sent["table"]
    body: Any = [sent["large"], None, [table._indices(), table._values(), SIZE]]
    got = read_request(Message(Kind.PUSH, numbers=(4.0, 2.0, 3.0), body=body), weights, 3)
    assert list(got) == ["large", "table"] and torch.equal(
        got["table"].to_dense(), table.to_dense()
    )
    assert read_request(Message(Kind.FETCH), weights, 0) == {}
    assert read_request(Message(Kind.SETTLE, body=[torch.ones(1)]), weights, 0) == {}
    assert check_join(Message(Kind.JOIN, numbers=(3.0,)), [1, 2], None) == 3
    assert unpack([*weights.values()], weights).keys() == weights.keys()


# The door ---------------------------------------------------------------------------------------


class Exhausted(socket.socket):
    """A door that, at first, finds the process without a file to spare."""

    failures = 2

    def accept(self) -> tuple[socket.socket, Any]:
        if self.failures:
            self.failures -= 1
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return super().accept()


def test_too_many_files_do_not_shut_the_door(
    open_server: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(host: str, port: int) -> socket.socket:
        return Exhausted(fileno=listen(host, port).detach())

    monkeypatch.setattr(door_module, "listen", exhausted)
    place = open_server(make_shard(), {0, 1})
    (first,) = place.meet(0)
    assert_same(first.fetch(), start_weights())


def test_a_greeting_has_so_many_seconds_in_all() -> None:
    """However it dawdles: each byte is in time, all of them are not."""
    near, far = socket.socketpair()

    def dawdle() -> None:
        with suppress(OSError):
            for byte in GREETING:
                near.sendall(bytes([byte]))
                time.sleep(0.2)

    thread = threading.Thread(target=dawdle)
    thread.start()
    start = time.monotonic()
    assert not greet(far, GREETING, 0.5)
    assert 0.4 < time.monotonic() - start < 2.5 and far.fileno() == -1
    thread.join(PATIENCE)
    near.close()


# Where servers and replicas of several jobs meet -------------------------------------------------


@pytest.fixture
def store() -> Iterator[Rendezvous]:
    yield Rendezvous(f"127.0.0.1:{free_port()}", lambda: None, keeps=True, patience=5)


def test_garbage_at_the_store_harms_nobody(store: Rendezvous) -> None:
    store.open(2, "a model")
    strangers = []
    port = int(store.address.rpartition(":")[2])
    for said in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 5000, bytes(5000), struct.pack("q", 1)):
        strangers.append(socket.create_connection(("127.0.0.1", port), timeout=PATIENCE))
        strangers[-1].sendall(said)
    other = Rendezvous(store.address, lambda: None, patience=5)
    assert other.take_seat("a model") == (0, 0, 2)
    assert other.take_seat("a model") == (1, 1, 2)
    for stranger in strangers:
        stranger.close()


def test_nobodys_seat_is_vacated_at_once(store: Rendezvous) -> None:
    """To wait for it would be the store's patience, and then an error."""
    store.open(1, "a model")
    assert not store.has_seated(12345)
    store.vacate(12345)
    assert store.take_seat("a model") == (0, 0, 1) and store.has_seated(0)
    store.vacate(0)
    assert store.take_seat("a model") == (1, 0, 1)


def test_a_server_of_launch_serve_takes_in_who_has_a_seat(store: Rendezvous) -> None:
    """A stranger who joins with any other number is not missed when it goes."""
    layer = LayerCost("0", "Linear", 8)
    store.open(1, "a model")
    store.agree(Partition((layer,), (1,)))
    watch: Any = SimpleNamespace(idle=lambda: None, silence=PATIENCE, fail_by=lambda *_: None)
    said: list[str] = []
    job = _Job(
        Downpour(1, address=store.address),
        Grid(1),
        nn.Sequential(nn.Linear(3, 2)),
        Settings(nn.MSELoss(), partial(torch.optim.SGD, lr=1.0)),
        0,
        store,
        watch,
        PATIENCE,
        said.append,
    )
    server = job.start()
    stranger = Replica(server.port, 12345)
    stranger.hear(Kind.CLOSE)
    stranger.socket.close()
    assert not said and not job.attendance.came
    number, *_ = store.take_seat("a model")
    replica = Replica(server.port, number)
    replica.send(Kind.FETCH)
    replica.hear(Kind.WEIGHTS)
    replica.close()
    job.wait(server)
    server.close()
    assert said == [
        "replica 0 has joined; 1 is training",
        "replica 0 has finished; 0 are training",
    ]


def test_a_store_at_the_loopback_is_not_seen_elsewhere(store: Rendezvous) -> None:
    port = int(store.address.rpartition(":")[2])
    assert {host for host, where in listening_addresses() if where == port} == {"127.0.0.1"}


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(InputError, match=f"cannot keep their store at {address}: .*in use"):
            Rendezvous(address, lambda: None, keeps=True, patience=5)
