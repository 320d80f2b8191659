"""Messages over sockets of this machine: what comes out, in which order, and how it ends."""

import queue
import socket
import struct
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from headrace.pipeline.message import SMALL, Kind, Message, encode
from headrace.pipeline.nest import Nest, flatten, leaves
from headrace.pipeline.socket_channel import RECEIVE_AHEAD, SocketInbox, SocketOutbox

PATIENCE = 20.0
"""Seconds after which a test fails; none waits that long otherwise."""


class End:
    """One end of a connection, with a count of messages that are there, and what was lost."""

    def __init__(self, end: socket.socket) -> None:
        self.socket = end
        self.there = threading.Semaphore(0)
        self.lost: queue.Queue[Exception] = queue.Queue()
        self.outbox = SocketOutbox(end, self.lost.put)
        self.inbox = SocketInbox(end, self.there.release, self.lost.put)
        self.inbox.start()

    def hear(self) -> Message:
        assert self.there.acquire(timeout=PATIENCE), "no message came"
        message = self.inbox.poll()
        assert message is not None
        return message


@pytest.fixture
def ends() -> Iterator[tuple[End, End]]:
    near, far = map(End, socket.socketpair())
    yield near, far
    for each in (near, far):
        each.outbox.send(Message(Kind.CLOSE))
    for each in (near, far):
        each.outbox.leave(PATIENCE)
        each.socket.close()


def assert_same(got: Nest, wanted: Nest) -> None:
    assert flatten(got)[1] == flatten(wanted)[1]
    for a, b in zip(leaves(got), leaves(wanted), strict=True):
        assert (a.dtype, a.requires_grad) == (b.dtype, b.requires_grad)
        assert torch.equal(a, b) and a.is_contiguous()


def body(seed: int = 0) -> Nest:
    """Everything that may travel: beside each other, in the frame and after it."""
    draw = torch.Generator().manual_seed(seed)
    large = torch.randn(70, 50, generator=draw)
    return {
        "small": torch.randn(3, generator=draw),
        "large": large,
        "empty": (torch.zeros(0), torch.zeros(3, 0, 2, dtype=torch.int64)),
        "none": [None, (), {}],
        "bfloat16": [large.bfloat16(), torch.ones(2, dtype=torch.bfloat16)],
        "0-d": (torch.tensor(7), torch.tensor(0.1, dtype=torch.float64)),
        "askew": [large.t(), large[::3, 1::2], torch.arange(12).view(3, 4).t()],
        "expanded": torch.tensor([1.5]).expand(SMALL + 1),
        "others": (large > 0, large.long(), torch.full((1000,), 1 + 2j)),
        "learns": torch.randn(2000, generator=draw).requires_grad_(),
        "edges": torch.zeros(SMALL + 1, dtype=torch.int8),
    }


def test_a_message_arrives_as_it_was_sent(ends: tuple[End, End]) -> None:
    near, far = ends
    sent = Message(Kind.PUSH, 2**40, True, (1.5, -0.0, 5e-324), body())
    near.outbox.send(sent)
    got = far.hear()
    assert (got.kind, got.index, got.last) == (sent.kind, sent.index, sent.last)
    assert [x.hex() for x in got.numbers] == [x.hex() for x in sent.numbers]
    assert_same(got.body, sent.body)


def test_what_arrives_shares_no_memory(ends: tuple[End, End]) -> None:
    near, far = ends
    sent = torch.ones(5000)
    near.outbox.send(Message(Kind.WEIGHTS, body=[sent, sent]))
    a, b = leaves(far.hear().body)
    a.zero_()
    assert sent.sum() == b.sum() == 5000


def test_messages_keep_their_order_in_both_directions(ends: tuple[End, End]) -> None:
    """More than are received ahead, large and small in turn, while nobody reads."""
    count = 5 * RECEIVE_AHEAD
    for k in range(count):
        size = 3 if k % 3 else 20_000
        for each in ends:
            each.outbox.send(Message(Kind.PUSH, k, body=torch.full((size,), float(k))))
    for k in range(count):
        for each in ends:
            message = each.hear()
            (tensor,) = leaves(message.body)
            assert message.index == k and set(tensor.tolist()) == {k}
    assert all(each.inbox.poll() is None for each in ends)


def test_sending_does_not_wait_and_the_backlog_says_what_does(ends: tuple[End, End]) -> None:
    near, far = ends
    count = 40
    for k in range(count):
        near.outbox.send(Message(Kind.PUSH, k, body=torch.zeros(250_000)))  # 1 MB
    received = RECEIVE_AHEAD + 1
    for _ in range(RECEIVE_AHEAD):
        assert far.there.acquire(timeout=PATIENCE)
    # What is on its way: the one being sent, and what the kernel holds.
    assert near.outbox.backlog >= count - received - 10
    assert not far.there.acquire(blocking=False), "more than a few are received ahead"
    far.there.release(RECEIVE_AHEAD)
    assert [far.hear().index for _ in range(count)] == [*range(count)]
    assert near.outbox.backlog == 0


