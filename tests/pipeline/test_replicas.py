"""What ways of sharing weights take and refuse, and how they deal ranks out; without processes."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from headrace.pipeline import Pipeline
from headrace.pipeline.grid import Grid
from headrace.pipeline.replicas import Allreduce, Downpour, Elastic, Hogwild, Replicas
from headrace.pipeline.replicas.rendezvous import describe, split_address
from headrace.pipeline.replicas.shard import Protocol

REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "no replica": (lambda: Allreduce(0), "count=0: give 1 or more replicas"),
    "half a replica": (lambda: Hogwild(1.5), "count=1.5: give a whole number"),  # type: ignore[arg-type]
    "n_fetch": (lambda: Downpour(n_fetch=0), "n_fetch=0: give a whole number >= 1"),
    "n_push": (lambda: Downpour(n_push=True), "n_push=True: give a whole number >= 1"),
    "prefetch": (lambda: Downpour(prefetch=-1), "prefetch=-1: give a whole number >= 0"),
    "sync": (lambda: Downpour(sync=0), "sync=0: give None, 'hard' or a whole number >= 1"),
    "another sync": (
        lambda: Downpour(sync="soft"),  # type: ignore[arg-type]
        "sync='soft': give None, 'hard' or a whole number",
    ),
    "hard, and not": (
        lambda: Downpour(sync="hard", n_push=2),
        "sync='hard' with n_fetch=1, n_push=2: all replicas wait for each other at every update",
    ),
    "a bound too small": (
        lambda: Downpour(bound=2, prefetch=3),
        "bound=2 with prefetch=3 and n_fetch=1: a replica goes on for 3 updates before",
    ),
    "warm_up": (lambda: Downpour(warm_up=-1), "warm_up=-1: give a whole number >= 0"),
    "no rate": (lambda: Downpour(warm_up_factor=0), "warm_up_factor=0: give a number above 0"),
    "checkpoint_every": (lambda: Downpour(checkpoint_every=0), "checkpoint_every=0: give a whole"),
    "no address": (lambda: Downpour(address="here"), "address='here': write host:port"),
    "no port": (lambda: Downpour(address="here:http"), "address='here:http': write host:port"),
    "every": (lambda: Elastic(every=0), "every=0: give a whole number >= 1"),
    "alpha": (lambda: Elastic(alpha=1.5), "alpha=1.5: give a number above 0, up to 1, or None"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    make, line = REFUSED[name]
    with pytest.raises((ValueError, TypeError), match=f"^{re.escape(line)}"):
        make()


GRIDS = [
    (Allreduce(), 4, 2, Grid(2, 2)),
    (Allreduce(3), 3, 1, Grid(1, 3)),
    (Hogwild(), 6, 2, Grid(2, 3)),
    (Downpour(), 6, 2, Grid(2, 2, 2)),
    (Downpour(1), 4, 2, Grid(2, 1, 2)),
    (Downpour(beside=True), 6, 2, Grid(2, 3)),
    (Elastic(2), 3, 1, Grid(1, 2, 1)),
    (Downpour(8, address="10.0.0.1:1"), 2, 2, Grid(2)),
]


@pytest.mark.parametrize(("replicas", "ranks", "stages", "grid"), GRIDS)
def test_ranks_are_dealt_out(replicas: Replicas, ranks: int, stages: int, grid: Grid) -> None:
    assert replicas.lay_out(ranks, 0, stages) == grid
    if replicas.count:
        assert replicas.ranks(stages) == ranks


MISFITS = [
    (Allreduce(), 3, 2, "3 ranks do not make replicas of 2 stages: start with torchrun "
     "--nproc-per-node 4"),
    (Hogwild(3), 4, 2, "4 ranks do not make 3 replicas of 2 stages: start with torchrun "
     "--nproc-per-node 6"),
    (Downpour(2), 4, 2, "4 ranks do not make 2 replicas of 2 stages and 2 servers: start with "
     "torchrun --nproc-per-node 6, or write beside=True for servers without ranks"),
    (Downpour(), 2, 2, "2 ranks do not make replicas of 2 stages and 2 servers: start with"),
    (Downpour(2, beside=True), 6, 2, "6 ranks do not make 2 replicas of 2 stages: start with"),
    (Elastic(2, address="a:1"), 4, 2, "4 ranks are not 2 stages: with address= each replica is a "
     "job of its own, so start torchrun --nproc-per-node 2 for each"),
]  # fmt: skip


@pytest.mark.parametrize(("replicas", "ranks", "stages", "line"), MISFITS)
def test_ranks_that_do_not_fit(replicas: Replicas, ranks: int, stages: int, line: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(line)}"):
        replicas.lay_out(ranks, 0, stages)


PROTOCOLS = [
    (Downpour(), 4, Protocol()),
    (Downpour(sync="hard"), 4, Protocol(4, True)),
    (Downpour(sync=1), 30, Protocol(30)),
    (Downpour(sync=15), 30, Protocol(2)),
    (Downpour(sync=30), 30, Protocol(1)),
    (Downpour(sync=7), 30, Protocol(4)),
    (Downpour(bound=5), 4, Protocol(bound=4)),
    (Downpour(bound=9, prefetch=2, n_push=3), 4, Protocol(bound=2)),
    (Downpour(warm_up=9, warm_up_factor=0.1), 4, Protocol(warm_up=9, warm_up_factor=0.1)),
]


@pytest.mark.parametrize(("downpour", "replicas", "protocol"), PROTOCOLS)
def test_what_a_server_is_told(downpour: Downpour, replicas: int, protocol: Protocol) -> None:
    assert downpour.protocol(replicas) == protocol


def test_updates_that_a_scheduler_sees() -> None:
    """Of 90 updates that one pipeline would make."""
    assert Allreduce().updates(90, 4) == 23
    assert Hogwild().updates(90, 3) == 30
    assert Downpour().updates(90, 3) == 90
    assert Downpour(sync=1).updates(90, 3) == 30
    assert Downpour(n_push=2).updates(90, 3) == 45
    assert Elastic().updates(90, 3) == 30


def alone(replicas: Any, **options: Any) -> Pipeline:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    return Pipeline(
        model, nn.MSELoss(), lambda p: torch.optim.SGD(p, lr=0.1), replicas=replicas, **options
    )


def test_a_pipeline_without_torchrun_refuses_replicas() -> None:
    with pytest.raises(ValueError, match="torchrun --nproc-per-node 6"):
        alone(Downpour(2), stages=2)
    with pytest.raises(ValueError, match="replicas= needs stages="):
        alone(Allreduce(2))
    with pytest.raises(TypeError, match="replicas=2: give an Allreduce, Hogwild, Downpour"):
        alone(2, stages=2)
    with pytest.raises(ValueError, match=r"stages=0: give a whole number >= 1"):
        alone(Allreduce(2), stages=0)


def test_checkpoints_have_a_file_each() -> None:
    checkpoint = Downpour(checkpoint="kept", checkpoint_every=7).checkpoint_of(3)
    assert checkpoint is not None
    assert (checkpoint.file, checkpoint.every) == (Path("kept/stage-3.pt"), 7)
    assert Downpour().checkpoint_of(3) is None


def test_a_model_in_a_few_words() -> None:
    one, other = nn.Linear(2, 3), nn.Linear(3, 2)
    same = describe(dict(nn.Linear(2, 3).named_parameters()))
    assert describe(dict(one.named_parameters())) == same
    assert same.startswith("2 tensors of 9 elements (")
    assert describe(dict(other.named_parameters())) != same
    assert describe(dict(one.double().named_parameters())) != same


def test_addresses() -> None:
    assert split_address("node7:29600") == ("node7", 29600)
    for wrong in ("node7", ":1", "node7:", "node7:0", "node7:70000", "node7:x"):
        with pytest.raises(ValueError, match="write host:port"):
            split_address(wrong)
