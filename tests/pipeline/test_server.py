"""A parameter server in this process, and replicas that are bare connections to it.

What one connection sends is handled in that order, so an answer to a later question proves that an
earlier one was not answered: no test sleeps to see that something waits.
"""

import queue
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headrace.pipeline.corrections import DelayCompensation
from headrace.pipeline.link import Link
from headrace.pipeline.message import Kind, Message, encode
from headrace.pipeline.nest import leaves
from headrace.pipeline.replicas.client import knock
from headrace.pipeline.replicas.elastic import Centre
from headrace.pipeline.replicas.request import unpack
from headrace.pipeline.replicas.server import Checkpoint, Members, Server, Serves, pack
from headrace.pipeline.replicas.shard import Protocol, Shard
from headrace.pipeline.report import ShardStatistics
from headrace.pipeline.settings import Settings
from headrace.pipeline.socket_channel import SocketInbox, SocketOutbox

PATIENCE = 20.0
"""Seconds after which a test fails; none waits that long otherwise."""

NAMES = ["large", "small", "table"]
"""The large one follows its frame, the small one is in it, the table's gradients are sparse."""


def start_weights() -> dict[str, Tensor]:
    return {
        "large": torch.arange(1200, dtype=torch.float64).view(40, 30),
        "small": torch.tensor([1.0, 2.0], dtype=torch.float64),
        "table": torch.zeros(50, 3, dtype=torch.float64),
    }


def make_shard(
    protocol: Protocol = Protocol(),  # noqa: B008
    replicas: int = 2,
    **more: Any,
) -> Shard:
    """With a learning rate of 1."""
    settings = Settings(nn.MSELoss(), partial(torch.optim.SGD, lr=1.0), **more)
    return Shard(1, start_weights(), settings, protocol, range(replicas))


def gradients(generator: torch.Generator) -> dict[str, Tensor]:
    """Whole numbers, which add up exactly in any order; now and then a weight has none."""
    draw = partial(torch.randint, -9, 10, generator=generator)
    rows = torch.randint(0, 50, (1, 4), generator=generator)  # one may occur twice
    values = draw((4, 3)).double()
    found = {"large": draw((40, 30)).double(), "small": draw((2,)).double()}
    found["table"] = torch.sparse_coo_tensor(rows, values, (50, 3), check_invariants=True)
    if torch.randint(0, 4, (), generator=generator) == 0:
        del found["small"]
    return found


class Replica:
    """A connection, and what it is told."""

    def __init__(self, port: int, number: int) -> None:
        self.number = number
        self.socket = knock("127.0.0.1", port)
        self.there = threading.Semaphore(0)
        self.lost: queue.Queue[Exception] = queue.Queue()
        self.outbox = SocketOutbox(self.socket, self.lost.put)
        self.inbox = SocketInbox(self.socket, self.there.release, self.lost.put)
        self.inbox.start()
        self.send(Kind.JOIN, number)

    def send(self, kind: Kind, *numbers: float, body: Any = None) -> None:
        self.outbox.send(Message(kind, numbers=tuple(map(float, numbers)), body=body))

    def push(self, tensors: Mapping[str, Tensor], *versions: int, samples: int = 1) -> None:
        self.send(Kind.PUSH, samples, *versions, body=pack(tensors, NAMES))

    def hear(self, kind: Kind) -> Message:
        assert self.there.acquire(timeout=PATIENCE), f"replica {self.number} heard nothing"
        message = self.inbox.poll()
        assert message is not None and message.kind is kind
        return message

    def weights(self) -> dict[str, Tensor]:
        """What comes as an answer."""
        return dict(zip(NAMES, leaves(self.hear(Kind.WEIGHTS).body), strict=True))

    def fetch(self) -> dict[str, Tensor]:
        self.send(Kind.FETCH)
        return self.weights()

    def ask(self) -> ShardStatistics:
        """The figures, once all that was sent before has been handled."""
        self.send(Kind.ASK)
        return ShardStatistics.from_numbers(self.hear(Kind.VALUE).numbers)

    def settle(self, *buffers: Tensor) -> None:
        self.send(Kind.SETTLE, body=[*buffers])

    def close(self) -> None:
        self.send(Kind.CLOSE)
        self.hear(Kind.CLOSE)
        self.outbox.leave(PATIENCE)
        self.inbox.join(PATIENCE)
        self.socket.close()


