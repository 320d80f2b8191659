"""A message on an emulated link arrives when it would on a real one of that speed."""

import threading
import time

import torch

from headrace.pipeline.channel import LocalChannel, Outbox
from headrace.pipeline.emulated_link import EmulatedLink
from headrace.pipeline.link import Link
from headrace.pipeline.message import Kind, Message


class Arrivals(LocalChannel):
    """Notes when each message arrives; is full at first."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []
        self.indices: list[int] = []
        self.refusals = 2

    def send(self, message: Message) -> None:
        self.times.append(time.perf_counter())
        self.indices.append(message.index)

    def flush(self) -> bool:
        self.refusals -= 1
        return self.refusals < 0


def arrivals(link: Link, count: int) -> list[float]:
    """When `count` messages of 1000 bytes, sent at once, arrive; in seconds after the sending."""
    channel = Arrivals()
    slow = EmulatedLink(channel, link, lambda error: None)
    body = torch.zeros(1000, dtype=torch.uint8)
    start = time.perf_counter()
    for k in range(count):
        slow.send(Message(Kind.MICRO_BATCH, k, body=body))
    slow.send(Message(Kind.CLOSE))
    assert time.perf_counter() - start < link.latency, "sending does not wait"
    slow.leave(10)
    assert channel.indices == [*range(count), -1]
    return [moment - start for moment in channel.times]


def test_latency_is_shared_by_messages_that_follow_each_other() -> None:
    times = arrivals(Link(latency=0.4), 4)
    assert all(0.4 <= moment < 0.8 for moment in times)


def test_bandwidth_keeps_messages_apart() -> None:
    times = arrivals(Link(latency=0.2, bandwidth=50_000), 3)  # 20 ms each
    for k, moment in enumerate(times[:-1]):
        assert moment >= 0.02 * (k + 1) + 0.2
    assert times[-1] < 2


def test_an_error_is_told() -> None:
    class Broken(Outbox):
        def send(self, message: Message) -> None:
            raise OSError("no route")

    told: list[Exception] = []
    ready = threading.Event()

    def tell(error: Exception) -> None:
        told.append(error)
        ready.set()

    EmulatedLink(Broken(), Link(), tell).send(Message(Kind.CLOSE))
    assert ready.wait(10) and str(told[0]) == "no route"