def test_an_empty_inbox_has_nothing(ends: tuple[End, End]) -> None:
    near, far = ends
    assert far.inbox.poll() is None
    near.outbox.send(Message(Kind.FETCH))
    assert far.hear().kind is Kind.FETCH and far.inbox.poll() is None


# Ends -------------------------------------------------------------------------------------------


def test_a_farewell_is_no_loss() -> None:
    near, far = map(End, socket.socketpair())
    near.outbox.send(Message(Kind.FETCH))
    near.outbox.send(Message(Kind.CLOSE))
    near.outbox.leave(PATIENCE)
    near.socket.shutdown(socket.SHUT_WR)
    assert [far.hear().kind, far.hear().kind] == [Kind.FETCH, Kind.CLOSE]
    far.inbox.join(PATIENCE)
    far.outbox.send(Message(Kind.CLOSE))
    assert near.hear().kind is Kind.CLOSE
    for each in (near, far):
        each.inbox.join(PATIENCE)
        assert not each.inbox.is_alive() and each.lost.empty()
        each.socket.close()


@pytest.mark.parametrize("cut", [0, 3, 40, -1000], ids=["nothing", "head", "frame", "tensor"])
def test_a_closed_connection_is_told_once_and_what_was_whole_is_there(cut: int) -> None:
    """Torn between messages, or within one: then that one never arrives."""
    near, far_socket = socket.socketpair()
    far = End(far_socket)
    whole = Message(Kind.PUSH, 5, body=torch.ones(1000))
    frame, following = encode(whole)
    data = bytes(frame) + b"".join(t.numpy().tobytes() for t in following)
    near.sendall(data + data[:cut])
    near.close()
    assert far.hear().index == 5
    error = far.lost.get(timeout=PATIENCE)
    assert isinstance(error, EOFError) and "its connection was closed" in str(error)
    far.inbox.join(PATIENCE)
    assert not far.inbox.is_alive()
    assert far.inbox.poll() is None and far.lost.empty()
    far_socket.close()


def test_sending_into_a_closed_connection_is_told() -> None:
    near, far = socket.socketpair()
    lost: queue.Queue[Exception] = queue.Queue()
    outbox = SocketOutbox(near, lost.put)
    far.close()
    outbox.send(Message(Kind.PUSH, body=torch.ones(100_000)))
    assert "its connection was closed" in str(lost.get(timeout=PATIENCE))
    outbox.leave(PATIENCE)
    assert not outbox.is_alive() and lost.empty()
    near.close()


FRAMES = {
    "negative": struct.pack("q", -1),
    "too short": struct.pack("q", 8),
    "enormous": struct.pack("q", 1 << 40),
    "no room for a head": struct.pack("2q", 16, 0),
    "unknown kind": struct.pack("7q", 56, 99, 0, 0, 0, 0, 0),
    "more than it has": struct.pack("7q", 56, 0, 0, 0, 7, 7, 7),
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("name", FRAMES)
def test_a_frame_that_is_none_is_told_as_a_loss(name: str) -> None:
    near, far = socket.socketpair()
    end = End(far)
    near.sendall(FRAMES[name])
    end.inbox.join(PATIENCE)
    assert not end.inbox.is_alive()
    assert end.lost.qsize() == 1 and end.inbox.poll() is None
    near.close()
    far.close()


def floats(tensor: Tensor) -> list[float]:
    values: list[float] = tensor.tolist()
    return values


def test_a_tensor_made_in_the_call_lives_until_it_is_sent(ends: tuple[End, End]) -> None:
    near, far = ends
    for k in range(20):
        near.outbox.send(Message(Kind.PUSH, k, body=(torch.arange(4000.0) * k)[::2]))
    for k in range(20):
        (tensor,) = leaves(far.hear().body)
        assert floats(tensor) == [2.0 * k * i for i in range(2000)]


def test_one_that_says_nothing_is_told_as_a_loss() -> None:
    """A beat is something: with a silence of half a second, one every tenth keeps it alive."""
    near, far = socket.socketpair()
    lost: queue.Queue[Exception] = queue.Queue()
    arrived: queue.Queue[None] = queue.Queue()
    inbox = SocketInbox(far, lambda: arrived.put(None), lost.put, silence=0.5)
    inbox.start()
    beating = SocketOutbox(near, lost.put, beat=0.1)
    with pytest.raises(queue.Empty):
        lost.get(timeout=1.5)
    beating.send(Message(Kind.VALUE, 7))
    arrived.get(timeout=PATIENCE)
    message = inbox.poll()
    assert message is not None and message.index == 7, "beats are not messages"
    assert inbox.poll() is None and arrived.empty()
    beating._beat = 100.0  # as if its process had been stopped
    error = lost.get(timeout=PATIENCE)
    assert isinstance(error, TimeoutError) and "silent for" in str(error)
