"""Channels of one host: here both ends are in one process."""

import os
import secrets
import socket
from dataclasses import dataclass, field

import pytest
import torch

from headrace.pipeline.message import Kind, Message
from headrace.pipeline.nest import flatten, leaves
from headrace.pipeline.same_host import PACKET, HostInbox, HostOutbox, _accept_from
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
