"""Channels between hosts, and between GPUs: a connection over TCP for each direction.

A thread at each end drives it. The sender's waits for its own system alone, and not for the
receiver: messages follow each other while the first is on its way, so what a link takes is waited
for once, and not for each. How much is on its way is for the schedule to bound; the receiver's
thread receives ahead of the computation, at most two messages far.

The connection's buffers are as the system makes them: it lets them grow with what a link holds, and
a size of our own would end that.
"""

import secrets
import socket
import threading
from collections.abc import Callable
from contextlib import closing
from errno import ETIMEDOUT
from os import strerror
from queue import Empty, SimpleQueue
from time import perf_counter
from typing import Any, NamedTuple

from torch import Tensor

from .address import own_address
from .bell import Bell
from .carrier import Carrier
from .channel import Outbox
from .door import Door, dial, prepare
from .errors import InputError
from .introduction import Introduction
from .message import Kind, Message, TensorSpec, complete, decode, encode
from .receiver import Receiver
from .socket_bytes import CLOSED, read_frame
from .timeline import Recorder, Work

__all__ = ["TcpInbox", "TcpOutbox", "meet_receiver", "meet_sender"]

RECEIVE_AHEAD = 2
"""Messages received before they are asked for: bounds memory, hides the link."""

PATIENCE = 20.0
"""Seconds to connect; and for who has connected to be let in, among strangers."""

PROBES = 127
"""So many, the most there are, keep firewalls awake; who is silent is for `watch` to say."""

TOKEN = 32
"""Bytes of what a sender must know to be let in."""

PLACE = 320
"""Bytes for a host's name (255 at most), its address and a port."""

Lost = Callable[[Exception], None]


class _Parcel(NamedTuple):
    """A message on its way out; `ready` is the carrier's mark: when its tensors are complete."""

    kind: Kind
    index: int  # type: ignore[assignment]  # not the tuple's method
    frame: bytearray
    tensors: list[Tensor]
    ready: Any


class TcpOutbox(threading.Thread, Outbox):
    """Sends messages one after the other."""

    def __init__(
        self, end: socket.socket, carrier: Carrier, recorder: Recorder, work: Work, lost: Lost
    ) -> None:
        super().__init__(name="headrace-send", daemon=True)
        self._socket, self._carrier, self._lost = end, carrier, lost
        self._recorder, self._work = recorder, work
        self._queue: SimpleQueue[_Parcel] = SimpleQueue()
        self.start()

    def send(self, message: Message) -> None:
        frame, tensors = encode(message)
        ready = self._carrier.mark()
        self._queue.put(_Parcel(message.kind, message.index, frame, tensors, ready))

    def leave(self, seconds: float) -> None:
        self.join(seconds)

    def run(self) -> None:
        try:
            with self._socket:
                kind = None
                while kind is not Kind.CLOSE:
                    parcel = self._queue.get()
                    kind = parcel.kind
                    start = perf_counter()
                    self._transfer(parcel)
                    self._recorder.note(self._work, parcel.index, start)
                    del parcel
        except Exception as error:  # whatever the carrier raises, the neighbour is out of reach
            self._lost(_why(error))

    def _transfer(self, parcel: _Parcel) -> None:
        self._socket.sendall(parcel.frame)
        for tensor in parcel.tensors:
            self._carrier.send(self._socket, tensor, parcel.ready)


class TcpInbox(Receiver):
    """Receives ahead of the computation, up to `RECEIVE_AHEAD` messages."""

    def __init__(self, end: socket.socket, carrier: Carrier, bell: Bell, lost: Lost) -> None:
        super().__init__(RECEIVE_AHEAD)
        self._socket, self._carrier, self._bell, self._lost = end, carrier, bell, lost
        self.start()

    def run(self) -> None:
        try:
            with self._socket:
                while True:
                    self.make_room()
                    message = self._receive()
                    if message.kind is Kind.CLOSE:
                        return
                    self.put(message)
                    self._bell.ring()
        except Exception as error:  # of a frame that is none, any
            self._lost(_why(error))

    def _receive(self) -> Message:
        message, structure, parts = decode(read_frame(self._socket))
        return complete(message, structure, [(spec, self._there(spec, p)) for spec, p in parts])

    def _there(self, spec: TensorSpec, part: Any) -> Tensor:
        if part is None:
            return self._carrier.receive(self._socket, spec)
        if not isinstance(part, Tensor):
            raise ValueError("what came is no message of Headrace's: it has a tensor elsewhere")
        return part


def _why(error: Exception) -> Exception:
    """A connection that has ended says that the other rank has; what it sent says what it is."""
    if isinstance(error, ConnectionError | EOFError):
        return RuntimeError(CLOSED)
    return RuntimeError(str(error)) if isinstance(error, OSError) else error


def meet_receiver(
    introduction: Introduction,
    carrier: Carrier,
    hop: tuple[int, int],
    recorder: Recorder,
    work: Work,
    lost: Lost,
) -> TcpOutbox:
    """The sender's half of connecting two ranks.

    The receiver says where it listens, and what to say there, so that nobody else takes the place.

    Args:
        hop: the sender's rank and the receiver's.

    Raises:
        InputError: it cannot be reached.
    """
    token = bytes(introduction.hear(TOKEN))
    place = bytes(introduction.hear(PLACE)).decode().split()
    _, address, port = place
    end, trouble = None, 0
    try:
        end = dial(address, int(port), token, PATIENCE)
    except OSError as error:
        trouble = error.errno or ETIMEDOUT
    introduction.tell(trouble)
    if end is None:
        raise _unreachable(hop, place, strerror(trouble))
    (let_in,) = introduction.hear(1)
    if not let_in:
        end.close()
        raise _unreachable(hop, place, ELSEWHERE)
    prepare(end, PROBES)
    return TcpOutbox(end, carrier, recorder, work, lost)


def meet_sender(
    introduction: Introduction, carrier: Carrier, hop: tuple[int, int], bell: Bell, lost: Lost
) -> TcpInbox:
    """The receiver's half."""
    token, address = secrets.token_bytes(TOKEN), own_address()
    arrived: SimpleQueue[socket.socket] = SimpleQueue()
    with closing(Door(arrived.put, token, address)) as door:
        place = [socket.gethostname(), address, str(door.port)]
        introduction.tell(*token)
        introduction.tell(*" ".join(place).encode().ljust(PLACE))
        (trouble,) = introduction.hear(1)
        if trouble:
            raise _unreachable(hop, place, strerror(trouble))
        try:
            end = arrived.get(timeout=PATIENCE)
        except Empty:
            introduction.tell(False)
            raise _unreachable(hop, place, ELSEWHERE) from None
        introduction.tell(True)
    prepare(end, PROBES)
    return TcpInbox(end, carrier, bell, lost)


ELSEWHERE = "another machine answers there"


def _unreachable(hop: tuple[int, int], place: list[str], why: str) -> InputError:
    """Both ranks say the same: one line is printed, of whoever is first."""
    (sender, receiver), (host, address, port) = hop, place
    return InputError(
        f"rank {sender} cannot reach rank {receiver} on {host}, at {address} port {port}: {why}; "
        "between a job's hosts open all TCP ports (the system chooses them, from "
        "net.ipv4.ip_local_port_range), and if that address is of the wrong network, have "
        "GLOO_SOCKET_IFNAME name the interface of the right one"
    )
