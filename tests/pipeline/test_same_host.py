"""Channels of one host: here both ends are in one process."""

import os
import secrets
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import pytest
import torch

from headrace.pipeline.message import Kind, Message
from headrace.pipeline.nest import flatten, leaves
from headrace.pipeline.same_host import (
    PACKET,
    QUEUE,
    HostInbox,
    HostOutbox,
    _accept_from,
    _name,
    meet_receiver,
    meet_sender,
)
from headrace.pipeline.shared_memory import SharedMemory
from headrace.pipeline.timeline import Recorder, Work


@dataclass
class Channel:
    """Both ends, and what each was told when the other was lost."""

    outbox: HostOutbox
    inbox: HostInbox
    sockets: tuple[socket.socket, socket.socket]
    recorder: Recorder
    lost: list[Exception] = field(default_factory=list)


@pytest.fixture
def channel() -> Channel:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    near.setblocking(False)
    far.setblocking(False)
    lost: list[Exception] = []
    recorder = Recorder()
    return Channel(
        HostOutbox(near, SharedMemory(), recorder, Work.SEND_DOWN, lost.append),
        HostInbox(far, SharedMemory(), lost.append),
        (near, far),
        recorder,
        lost,
    )


def assert_same(got: Message | None, sent: Message) -> None:
    assert got is not None
    assert (got.kind, got.index, got.numbers) == (sent.kind, sent.index, sent.numbers)
    assert flatten(got.body)[1] == flatten(sent.body)[1]
    for a, b in zip(leaves(got.body), leaves(sent.body), strict=True):
        assert torch.equal(a, b) and a.requires_grad == b.requires_grad


def test_small_large_and_long_messages(channel: Channel) -> None:
    many = {f"tensor {k}": torch.full((k,), float(k)) for k in range(200)}
    small, large = torch.ones(3), torch.randn(300, 300, requires_grad=True)
    messages = [
        Message(Kind.BEGIN, 3),
        Message(Kind.MICRO_BATCH, 1, body=(small, large)),
        Message(Kind.MICRO_BATCH, 2, numbers=tuple(map(float, range(PACKET))), body=many),
    ]
    assert channel.inbox.poll() is None
    for message in messages:
        channel.outbox.send(message)
    for message in messages:
        assert_same(channel.inbox.poll(), message)
    assert channel.inbox.poll() is None and not channel.lost
    assert channel.recorder.seconds[Work.SEND_DOWN] > 0


def test_what_the_socket_has_no_room_for_follows_in_order(channel: Channel) -> None:
    count = 5000
    for k in range(count):
        channel.outbox.send(Message(Kind.MICRO_BATCH, k, body=torch.full((64,), float(k))))
    assert not channel.outbox.flush(), "a socket that holds all of this tests nothing"
    for k in range(count):
        message = channel.inbox.poll()
        assert message is not None and message.index == k
        assert isinstance(message.body, torch.Tensor) and message.body[0] == k
        channel.outbox.flush()
    assert channel.outbox.flush()


def test_goodbye(channel: Channel) -> None:
    channel.outbox.send(Message(Kind.RESULT, 1))
    channel.outbox.send(Message(Kind.CLOSE))
    channel.outbox.leave(1)
    channel.inbox.leave(1)
    channel.sockets[0].close()
    assert channel.inbox.poll() is None
    assert not channel.lost


def test_the_sender_is_gone(channel: Channel) -> None:
    channel.outbox.send(Message(Kind.RESULT, 1))
    channel.sockets[0].close()
    assert_same(channel.inbox.poll(), Message(Kind.RESULT, 1))  # what it sent is still there
    assert channel.inbox.poll() is None
    assert [str(error) for error in channel.lost] == ["the socket was closed"]
    assert channel.inbox.poll() is None and len(channel.lost) == 1, "it is said once"


def test_the_receiver_is_gone(channel: Channel) -> None:
    channel.sockets[1].close()
    channel.outbox.send(Message(Kind.RESULT, 1))
    assert len(channel.lost) == 1 and "Broken pipe" in str(channel.lost[0])
    assert channel.outbox.flush(), "nothing is kept for it"