@dataclass
class Place:
    """A server, what it tells, and the replicas that came."""

    server: Server
    joined: "queue.Queue[int]"
    left: "queue.Queue[tuple[int, bool]]"
    failed: "queue.Queue[Exception]"
    replicas: list[Replica]

    def meet(self, *numbers: int) -> list[Replica]:
        for number in numbers:
            self.replicas.append(Replica(self.server.port, number))
            assert self.joined.get(timeout=PATIENCE) == number
        return self.replicas[-len(numbers) :]


Open = Callable[..., Place]


@pytest.fixture
def open_server() -> Iterator[Open]:
    """Starts servers, which are closed in the end, as is what is connected to them."""
    places: list[Place] = []

    def start(
        shard: Serves,
        expected: set[int] | None = None,
        *,
        fails: bool = False,
        seated: Callable[[int], bool] = lambda replica: True,
        **more: Any,
    ) -> Place:
        joined: queue.Queue[int] = queue.Queue()
        left: queue.Queue[tuple[int, bool]] = queue.Queue()
        failed: queue.Queue[Exception] = queue.Queue()
        members = Members(expected, joined.put, lambda r, lost: left.put((r, lost is None)), seated)
        server = Server(shard, members, failed.put, **more)
        places.append(Place(server, joined, left, failed, []))
        allowed.append(fails)
        return places[-1]

    allowed: list[bool] = []
    yield start
    for place, fails in zip(places, allowed, strict=True):
        place.server.close()
        for replica in place.replicas:
            replica.outbox.send(Message(Kind.CLOSE))
            replica.socket.close()
        assert fails or place.failed.empty(), place.failed.get()


