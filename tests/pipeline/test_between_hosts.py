"""Channels over TCP: how two ranks meet, what passes, what is received ahead, how it ends."""

import queue
import re
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import torch

from headrace.pipeline import between_hosts
from headrace.pipeline.bell import Bell
from headrace.pipeline.between_hosts import (
    RECEIVE_AHEAD,
    TcpInbox,
    TcpOutbox,
    meet_receiver,
    meet_sender,
)
from headrace.pipeline.carrier import Carrier
from headrace.pipeline.door import dial, listen
from headrace.pipeline.errors import InputError
from headrace.pipeline.introduction import Introduction
from headrace.pipeline.message import LONGEST_FRAME, Kind, Message, Note, encode
from headrace.pipeline.nest import leaves
from headrace.pipeline.timeline import Recorder, Work

from .test_socket_channel import FRAMES, PATIENCE, assert_same, body


class Rings(Bell):
    """Counts, and lets a test wait for the next ring."""

    def __init__(self) -> None:
        super().__init__()
        self.count = threading.Semaphore(0)

    def ring(self) -> None:
        self.count.release()


@dataclass
class Channel:
    """Both ends in one process, and what each was told when the other was lost."""

    outbox: TcpOutbox
    inbox: TcpInbox
    bell: Rings = field(default_factory=Rings)
    recorder: Recorder = field(default_factory=Recorder)
    lost: "queue.Queue[Exception]" = field(default_factory=queue.Queue)

    def hear(self) -> Message:
        assert self.bell.count.acquire(timeout=PATIENCE), "no message came"
        message = self.inbox.poll()
        assert message is not None
        return message


def tcp() -> tuple[socket.socket, socket.socket]:
    with listen("127.0.0.1") as door:
        near = socket.create_connection(door.getsockname())
        return near, door.accept()[0]


@pytest.fixture
def channel() -> Iterator[Channel]:
    near, far = tcp()
    bell, recorder, lost = Rings(), Recorder(), queue.Queue[Exception]()
    outbox = TcpOutbox(near, Carrier(), recorder, Work.SEND_DOWN, lost.put)
    yield Channel(outbox, TcpInbox(far, Carrier(), bell, lost.put), bell, recorder, lost)
    outbox.send(Message(Kind.CLOSE))
    outbox.leave(PATIENCE)


# What passes ------------------------------------------------------------------------------------


def test_a_message_arrives_as_it_was_sent(channel: Channel) -> None:
    sent = Message(Kind.MICRO_BATCH, 2**40, True, (1.5, -0.0, 5e-324), body())
    channel.outbox.send(sent)
    got = channel.hear()
    assert (got.kind, got.index, got.last) == (sent.kind, sent.index, sent.last)
    assert [x.hex() for x in got.numbers] == [x.hex() for x in sent.numbers]
    assert_same(got.body, sent.body)
    # It may be here before the thread that sent it has noted so.
    channel.outbox.send(Message(Kind.CLOSE))
    channel.outbox.leave(PATIENCE)
    assert channel.recorder.counts[Work.SEND_DOWN] == 2, "and the farewell"


def test_what_arrives_shares_no_memory(channel: Channel) -> None:
    sent = torch.ones(5000)
    channel.outbox.send(Message(Kind.RESULT, body=[sent, sent]))
    a, b = leaves(channel.hear().body)
    a.zero_()
    assert sent.sum() == b.sum() == 5000


def test_sends_wait_for_nobody() -> None:
    """There is no receiver: what a slow link holds is sent all the same, and lies there."""
    near, far = tcp()
    lost: queue.Queue[Exception] = queue.Queue()
    outbox = TcpOutbox(near, Carrier(), Recorder(), Work.SEND_DOWN, lost.put)
    for k in range(4):
        outbox.send(Message(Kind.MICRO_BATCH, k, body=torch.full((2500,), float(k))))
    outbox.send(Message(Kind.CLOSE))
    outbox.leave(PATIENCE)
    assert not outbox.is_alive(), "all was sent"
    bell = Rings()
    inbox = TcpInbox(far, Carrier(), bell, lost.put)
    for k in range(4):
        assert bell.count.acquire(timeout=PATIENCE)
        message = inbox.poll()
        assert message is not None and message.index == k
        assert_same(message.body, torch.full((2500,), float(k)))
    inbox.leave(PATIENCE)
    assert not inbox.is_alive() and lost.empty()