def test_only_the_process_that_was_expected_is_let_in() -> None:
    """Addresses outside of the file system can be listed by every user of the host."""
    name = b"\0headrace-test-" + secrets.token_hex(8).encode()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as door:
        door.bind(name)
        door.listen(8)
        door.setblocking(False)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
            stranger.connect(name)
            with pytest.raises(BlockingIOError):
                _accept_from(door, os.getpid() + 1)
            assert stranger.recv(1) == b"", "it was shown the door"
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as known:
            known.connect(name)
            with _accept_from(door, os.getpid()) as end:
                end.send(b"x")
                assert known.recv(1) == b"x"


# Strangers at the socket while two ranks meet ----------------------------------------------------

PATIENCE = 20.0


class Talk:
    """An introduction whose other half is in this process, too."""

    def __init__(self, out: "SimpleQueue[int]", into: "SimpleQueue[int]") -> None:
        self._out, self._into = out, into

    def tell(self, *numbers: int) -> None:
        for number in numbers:
            self._out.put(int(number))

    def hear(self, count: int) -> list[int]:
        return [self._into.get(timeout=PATIENCE) for _ in range(count)]


STRANGERS = """
import socket, sys
ends = []
for _ in range(int(sys.argv[2])):
    ends.append(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    ends[-1].setblocking(False)
    ends[-1].connect(bytes.fromhex(sys.argv[1]))
print("there", flush=True)
sys.stdin.read()
"""
"""Another process, for it is by that that they are told from the sender."""


def meet(strangers: int) -> tuple[HostOutbox | None, HostInbox | None]:
    """What both come to, where so many have found the receiver's socket before the sender."""
    there: SimpleQueue[int] = SimpleQueue()
    back: SimpleQueue[int] = SimpleQueue()
    sender: Any = Talk(there, back)
    receiver: Any = Talk(back, there)
    found: dict[str, Any] = {}

    def start(name: str, act: Callable[[], object]) -> threading.Thread:
        thread = threading.Thread(target=lambda: found.update({name: act()}), daemon=True)
        thread.start()
        return thread

    lost: Callable[[Exception], None] = lambda error: None  # noqa: E731
    receives = start("inbox", lambda: meet_sender(receiver, lost))
    address = sender.hear(2)
    name = _name(torch.tensor(address))
    command = [sys.executable, "-c", STRANGERS, name.hex(), str(strangers)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as others:
        assert others.stdout is not None and others.stdout.readline() == b"there\n"
        receiver.tell(*address)
        sends = start("outbox", lambda: meet_receiver(sender, Recorder(), Work.SEND_DOWN, lost))
        for thread in (sends, receives):
            thread.join(PATIENCE)
        others.communicate()
    assert not (sends.is_alive() or receives.is_alive()), "they wait for ever"
    return found["outbox"], found["inbox"]


@pytest.mark.parametrize("strangers", [0, QUEUE])
def test_among_strangers_two_ranks_meet(strangers: int) -> None:
    outbox, inbox = meet(strangers)
    assert outbox is not None and inbox is not None
    assert inbox.poll() is None, "nobody waits for what has not come"
    message = Message(Kind.RESULT, 1, body=torch.randn(100, 100))
    for _ in range(2000):  # more than the socket holds, and none of these waits
        outbox.send(Message(Kind.ECHO))
    outbox.send(message)
    assert not outbox.flush()
    for _ in range(2000):
        while inbox.poll() is None:
            outbox.flush()
    outbox.flush()
    assert_same(inbox.poll(), message)


def test_strangers_who_fill_the_socket_make_two_ranks_part() -> None:
    """They go on over TCP; to wait for room would be for ever, since nobody is let in meanwhile."""
    assert meet(QUEUE + 1) == (None, None)


def test_strangers_who_come_one_after_the_other_are_not_let_in_for_ever() -> None:
    ends: list[socket.socket] = []

    class Besieged:
        def accept(self) -> tuple[socket.socket, str]:
            assert len(ends) < 100
            near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            ends.append(far)
            return near, ""

    door: Any = Besieged()
    with pytest.raises(OSError, match="strangers stand at this socket"):
        _accept_from(door, os.getpid() + 1)
    assert len(ends) == QUEUE + 1
    for end in ends:
        assert end.recv(1) == b""
        end.close()