def assert_same(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert list(got) == list(wanted)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def subtract(weights: Mapping[str, Tensor], *pushed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a learning rate of 1 makes of them."""
    result = {name: weight.clone() for name, weight in weights.items()}
    for each in pushed:
        for name, gradient in each.items():
            result[name] -= gradient.to_dense()
    return result


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# What is packed ---------------------------------------------------------------------------------


def test_what_is_packed_is_unpacked() -> None:
    table = torch.sparse_coo_tensor(
        [[4, 1, 4]], torch.arange(6.0).view(3, 2), (9, 2), check_invariants=True
    )
    nothing = torch.sparse_coo_tensor((9, 2), check_invariants=True)
    sent = {"a": torch.ones(2, 3), "t": table, "u": table.coalesce(), "0": nothing}
    names = ["t", "missing", "a", "0", "u"]
    body = pack(sent, names)
    assert body[1] is None
    encode(Message(Kind.PUSH, body=body))
    got = unpack(body, {name: sent.get(name, torch.zeros(7)) for name in names})
    assert list(got) == ["t", "a", "0", "u"]
    for name, tensor in got.items():
        assert tensor.is_sparse == sent[name].is_sparse and tensor.shape == sent[name].shape
        assert torch.equal(tensor.to_dense(), sent[name].to_dense())
    assert got["t"].coalesce().indices().tolist() == [[1, 4]]
    assert got["t"].coalesce().values().tolist() == [[2, 3], [0 + 4, 1 + 5]]


def test_as_many_tensors_as_weights() -> None:
    with pytest.raises(ValueError, match="for 2 weights"):
        unpack([torch.ones(1)], {"a": torch.ones(1), "b": torch.ones(1)})


# Several at once --------------------------------------------------------------------------------


def test_what_was_pushed_at_random_adds_up_exactly(open_server: Open) -> None:
    count, each = 4, 25
    place = open_server(make_shard(replicas=count), set(range(count)))
    replicas = place.meet(*range(count))
    pushed: list[list[dict[str, Tensor]]] = [[] for _ in replicas]
    settled: list[Message | None] = [None] * count

    def train(replica: Replica) -> None:
        generator, pauses = seeded(replica.number), random.Random(replica.number)
        for _ in range(each):
            time.sleep(pauses.random() * 0.002)  # for another order of pushes each time
            tensors = gradients(generator)
            pushed[replica.number].append(tensors)
            replica.push(tensors, 0)
            if pauses.random() < 0.5:
                replica.fetch()
        replica.settle(torch.tensor([float(replica.number)]))
        settled[replica.number] = replica.hear(Kind.WEIGHTS)

    threads = [threading.Thread(target=train, args=[replica]) for replica in replicas]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    expected = subtract(start_weights(), *(tensors for row in pushed for tensors in row))
    for message in settled:
        assert message is not None
        *weights, buffer = leaves(message.body)
        assert_same(dict(zip(NAMES, weights, strict=True)), expected)
        assert buffer.tolist() == [0], "the first replica's"
        assert message.numbers[0] == count * each and message.numbers[2:] == (1.0,)
    statistics = replicas[0].ask()
    assert statistics.pushed == dict.fromkeys(range(count), each)
    assert statistics.staleness == {age: 1 for age in range(count * each)}
    assert (statistics.stage, statistics.updates) == (1, count * each)
    assert statistics.learning_rate == 1.0
    assert place.server.settlings == 1


def test_an_answer_comes_after_all_that_was_pushed_before(open_server: Open) -> None:
    (replica,) = open_server(make_shard(replicas=1), {0}).meet(0)
    generator, weights = seeded(0), start_weights()
    for k in range(10):
        tensors = gradients(generator)
        replica.push(tensors, k)
        weights = subtract(weights, tensors)
        replica.send(Kind.FETCH)
        message = replica.hear(Kind.WEIGHTS)
        assert_same(dict(zip(NAMES, leaves(message.body), strict=True)), weights)
        assert message.numbers == (k + 1, 0, 1.0)


def test_several_questions_are_answered_one_by_one(open_server: Open) -> None:
    """A replica with a prefetch of 2 asks again before the answer has come."""
    (replica,) = open_server(make_shard(replicas=1), {0}).meet(0)
    tensors = gradients(seeded(1))
    for _ in range(3):
        replica.push(tensors, 0)
        replica.send(Kind.FETCH)
    heard = [replica.hear(Kind.WEIGHTS) for _ in range(3)]
    assert [message.numbers[:2] for message in heard] == [(1, 0), (2, 1), (3, 2)]
    for k, message in enumerate(heard):
        expected = subtract(start_weights(), *[tensors] * (k + 1))
        assert_same(dict(zip(NAMES, leaves(message.body), strict=True)), expected)


def test_a_fetch_is_withheld_until_it_may_be_answered(open_server: Open) -> None:
    place = open_server(make_shard(Protocol(2, waits=True)), {0, 1})
    first, second = place.meet(0, 1)
    a, b = gradients(seeded(1)), gradients(seeded(2))
    for tensors in (a, b):
        tensors["small"] = torch.ones(2, dtype=torch.float64)
    first.push(a, 0)
    first.send(Kind.FETCH)
    assert first.ask().updates == 0  # this came, and the weights did not
    second.push(b, 0)
    assert second.ask().updates == 1
    assert_same(
        {n: 2 * w for n, w in first.weights().items()},
        subtract({n: 2 * w for n, w in start_weights().items()}, a, b),
    )


def test_a_centre_gives_each_its_own_difference(open_server: Open) -> None:
    centre = Centre(0, start_weights(), 0.5)
    place = open_server(centre, {0, 1})
    for replica, number in zip(place.meet(0, 1), (3.0, -1.0), strict=True):
        offered = {name: torch.full_like(w, number) for name, w in start_weights().items()}
        before = centre.snapshot()
        replica.push(offered, 0, samples=0)
        moved = replica.fetch()
        assert_same(moved, {name: 0.5 * (offered[name] - before[name]) for name in NAMES})
        assert_same(centre.snapshot(), {name: before[name] + moved[name] for name in NAMES})


# Settling ---------------------------------------------------------------------------------------


def test_settling_waits_for_all_and_gives_everybody_the_same(open_server: Open) -> None:
    """What softsync had left over is in it."""
    place = open_server(make_shard(Protocol(3), replicas=3), {0, 1, 2})
    replicas = place.meet(0, 1, 2)
    tensors = gradients(seeded(5))
    replicas[0].push(tensors, 0)  # from here on its buffers count
    for round_ in range(3):
        for replica in (replicas[2], replicas[0]):
            replica.settle(torch.tensor([10.0 * round_ + replica.number]))
            replica.ask()  # this came, and the weights did not
        replicas[1].settle(torch.tensor([10.0 * round_ + 1]))
        for replica in replicas:
            message = replica.hear(Kind.WEIGHTS)
            *weights, buffer = leaves(message.body)
            expected = subtract(start_weights(), tensors)
            assert_same(dict(zip(NAMES, weights, strict=True)), expected)
            assert buffer.tolist() == [10 * round_] and message.numbers[0] == 1
        assert place.server.settlings == round_ + 1


def test_while_one_rests_the_others_go_on(open_server: Open) -> None:
    place = open_server(make_shard(Protocol(2, waits=True)), {0, 1})
    first, second = place.meet(0, 1)
    second.settle()
    assert second.ask().updates == 0
    for k in range(3):
        first.push(gradients(seeded(k)), k)
        first.fetch()
    first.settle()
    assert_same(first.weights(), second.weights())
    first.push(gradients(seeded(7)), 3)
    first.send(Kind.FETCH)
    assert first.ask().updates == 3, "from here on they wait for each other again"


def test_loaded_weights_are_everybodys(open_server: Open) -> None:
    place = open_server(make_shard(), {0, 1})
    first, second = place.meet(0, 1)
    loaded = {name: torch.full_like(w, 7.0) for name, w in start_weights().items()}
    first.send(Kind.LOAD, body=pack(loaded, NAMES))
    for replica in (first, second):
        replica.settle()
    for replica in (first, second):
        assert_same(replica.weights(), loaded)
        assert_same(replica.fetch(), loaded)


def test_gradients_of_settled_weights_are_compensated(open_server: Open) -> None:
    """g + λ g² (w_now - w_then), where w_then came by settling and not by a fetch."""
    shard = make_shard(Protocol(2), corrections=(DelayCompensation(1.0),))
    first, second = open_server(shard, {0, 1}).meet(0, 1)
    ones = {"small": torch.ones(2, dtype=torch.float64)}
    assert first.fetch()["small"].tolist() == second.fetch()["small"].tolist() == [1, 2]
    first.push(ones, 0)
    for replica in (first, second):
        replica.settle()
    for replica in (first, second):
        assert replica.weights()["small"].tolist() == [0, 1]  # version 1
    first.push(ones, 1)
    assert first.ask().updates == 1
    second.push(ones, 1)
    assert second.fetch()["small"].tolist() == [-1, 0]
    first.push(ones, 1)
    assert first.ask().updates == 2
    second.push(ones, 1)
    assert second.fetch()["small"].tolist() == [-1, 0]  # each 1 + 1·1·(-1) = 0


# Coming and going -------------------------------------------------------------------------------

CUTS = {"between messages": 0, "in the head": 5, "in the frame": 100, "in a tensor": -4000}


@pytest.mark.parametrize("where", CUTS)
def test_one_that_disappears_in_the_middle(open_server: Open, where: str) -> None:
    """Its whole pushes count, its torn one does not, and the others go on without it."""
    place = open_server(make_shard(Protocol(bound=3), replicas=3), {0, 1, 2})
    replicas = place.meet(0, 1, 2)
    generator = seeded(3)
    pushed = [gradients(generator) for _ in range(4)]
    lost = replicas[1]
    for tensors in pushed[:2]:
        lost.push(tensors, 0)
    assert lost.ask().pushed == {1: 2}
    torn = Message(Kind.PUSH, numbers=(1.0, 0.0), body=pack(gradients(generator), NAMES))
    frame, following = encode(torn)
    data = bytes(frame) + b"".join(t.contiguous().numpy().tobytes() for t in following)
    lost.socket.sendall(data[: CUTS[where]])
    lost.socket.shutdown(socket.SHUT_RDWR)
    assert place.left.get(timeout=PATIENCE) == (1, False)
    replicas[0].push(pushed[2], 0)
    assert_same(replicas[0].fetch(), subtract(start_weights(), *pushed[:3]))
    for _ in range(5):
        replicas[0].push({}, 3)
    replicas[0].send(Kind.FETCH)
    assert replicas[0].ask().pushed == {0: 6, 1: 2}, "too far ahead of replica 2 for weights"
    replicas[2].push(pushed[3], 2)
    replicas[2].push({}, 2)
    replicas[2].push({}, 2)
    assert_same(replicas[0].weights(), subtract(start_weights(), *pushed))
    assert place.server.connected == 2 and place.left.empty()


def test_a_loss_is_told_once_though_answers_were_on_their_way(open_server: Open) -> None:
    place = open_server(make_shard(), {0, 1})
    first, lost = place.meet(0, 1)
    for _ in range(50):
        lost.send(Kind.FETCH)
    lost.socket.shutdown(socket.SHUT_RDWR)
    assert place.left.get(timeout=PATIENCE) == (1, False)
    for _ in range(3):
        first.fetch()
    assert place.left.empty() and place.server.connected == 1


def test_garbage_of_a_replica_is_a_loss_of_that_one_alone(open_server: Open) -> None:
    place = open_server(make_shard(), {0, 1})
    first, broken = place.meet(0, 1)
    assert broken.ask().updates == 0
    broken.socket.sendall(b"\xff" * 64)
    assert place.left.get(timeout=PATIENCE) == (1, False)
    assert_same(first.fetch(), start_weights())


def test_a_lost_replica_leaves_no_thread_behind(open_server: Open) -> None:
    place = open_server(make_shard(), {0, 1})
    place.meet(0)
    before = {*threading.enumerate()}
    (lost,) = place.meet(1)
    lost.fetch()
    lost.socket.shutdown(socket.SHUT_RDWR)
    assert place.left.get(timeout=PATIENCE) == (1, False)
    lost.inbox.join(PATIENCE)
    for thread in {*threading.enumerate()} - before - {lost.outbox}:
        thread.join(5)
        assert not thread.is_alive(), thread.name


def test_a_stranger_at_the_door_disturbs_nobody(open_server: Open) -> None:
    place = open_server(make_shard(), {0, 1})
    (first,) = place.meet(0)
    address = ("127.0.0.1", place.server.port)
    silent = socket.create_connection(address, timeout=PATIENCE)
    with socket.create_connection(address, timeout=PATIENCE) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(100))
        with suppress(ConnectionResetError):  # it was closed before all was read
            assert stranger.recv(100) == b""
    assert_same(first.fetch(), start_weights())
    assert place.server.connected == 1 and place.joined.empty() and place.left.empty()
    place.meet(1)
    silent.close()


def test_who_has_taken_no_seat_is_shown_the_door(open_server: Open) -> None:
    place = open_server(make_shard(replicas=0), seated={3, 5}.__contains__)
    (first,) = place.meet(3)
    unseated = Replica(place.server.port, 12345)
    place.replicas.append(unseated)
    unseated.hear(Kind.CLOSE)
    place.meet(5)
    assert_same(first.fetch(), start_weights())
    assert place.server.connected == 2 and place.joined.empty() and place.left.empty()


def test_a_farewell_is_answered_and_told(open_server: Open) -> None:
    place = open_server(make_shard(), {0, 1})
    first, second = place.meet(0, 1)
    second.push(gradients(seeded(0)), 0)
    second.close()
    assert place.left.get(timeout=PATIENCE) == (1, True)
    assert first.ask().pushed == {1: 1} and place.server.connected == 1
    assert second.lost.empty()


def test_one_that_comes_late_trains_on_what_is_there(open_server: Open) -> None:
    """Without anybody expected each settles for itself, and may come whenever it likes."""
    place = open_server(make_shard(Protocol(2, waits=True), replicas=0))
    (first,) = place.meet(4)
    generator, weights = seeded(1), start_weights()
    for k in range(5):
        tensors = gradients(generator)
        weights = subtract(weights, tensors)
        first.push(tensors, k)
    assert_same(first.fetch(), weights)
    (late,) = place.meet(9)
    late.send(Kind.FETCH)
    message = late.hear(Kind.WEIGHTS)
    assert message.numbers[:2] == (5, 0)
    assert_same(dict(zip(NAMES, leaves(message.body), strict=True)), weights)
    late.settle(torch.tensor([2.0]))
    *settled, buffer = leaves(late.hear(Kind.WEIGHTS).body)
    assert_same(dict(zip(NAMES, settled, strict=True)), weights)
    assert buffer.tolist() == [2], "its own"
    a, b = gradients(generator), gradients(generator)
    late.push(a, 5)
    assert late.ask().updates == 5, "now two make an update"
    first.push(b, 5)
    assert first.ask().updates == 6
    assert late.ask().pushed == {4: 6, 9: 1}
    late.close()
    first.push(a, 6)
    assert first.ask().updates == 7, "and one does again"


# Its own end ------------------------------------------------------------------------------------


def test_closing_says_goodbye_to_all(open_server: Open) -> None:
    place = open_server(make_shard(), {0, 1})
    replicas = place.meet(0, 1)
    place.server.close()
    for replica in replicas:
        replica.hear(Kind.CLOSE)
        replica.inbox.join(PATIENCE)
        assert not replica.inbox.is_alive() and replica.lost.empty()


def test_a_closed_door_opens_to_nobody(open_server: Open) -> None:
    place = open_server(make_shard(), {0, 1})
    place.meet(0)
    place.server.close()
    for _ in range(2):
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", place.server.port), timeout=PATIENCE).close()


def test_what_goes_wrong_in_the_server_is_told(
    open_server: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    def take(*_: object) -> None:
        raise RuntimeError("no memory is left")

    shard = make_shard()
    monkeypatch.setattr(shard, "take", take)
    place = open_server(shard, {0, 1}, fails=True)
    (replica,) = place.meet(0)
    replica.push(gradients(seeded(1)), 0)
    assert str(place.failed.get(timeout=PATIENCE)) == "no memory is left"


def test_a_slow_link_carries_the_answers(open_server: Open) -> None:
    place = open_server(make_shard(), {0, 1}, emulated_link=Link(latency=0.05))
    (replica,) = place.meet(0)
    start = time.perf_counter()
    assert_same(replica.fetch(), start_weights())
    assert time.perf_counter() - start >= 0.05


# Checkpoints ------------------------------------------------------------------------------------


class Noting(Checkpoint):
    """Tells of each file that was written."""

    def write(self, state: Mapping[str, object]) -> None:
        super().write(state)
        self.written.put(int(state["version"]))  # type: ignore[call-overload]

    written: "queue.Queue[int]"


def noting(file: Path, every: int) -> Noting:
    checkpoint = Noting(file, every)
    object.__setattr__(checkpoint, "written", queue.Queue())
    return checkpoint


MOMENTUM = partial(torch.optim.SGD, lr=0.25, momentum=0.5)


def with_momentum() -> Shard:
    decay = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
    settings = Settings(nn.MSELoss(), MOMENTUM, decay)
    return Shard(1, start_weights(), settings, Protocol(), [0])


def dense(generator: torch.Generator) -> dict[str, Tensor]:
    return {name: value.to_dense() for name, value in gradients(generator).items()}


def test_what_comes_has_no_graph() -> None:
    """A centre that moved towards weights that ask for gradients would keep the way it came."""
    (weight,) = unpack([torch.ones(2, requires_grad=True)], {"w": torch.zeros(2)}).values()
    assert not weight.requires_grad


def test_a_checkpoint_is_written_every_so_many_updates(open_server: Open, tmp_path: Path) -> None:
    """And what it holds is a shard that goes on to the same numbers."""
    checkpoint = noting(tmp_path / "to" / "be" / "made" / "stage-1.pt", 3)
    shard, twin = with_momentum(), with_momentum()
    place = open_server(shard, {0}, checkpoint=checkpoint)
    (replica,) = place.meet(0)
    generator = seeded(0)
    for k in range(1, 8):
        tensors = dense(generator)
        replica.push(tensors, k - 1)
        assert replica.ask().updates == k
        twin.take(0, {name: value.clone() for name, value in tensors.items()}, 1, [k - 1])
        if k % 3 == 0:
            assert checkpoint.written.get(timeout=PATIENCE) == k
            found = with_momentum()
            found.load_state_dict(torch.load(checkpoint.file, weights_only=True))
            assert found.statistics == twin.statistics
            assert_same(found.snapshot(), twin.snapshot())
    place.server.close()
    assert checkpoint.written.get(timeout=PATIENCE) == 7 and checkpoint.written.empty()
    assert [file.name for file in checkpoint.file.parent.iterdir()] == ["stage-1.pt"]
    found = with_momentum()
    found.load_state_dict(torch.load(checkpoint.file, weights_only=True))
    for each in (found, twin):
        each.take(0, dense(seeded(9)), 1, [7])
    assert_same(found.snapshot(), twin.snapshot())
    assert found.learning_rates == twin.learning_rates == [0.25 * 0.5**8]


def test_updates_are_counted_from_where_a_checkpoint_left_off(
    open_server: Open, tmp_path: Path
) -> None:
    checkpoint, shard = noting(tmp_path / "stage-1.pt", 3), with_momentum()
    shard.version = 10
    (replica,) = open_server(shard, {0}, checkpoint=checkpoint).meet(0)
    for k in range(10, 13):
        assert checkpoint.written.empty()
        replica.push(dense(seeded(k)), k)
    assert checkpoint.written.get(timeout=PATIENCE) == 13


def test_a_checkpoint_that_fails_half_way_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(tmp_path / "stage-1.pt", 1)
    checkpoint.write({"version": 1})

    def half(state: Any, file: Any) -> None:
        file.write(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="no space left"):
        checkpoint.write({"version": 2})
    monkeypatch.undo()
    assert torch.load(checkpoint.file, weights_only=True) == {"version": 1}
    checkpoint.write({"version": 3})
    assert torch.load(checkpoint.file, weights_only=True) == {"version": 3}


def test_a_checkpoint_that_cannot_be_written_is_told(open_server: Open, tmp_path: Path) -> None:
    class Full(Checkpoint):
        def write(self, state: Mapping[str, object]) -> None:
            if state["version"] == 1:
                raise OSError("no space left on device")

    place = open_server(
        make_shard(replicas=1), {0}, fails=True, checkpoint=Full(tmp_path / "stage-1.pt", 1)
    )
    (replica,) = place.meet(0)
    replica.push(gradients(seeded(0)), 0)
    assert "no space left" in str(place.failed.get(timeout=PATIENCE))
    replica.push(gradients(seeded(1)), 1)
    assert replica.ask().updates == 2, "training goes on"


def test_a_server_says_what_it_goes_on_from(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "stage-1.pt", 3)
    assert checkpoint.resume(with_momentum()) == ""
    shard = with_momentum()
    shard.take(0, dense(seeded(0)), 1, [0])
    checkpoint.write(shard.state_dict())
    note = checkpoint.resume(with_momentum())
    assert note.endswith(f"goes on from {checkpoint.file}, after 1 updates")
    other = Shard(1, {"w": torch.zeros(2)}, settings(adagrad), Protocol(), {0})
    with pytest.raises(ValueError, match=r"stage-1\.pt is not of these weights and optimizer"):
        checkpoint.resume(other)
    same = Shard(1, with_momentum().snapshot(), settings(adagrad), Protocol(), {0})
    with pytest.raises(ValueError, match=r"the state of \['SGD'\], where \['Adagrad'\] is wanted"):
        checkpoint.resume(same)


def adagrad(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adagrad(parameters)


def settings(optimizer: Any) -> Settings:
    return Settings(loss_fn=torch.nn.Identity(), optimizer=optimizer)


def test_buffers_of_those_who_trained_go_to_those_who_come(
    open_server: Open, tmp_path: Path
) -> None:
    """Statistics of normalisation: with the first answer, at rest, and in the checkpoint."""
    checkpoint = Checkpoint(tmp_path / "stage-1.pt", 1)
    place = open_server(make_shard(replicas=0), checkpoint=checkpoint)
    (first,) = place.meet(0)
    first.push(gradients(seeded(0)), 0)
    first.send(Kind.BUFFERS, body=[torch.tensor([3.0])])
    first.send(Kind.FETCH)
    assert len(leaves(first.hear(Kind.WEIGHTS).body)) == len(NAMES), "it has its own"
    (late,) = place.meet(1)
    late.send(Kind.FETCH)
    *_, buffer = leaves(late.hear(Kind.WEIGHTS).body)
    assert buffer.tolist() == [3]
    late.settle(torch.tensor([0.0]))  # as it was built
    *_, buffer = leaves(late.hear(Kind.WEIGHTS).body)
    assert buffer.tolist() == [3], "not its own: it has not trained"
    place.server.close()
    again = make_shard(replicas=0)
    checkpoint.resume(again)
    assert [each.tolist() for each in again.buffers] == [[3]]
