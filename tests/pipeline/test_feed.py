"""What the first stage is fed, and that a loader at fault leaves the stages whole."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, TensorDataset

from headrace.pipeline import InputError, Pipeline
from headrace.pipeline.feed import deal, read
from headrace.pipeline.grid import Grid

from .alone import leaf

Batch = tuple[Tensor, Tensor]


def batches(count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(6, 4, generator=generator), torch.randint(0, 2, (6,), generator=generator))
        for _ in range(count)
    ]


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))


def build() -> Pipeline:
    return Pipeline(
        model(),
        nn.CrossEntropyLoss(),
        lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        stages=2,
        balance=[1, 2],
    )


def test_training_goes_on_after_a_loader_raised() -> None:
    data = batches(5)

    def raises_at_3() -> Iterator[Batch]:
        yield from data[:3]
        raise KeyError("x")

    interrupted, plain = build(), build()
    for name, pipe, loader in (("bad", interrupted, raises_at_3()), ("good", plain, data[:3])):
        if name == "bad":
            with pytest.raises(InputError, match=r"KeyError: 'x' while making mini-batch 3 \("):
                pipe.train(loader)
        else:
            pipe.train(loader)
        pipe.train(data)
    same = zip(interrupted.state_dict().values(), plain.state_dict().values(), strict=True)
    assert interrupted.version == plain.version == 8
    assert all(torch.equal(a, b) for a, b in same)


def test_evaluation_goes_on_after_a_loader_raised() -> None:
    pipe, data = build(), batches(3)
    with pytest.raises(InputError, match="mini-batch 1"):
        pipe.evaluate(iter([data[0], data]))  # the second is no pair
    x, target = data[0]
    expected = nn.functional.cross_entropy(model()(x), target).item()
    assert pipe.evaluate(data[:1])["loss"] == pytest.approx(expected, abs=1e-6)


def test_a_metric_must_not_take_the_name_of_the_loss() -> None:
    with pytest.raises(ValueError, match="rename it"):
        build().evaluate(batches(1), {"loss": lambda output, target: 0.0})


def dealt(loader: Any, grid: Grid) -> list[int]:
    """The first number of each mini-batch that a replica gets."""
    return [int(leaf(x)[0]) for x, _ in deal(read(loader, True), loader, grid)]


def numbered(count: int) -> list[Batch]:
    return [(torch.tensor([k]), torch.tensor([k])) for k in range(count)]


@pytest.mark.parametrize(("count", "replicas"), [(6, 3), (7, 3), (8, 3), (3, 3), (4, 2), (5, 1)])
def test_every_mini_batch_goes_to_one_replica(count: int, replicas: int) -> None:
    for stages in (1, 2):
        got = [
            dealt(numbered(count), Grid(stages, replicas, rank=stages * replica))
            for replica in range(replicas)
        ]
        assert got == [[*range(replica, count, replicas)] for replica in range(replicas)]


def test_a_job_of_its_own_has_the_share_of_its_seat() -> None:
    assert dealt(numbered(8), Grid(2, seat=1, seats=3)) == [1, 4, 7]


def test_mini_batches_are_dealt_as_they_are_read() -> None:
    """One of them at a time: a loader may have no end."""

    def endless() -> Iterator[Batch]:
        k = 0
        while True:
            yield torch.tensor([k]), torch.tensor([k])
            k += 1

    batches = deal(read(endless(), True), None, Grid(1, 3, rank=2))
    assert [int(leaf(next(batches)[0])) for _ in range(4)] == [2, 5, 8, 11]


def test_a_replica_without_a_mini_batch_is_told() -> None:
    assert [dealt(numbered(2), Grid(1, 3, rank=rank)) for rank in range(2)] == [[0], [1]]
    with pytest.raises(InputError, match=r"no mini-batch for replica 2 of 3: each takes every R"):
        dealt(numbered(2), Grid(1, 3, rank=2))


DATA = TensorDataset(torch.arange(12), torch.arange(12))


@pytest.mark.parametrize("batched", [False, True])
def test_a_distributed_sampler_has_dealt_already(batched: bool) -> None:
    for replica in range(2):
        sampler: DistributedSampler[Any] = DistributedSampler(DATA, 2, replica, shuffle=False)
        if batched:
            loader = DataLoader(DATA, batch_sampler=BatchSampler(sampler, 2, False))
        else:
            loader = DataLoader(DATA, 2, sampler=sampler)
        expected = [replica + k for k in (0, 4, 8)]
        assert dealt(loader, Grid(3, 2, rank=3 * replica)) == expected


@pytest.mark.parametrize(("count", "rank"), [(2, 0), (3, 1), (1, 0)])
def test_anothers_distributed_sampler_is_refused(count: int, rank: int) -> None:
    sampler: DistributedSampler[Any] = DistributedSampler(DATA, count, rank)
    with pytest.raises(
        ValueError,
        match=rf"num_replicas={count}, rank={rank}, and this is replica 1 of 2: write Distributed",
    ):
        dealt(DataLoader(DATA, 2, sampler=sampler), Grid(1, 2, rank=1))


def test_a_plain_loader_is_dealt_too() -> None:
    assert dealt(DataLoader(DATA, 2), Grid(1, 2, rank=1)) == [2, 6, 10]
    assert dealt(DataLoader(DATA, 2), Grid(1)) == [0, 2, 4, 6, 8, 10]
