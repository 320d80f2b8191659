"""Whoever sleeps on a bell wakes when it rings, when the file is readable, or in time."""

import os
import threading
import time

from headrace.pipeline.bell import Bell


def seconds_to_wake(bell: Bell, seconds: float, file: int | None = None) -> float:
    start = time.monotonic()
    bell.wait(seconds, file)
    return time.monotonic() - start


def test_nobody_rings() -> None:
    assert 0.04 < seconds_to_wake(Bell(), 0.05) < 5


def test_a_ring_wakes_who_waits() -> None:
    bell = Bell()
    threading.Timer(0.05, bell.ring).start()
    assert seconds_to_wake(bell, 30) < 10


def test_a_ring_is_kept_for_who_comes_later_and_heard_once() -> None:
    bell = Bell()
    for _ in range(100_000):  # more than a pipe holds: ringing never waits
        bell.ring()
    while seconds_to_wake(bell, 0.05) < 0.04:
        pass  # it takes several looks to empty a full pipe
    bell.ring()
    assert seconds_to_wake(bell, 30) < 10
    assert seconds_to_wake(bell, 0.05) > 0.04


def test_a_file_wakes_who_waits_for_it_alone() -> None:
    bell = Bell()
    reads, writes = os.pipe()
    os.write(writes, b"x")
    assert seconds_to_wake(bell, 30, reads) < 10
    assert seconds_to_wake(bell, 0.05) > 0.04, "it waits for the bell only"
    bell.ring()
    assert seconds_to_wake(bell, 30, reads) < 10
    os.close(writes)
    os.close(reads)