def test_two_messages_are_received_ahead(channel: Channel) -> None:
    """The others wait at the sender, but for what the system's buffers hold."""
    count, size = 60, 1_000_000  # 240 MB; those hold 36 MB on the systems that we know
    for k in range(count):
        channel.outbox.send(Message(Kind.MICRO_BATCH, k, body=torch.zeros(size)))
    for taken in range(count):
        for _ in range(1 if taken else RECEIVE_AHEAD):
            assert taken + RECEIVE_AHEAD > count or channel.bell.count.acquire(timeout=PATIENCE)
        assert not channel.bell.count.acquire(blocking=False), "a third one"
        message = channel.inbox.poll()
        assert message is not None and message.index == taken
    assert RECEIVE_AHEAD == 2 and channel.inbox.poll() is None


# Ends -------------------------------------------------------------------------------------------


def test_goodbye(channel: Channel) -> None:
    channel.outbox.send(Message(Kind.RESULT, 1))
    channel.outbox.send(Message(Kind.CLOSE))
    channel.outbox.leave(PATIENCE)
    channel.inbox.leave(PATIENCE)
    assert not channel.outbox.is_alive() and not channel.inbox.is_alive()
    assert channel.hear().index == 1
    assert channel.inbox.poll() is None and channel.lost.empty()


@pytest.mark.parametrize("cut", [0, 3, 40, -1000], ids=["nothing", "head", "frame", "tensor"])
def test_the_sender_is_gone(cut: int) -> None:
    """Between messages, or within one: then that one never arrives. It is said once."""
    near, far = tcp()
    bell, lost = Rings(), queue.Queue[Exception]()
    inbox = TcpInbox(far, Carrier(), bell, lost.put)
    frame, following = encode(Message(Kind.RESULT, 5, body=torch.ones(1000)))
    data = bytes(frame) + b"".join(t.numpy().tobytes() for t in following)
    near.sendall(data + data[:cut])
    near.close()
    assert bell.count.acquire(timeout=PATIENCE)
    message = inbox.poll()
    assert message is not None and message.index == 5
    error = lost.get(timeout=PATIENCE)
    assert type(error) is RuntimeError, "what says that a rank is gone, and did no wrong"
    assert str(error) == "its connection was closed"
    inbox.leave(PATIENCE)
    assert inbox.poll() is None and lost.empty() and far.fileno() == -1


def test_the_receiver_is_gone() -> None:
    near, far = tcp()
    lost: queue.Queue[Exception] = queue.Queue()
    outbox = TcpOutbox(near, Carrier(), Recorder(), Work.SEND_DOWN, lost.put)
    far.close()
    for _ in range(3):  # the first may fill a buffer that nobody reads
        outbox.send(Message(Kind.RESULT, body=torch.ones(100_000)))
    error = lost.get(timeout=PATIENCE)
    assert type(error) is RuntimeError and str(error) == "its connection was closed"
    outbox.leave(PATIENCE)
    assert not outbox.is_alive() and lost.empty()


