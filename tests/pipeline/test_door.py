"""Who knocks at a port: who is let in, who is not, and for how long one may say nothing."""

import queue
import socket
from collections.abc import Iterator
from contextlib import closing, suppress

import pytest

from headrace.pipeline.door import STRANGERS, Door, dial, greet, listen, prepare

PATIENCE = 20.0
"""Seconds after which a test fails; none waits that long otherwise."""

GREETING = b"let me in"


@pytest.fixture
def listening() -> Iterator[socket.socket]:
    with listen("127.0.0.1") as opened:
        yield opened


def test_who_greets_is_let_in(listening: socket.socket) -> None:
    near = dial("127.0.0.1", listening.getsockname()[1], GREETING, PATIENCE)
    far, _ = listening.accept()
    assert greet(far, GREETING, PATIENCE)
    for each in (near, far):
        assert each.gettimeout() is None
        prepare(each, 3)
        assert each.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert each.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        each.close()


class Trickle(socket.socket):
    """What it receives comes three bytes at a time."""

    def recv(self, size: int, flags: int = 0) -> bytes:
        return super().recv(min(size, 3), flags)


def test_a_greeting_may_come_in_pieces(listening: socket.socket) -> None:
    near = dial("127.0.0.1", listening.getsockname()[1], GREETING, PATIENCE)
    near.sendall(b"more")
    far, _ = listening.accept()
    with near, Trickle(fileno=far.detach()) as slow:
        assert greet(slow, GREETING, PATIENCE)
        assert slow.recv(3) == b"mor", "nothing after it is read"


@pytest.mark.parametrize(
    "said", [b"GET / HTTP/1.1\r\n\r\n", b"", GREETING[:-1], GREETING[:-1] + b"?"], ids=str
)
def test_who_does_not_is_shown_out(listening: socket.socket, said: bytes) -> None:
    stranger = socket.create_connection(listening.getsockname(), timeout=PATIENCE)
    far, _ = listening.accept()
    stranger.sendall(said)
    stranger.shutdown(socket.SHUT_WR)
    assert not greet(far, GREETING, PATIENCE)
    assert far.fileno() == -1
    with suppress(ConnectionResetError):  # it was closed before all was read
        assert stranger.recv(1) == b""
    stranger.close()


def test_who_says_nothing_is_shown_out_in_the_end(listening: socket.socket) -> None:
    with socket.create_connection(listening.getsockname(), timeout=PATIENCE) as stranger:
        far, _ = listening.accept()
        assert not greet(far, GREETING, 0.01)
        assert stranger.recv(1) == b""


def test_nobody_opens() -> None:
    with listen("127.0.0.1") as closed:
        port = closed.getsockname()[1]
    with pytest.raises(OSError):
        dial("127.0.0.1", port, GREETING, PATIENCE)


def test_it_is_where_it_was_asked_for() -> None:
    with listen("127.0.0.1") as free:
        port = free.getsockname()[1]
        assert free.getsockname()[0] == "127.0.0.1"
        with pytest.raises(OSError):
            listen("127.0.0.1", port)
    with listen("127.0.0.1", port) as again:
        assert again.getsockname()[1] == port


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_door_lets_in_whom_it_knows_among_strangers(host: str) -> None:
    """As many as may leave it unsaid who they are are there already, but for one."""
    inside: queue.Queue[socket.socket] = queue.Queue()
    try:
        door = Door(inside.put, GREETING, host)
    except OSError as error:
        pytest.skip(f"no {host} here: {error}")
    with closing(door):
        address = (host, door.port)
        silent = [socket.create_connection(address, PATIENCE) for _ in range(STRANGERS - 1)]
        with socket.create_connection(address, PATIENCE) as wrong:
            wrong.sendall(b"X" * len(GREETING))
            assert wrong.recv(1) == b"", "shown out at once"
        with dial(host, door.port, GREETING, PATIENCE) as near:
            near.sendall(b"hello")
            with inside.get(timeout=PATIENCE) as far:
                assert far.recv(5) == b"hello"
        assert inside.empty()
        for stranger in silent:
            stranger.close()


def test_a_closed_door_is_closed() -> None:
    door = Door(lambda end: None, GREETING, "127.0.0.1")
    door.close()
    with pytest.raises(ConnectionRefusedError):
        dial("127.0.0.1", door.port, GREETING, PATIENCE)