NONSENSE = {
    **FRAMES,
    "longer than the longest": (LONGEST_FRAME + 1).to_bytes(8, "little"),
    "a tensor elsewhere": bytes(
        encode(Message(Kind.RESULT, body=torch.ones(900)), lambda _: Note(1, 2, 4096, 3))[0]
    ),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_what_is_no_message_is_told_as_such(name: str) -> None:
    near, far = tcp()
    lost: queue.Queue[Exception] = queue.Queue()
    inbox = TcpInbox(far, Carrier(), Rings(), lost.put)
    near.sendall(NONSENSE[name])
    error = lost.get(timeout=PATIENCE)
    assert isinstance(error, ValueError) and "no message of Headrace's" in str(error)
    inbox.leave(PATIENCE)
    assert inbox.poll() is None and lost.empty()
    near.close()


# How two ranks meet -----------------------------------------------------------------------------


class Told:
    """An introduction within a process."""

    def __init__(self, out: "queue.Queue[int]", into: "queue.Queue[int]") -> None:
        self._out, self._in = out, into

    def tell(self, *numbers: int) -> None:
        for number in numbers:
            self._out.put(int(number))

    def hear(self, count: int) -> list[int]:
        return [self._in.get(timeout=PATIENCE) for _ in range(count)]


@dataclass
class Meeting:
    """What both made of it: a channel's end, or an error."""

    outbox: Any
    inbox: Any


def meet() -> Meeting:
    out, into = queue.Queue[int](), queue.Queue[int]()
    sends, receives = cast(Introduction, Told(out, into)), cast(Introduction, Told(into, out))
    lost: queue.Queue[Exception] = queue.Queue()
    with ThreadPoolExecutor() as threads:
        inbox = threads.submit(meet_sender, receives, Carrier(), (3, 4), Rings(), lost.put)
        outbox = threads.submit(
            meet_receiver, sends, Carrier(), (3, 4), Recorder(), Work.SEND_DOWN, lost.put
        )
        return Meeting(*[future.exception() or future.result() for future in (outbox, inbox)])


def before_it_knocks(
    monkeypatch: pytest.MonkeyPatch, do: Callable[[str, int, bytes], None]
) -> None:
    """Have something done between the receiver's telling where it is and the sender's knock."""

    def dial_late(host: str, port: int, greeting: bytes, seconds: float) -> socket.socket:
        do(host, port, greeting)
        return dial(host, port, greeting, seconds)

    monkeypatch.setattr(between_hosts, "dial", dial_late)


def assert_connected(met: Meeting) -> None:
    met.outbox.send(Message(Kind.RESULT, 7))
    met.outbox.send(Message(Kind.CLOSE))
    met.outbox.leave(PATIENCE)
    met.inbox.leave(PATIENCE)
    message = met.inbox.poll()
    assert message is not None and message.index == 7


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_two_ranks_meet(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    try:
        listen(address).close()
    except OSError as error:
        pytest.skip(f"no {address} here: {error}")
    monkeypatch.setattr(between_hosts, "own_address", lambda: address)
    met = meet()
    for end in (met.outbox._socket, met.inbox._socket):
        assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert end.gettimeout() is None
    assert_connected(met)


def test_the_door_is_closed_behind_the_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was open at the loopback, with a token of its own."""
    seen: list[tuple[str, int, bytes]] = []
    before_it_knocks(monkeypatch, lambda *told: seen.append(told))
    assert_connected(meet())
    assert_connected(meet())
    for host, port, _ in seen:
        assert host == "127.0.0.1"
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((host, port), timeout=PATIENCE)
    assert seen[0][2] != seen[1][2] and len(seen[0][2]) == 32


def test_strangers_take_nobodys_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """They come first, say nothing, or something, and stay."""
    strangers: list[socket.socket] = []

    def knock(host: str, port: int, token: bytes) -> None:
        almost = token[:-1] + bytes([token[-1] ^ 1])
        for word in (b"", b"GET / HTTP/1.1\r\n\r\n", bytes(4096), almost, token[1:]):
            strangers.append(socket.create_connection((host, port), timeout=PATIENCE))
            with suppress(OSError):
                strangers[-1].sendall(word)

    before_it_knocks(monkeypatch, knock)
    assert_connected(meet())
    for stranger in strangers:
        stranger.close()


def assert_unreachable(met: Meeting, why: str) -> None:
    """Both say the same, so that it is the job's error whoever is first."""
    assert type(met.outbox) is type(met.inbox) is InputError
    assert str(met.outbox) == str(met.inbox)
    assert re.fullmatch(
        rf"rank 3 cannot reach rank 4 on {re.escape(socket.gethostname())}, at 127\.0\.0\.1 port "
        rf"\d+: {why}; between a job's hosts open all TCP ports .*ip_local_port_range\), and .* "
        "have GLOO_SOCKET_IFNAME name the interface of the right one",
        str(met.outbox),
    ), met


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (ConnectionRefusedError(111, "refused"), "Connection refused"),
        (TimeoutError("timed out"), "Connection timed out"),
        (OSError(113, "no route"), "No route to host"),
    ],
    ids=["refused", "dropped", "no route"],
)
def test_a_port_that_cannot_be_reached(
    monkeypatch: pytest.MonkeyPatch, error: OSError, why: str
) -> None:
    def fails(*_: Any) -> None:
        raise error

    before_it_knocks(monkeypatch, fails)
    assert_unreachable(meet(), why)


def test_another_machine_of_that_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's bridge, say, which every host has: somebody answers, and it is not the one."""
    monkeypatch.setattr(between_hosts, "PATIENCE", 0.5)
    with listen("127.0.0.1") as other:
        port = other.getsockname()[1]
        monkeypatch.setattr(between_hosts, "dial", lambda host, _, *how: dial(host, port, *how))
        assert_unreachable(meet(), "another machine answers there")
