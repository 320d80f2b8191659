"""Programs in which replicas of a pipeline share their weights, and tell what came of it."""

import os
import random
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from headrace.launch.studies import hogwild as study
from headrace.models import EmulatedLayer, sparse_logistic
from headrace.pipeline import Link, Pipeline
from headrace.pipeline.corrections import LearningRate
from headrace.pipeline.message import Kind, Message
from headrace.pipeline.replicas import (
    Allreduce,
    Downpour,
    Elastic,
    Hogwild,
    Replicas,
    allreduce,
)
from headrace.pipeline.replicas.serving import serve
from headrace.pipeline.report import ShardStatistics
from headrace.pipeline.rules import Delayed, Local, Synthetic

from ..pipeline.helpers import SIZES, adamw, batches_of, halve_slowly, momentum, normed, tanh_net
from ..pipeline.simulator import Batch, OptimizerFactory

__all__ = [
    "IN_STEP",
    "KINDS",
    "Account",
    "Case",
    "batches",
    "join_batches",
    "run_cases",
    "sgd",
]


def sgd(params: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05)


@dataclass(frozen=True)
class Case:
    """A way of sharing, and the pipeline's options, made anew for each use."""

    replicas: Callable[[], Replicas]
    options: dict[str, Any] = field(default_factory=dict)
    optimizer: OptimizerFactory = momentum
    model: Callable[[], nn.Sequential] = tanh_net


def _allreduce(**options: Any) -> Case:
    optimizer = options.pop("optimizer", momentum)
    return Case(Allreduce, options, optimizer)


IN_STEP = {
    "gpipe": _allreduce(schedule="gpipe", micro_batches=3),
    "1f1b, clip, adamw": _allreduce(
        schedule="1f1b", micro_batches=2, clip_grad_norm=0.1, optimizer=adamw
    ),
    "1f1b, skip, every 2": _allreduce(schedule="1f1b", on_nonfinite="skip", update_every=2),
    "stream, stash": _allreduce(rule=Delayed("stash"), scheduler=halve_slowly),
    "stream, current, slack 1": _allreduce(rule=Delayed("current"), slack=1),
    "stream, replay, every 2": _allreduce(rule=Delayed("replay"), update_every=2),
    "stream, predict": _allreduce(rule=Delayed("predict")),
}
"""What equals one pipeline on the mini-batches joined."""

KINDS = {
    "allreduce": Case(Allreduce, {}, sgd),
    "allreduce, synthetic": Case(Allreduce, {"rule": Synthetic(lag=1)}, sgd),
    "allreduce, local": Case(Allreduce, {"rule": Local(3)}, sgd),
    "hogwild, current": Case(Hogwild, {"rule": Delayed("current")}, sgd, normed),
    "hogwild, replay": Case(Hogwild, {"rule": Delayed("replay")}, sgd),
    "hogwild, synthetic": Case(Hogwild, {"rule": Synthetic(lag=1)}, sgd),
    "hogwild, local": Case(Hogwild, {"rule": Local(3)}, sgd),
    "hogwild, lock": Case(lambda: Hogwild(lock=True), {"rule": Delayed("current")}, sgd),
    "hogwild, 1f1b": Case(Hogwild, {"schedule": "1f1b"}, sgd),
    "beside": Case(lambda: Downpour(beside=True), {}, sgd, normed),
    "n_fetch 3, n_push 2": Case(lambda: Downpour(beside=True, n_fetch=3, n_push=2), {}, sgd),
    "softsync": Case(
        lambda: Downpour(beside=True, sync=1), {"corrections": [LearningRate("inverse")]}, sgd
    ),
    "bound": Case(lambda: Downpour(beside=True, bound=3), {"schedule": "1f1b"}, sgd),
    "warm-up": Case(lambda: Downpour(beside=True, warm_up=5, warm_up_factor=0.5), {}, sgd),
    "elastic": Case(lambda: Elastic(beside=True, every=2), {"scheduler": halve_slowly}, sgd),
}
"""Every kind of sharing that needs no ranks of its own."""


@dataclass(frozen=True)
class Account:
    """What one rank was told."""

    weights: dict[str, Tensor]
    scores: list[dict[str, float]]
    updates: int
    samples: int
    losses: list[float]
    shards: list[ShardStatistics]
    statistics: list[tuple[int, int, int, dict[int, int]]]
    loaded: dict[str, Tensor]


def batches(uneven: bool = False) -> list[Batch]:
    """Twelve mini-batches of 4; or eleven, the last of which is smaller."""
    return batches_of(42 if uneven else 48, 4)


def join_batches(loader: list[Batch], replicas: int) -> list[Batch]:
    """What all replicas take at a time, as one mini-batch."""
    joined = []
    for k in range(0, len(loader), replicas):
        group = loader[k : k + replicas]
        joined.append((torch.cat([x for x, _ in group]), torch.cat([y for _, y in group])))
    return joined


def run(case: Case, stages: int, uneven: bool = False) -> Account:
    """Train twice without a drain, evaluate, train again, load other weights, train once more."""
    loader = batches(uneven)
    with (
        Pipeline(
            case.model(),
            nn.MSELoss(),
            case.optimizer,
            stages=stages,
            replicas=case.replicas(),
            balance=SIZES[stages],
            timeout=(30.0, 30.0),
            **case.options,
        ) as pipe,
    ):
        reports = [pipe.train(loader) for _ in range(2)]
        scores = [pipe.evaluate(loader)]
        reports.append(pipe.train(loader))
        weights, shards = pipe.state_dict(), pipe.shard_statistics()
        scores.append(pipe.evaluate(loader))
        rows = pipe.statistics()
        pipe.load_state_dict(case.model().state_dict())
        loaded = pipe.state_dict()
        pipe.train(loader)
        return Account(
            weights,
            scores,
            sum(report.updates for report in reports),
            sum(report.samples for report in reports),
            [report.loss for report in reports],
            shards,
            [(row.replica, row.stage, row.updates, row.staleness) for row in rows],
            loaded,
        )


def run_cases(
    cases: str, stages: int, uneven: bool = False, small: int | None = None
) -> dict[str, Account]:
    """All of them one after the other, in one job.

    Args:
        small: bytes up to which gradients are small; None leaves it as it is.
    """
    if small is not None:
        allreduce.SMALL = small
    chosen = {"in step": IN_STEP, "kinds": KINDS}[cases]
    return {name: run(case, stages, uneven) for name, case in chosen.items()}


# Downpour ------------------------------------------------------------------------------------


def serial(stages: int, count: int | None, beside: bool, options: dict[str, Any]) -> Any:
    """One replica that waits for every fetch; the weights, or those of a pipeline without one."""
    optimizer = options.pop("optimizer", momentum)
    replicas = Downpour(count, prefetch=0, beside=beside) if count else None
    with Pipeline(
        tanh_net(dtype=torch.float32),
        nn.MSELoss(),
        optimizer,
        stages=stages,
        replicas=replicas,
        balance=SIZES[stages],
        timeout=(30.0, 30.0),
        **options,
    ) as pipe:
        loader = batches_of(66, 4, dtype=torch.float32)
        reports = [pipe.train(loader) for _ in range(3)]
        return pipe.state_dict(), [report.loss for report in reports]


class Restless(nn.Module):
    """Takes its time, and never the same."""

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(random.random() * 0.01)
        return x


def watch_pushes(sums: dict[str, Any]) -> None:
    """Note what is pushed from here: how many, and their sum."""

    def tell(connection: Any, names: list[str]) -> None:
        send = connection.outbox.send

        def noting(message: Message) -> None:
            if message.kind is Kind.PUSH:
                sums["count"] = sums.get("count", 0) + 1
                assert isinstance(message.body, list)
                for name, value in zip(names, message.body, strict=True):
                    assert isinstance(value, Tensor)
                    sums[name] = sums.get(name, 0) + value.clone()
                if "file" in sums:
                    both = zip(names, message.body, strict=True)
                    sums.setdefault("each", []).append({n: v.clone() for n, v in both})  # type: ignore[union-attr]
                    torch.save(sums["each"], sums["file"])
            send(message)

        connection.outbox.send = noting

    sums["watch"] = tell


def account_of_pushes(stages: int, optimizer_rate: float = 0.05) -> dict[str, Any]:
    """Train with random delays; what was pushed from here, and what the servers have."""
    random.seed(os.getpid())
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 7), Restless(), nn.Tanh(), nn.Linear(7, 7), Restless(), nn.Linear(7, 3)
    ).double()
    first = {name: value.clone() for name, value in model.state_dict().items()}
    pairs = [(x[:, :5], y[:, :3]) for x, y in batches_of(120, 4)]
    sums: dict[str, Any] = {}
    watch_pushes(sums)
    with Pipeline(
        model,
        nn.MSELoss(),
        lambda params: torch.optim.SGD(params, lr=optimizer_rate),
        stages=stages,
        replicas=Downpour(n_push=2, prefetch=2),
        balance="parameters",
        timeout=(30.0, 30.0),
    ) as pipe:
        for engine in pipe._engines:
            sums.pop("watch")(engine.stage.peers._connection, list(engine.stage.owned))
        for _ in range(2):
            pipe.train(pairs)
        weights, shards = pipe.state_dict(), pipe.shard_statistics()
    sums.pop("watch", None)
    return {"sums": sums, "weights": weights, "shards": shards, "first": first}


def on_servers() -> dict[str, Any]:
    """Every call, on two replicas of two stages and their servers."""
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 3)).double()
    data = [(x, y[:, :3]) for x, y in batches()]
    with Pipeline(
        model,
        nn.MSELoss(),
        sgd,
        stages=2,
        replicas=Downpour(2),
        balance=[2, 2],
        timeout=(30.0, 30.0),
    ) as pipe:
        sampler = DistributedSampler(TensorDataset(torch.zeros(9)), pipe.replicas, pipe.replica)
        assert len(sampler) == 5
        report = pipe.train(data)
        scores = pipe.evaluate(data)
        pipe.predict(data)
        weights = pipe.state_dict()
        pipe.load_state_dict(weights)
        with pipe.record():
            pipe.train(data)
        pipe.measure_links()
        pipe.drain()
        rows = [(row.replica, row.stage) for row in pipe.statistics()]
        return {
            "replica": pipe.replica,
            "replicas": pipe.replicas,
            "report": (report.loss, report.samples),
            "scores": scores,
            "weights": list(weights),
            "rows": rows,
            "version": pipe.version if pipe.is_server else 0,
        }


class Device(nn.Module):
    """Takes 20 ms, forward and backward together, and next to no processor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = EmulatedLayer(7, 13, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x)
        return result


def over_a_slow_link(prefetch: int) -> tuple[float, dict[int, int]]:
    """Train on a server 25 ms away; the share of its time that a replica waited, and staleness."""
    loader = [(torch.randn(2, 4), torch.randn(2, 4))] * 60
    with Pipeline(
        nn.Sequential(Device()),
        nn.MSELoss(),
        sgd,
        stages=1,
        replicas=Downpour(beside=True, prefetch=prefetch),
        rule=Delayed("current"),
        balance="parameters",
        emulated_link=Link(0.025),
        timeout=(30.0, 30.0),
    ) as pipe:
        pipe.train(loader)
        pipe.reset_shares()
        pipe.train(loader)
        row = pipe.statistics()[pipe.replica]
        (shard,) = pipe.shard_statistics()
    return row.waiting, shard.staleness


def hogwild_of_one(stages: int, rule: str, replicas: bool) -> dict[str, Tensor]:
    """A dense pipeline, whose only replica has its weights in shared memory; or without."""
    torch.manual_seed(3)
    with Pipeline(
        normed(),
        nn.MSELoss(),
        sgd,
        stages=stages,
        replicas=Hogwild() if replicas else None,
        rule=Delayed(rule),
        balance=SIZES[stages],
        timeout=(30.0, 30.0),
    ) as pipe:
        loader = [(x, y[:, :3]) for x, y in batches_of(66, 4)]
        for _ in range(2):
            pipe.train(loader)
        return pipe.state_dict()


def elastic_of_one(every: int, alpha: float) -> dict[str, Tensor]:
    """One replica and a centre, which waits for every exchange."""
    with Pipeline(
        tanh_net(),
        nn.MSELoss(),
        sgd,
        stages=1,
        replicas=Elastic(1, every=every, alpha=alpha, prefetch=0, beside=True),
        balance="parameters",
        timeout=(30.0, 30.0),
    ) as pipe:
        pipe.train(batches_of(60, 4))
        return pipe.state_dict()


def in_hard_sync(schedule: str) -> dict[str, Tensor]:
    """Downpour whose replicas wait for each other at every update."""
    with Pipeline(
        tanh_net(),
        nn.MSELoss(),
        momentum,
        stages=2,
        replicas=Downpour(sync="hard", beside=True),
        balance=SIZES[2],
        schedule=schedule,
        timeout=(30.0, 30.0),
    ) as pipe:
        for _ in range(2):
            pipe.train(batches())
        return pipe.state_dict()


def sampled(distributed: bool) -> list[float]:
    """Which samples this replica trained on, with a DistributedSampler or without."""
    seen: list[float] = []

    class Eye(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                seen.extend(x[:, 0].tolist())
            return x * self.weight

    data = torch.arange(24.0).view(24, 1)
    data_set = TensorDataset(data, data)
    with Pipeline(
        nn.Sequential(Eye()),
        nn.MSELoss(),
        sgd,
        stages=1,
        replicas=Hogwild(),
        balance="parameters",
        rule=Delayed("current"),
        timeout=(30.0, 30.0),
    ) as pipe:
        sampler = None
        if distributed:
            sampler = DistributedSampler(data_set, pipe.replicas, pipe.replica)
        generator = torch.Generator().manual_seed(1)
        loader = DataLoader(
            data_set, 4, shuffle=sampler is None, sampler=sampler, generator=generator
        )
        pipe.train(loader)
    return seen


# Sparse weights ------------------------------------------------------------------------------


def sparse_hogwild(replicas: str) -> dict[str, Any]:
    """Sparse logistic regression: the weights, and which rows were ever written."""
    generator = torch.Generator().manual_seed(2)
    indices = torch.randint(0, 50, (200, 5), generator=generator) * 2  # the even rows only
    values = torch.randn(200, 5, generator=generator)
    targets = (values.sum(1) > 0).float()
    loader = [((indices[k : k + 1], values[k : k + 1]), targets[k : k + 1]) for k in range(200)]
    kinds: dict[str, Callable[[], Replicas]] = {
        "hogwild": Hogwild,
        "downpour": lambda: Downpour(prefetch=0, beside=True),
    }
    with Pipeline(
        sparse_logistic(100),
        nn.BCEWithLogitsLoss(),
        lambda params: torch.optim.SGD(params, lr=0.2),
        stages=1,
        replicas=kinds[replicas](),
        rule=Delayed("current"),
        balance="parameters",
        timeout=(30.0, 30.0),
    ) as pipe:
        pipe.train(loader)
        weights = pipe.state_dict()
        rows = [row.staleness for row in pipe.statistics()]
    return {"weights": weights, "staleness": rows}


def sparse_problem(samples: int) -> dict[str, Any]:
    """A small version of the study's problem, with or without another process in the way."""
    return study.train(samples, features=samples, epochs=2, lock=False)


# Jobs of their own ---------------------------------------------------------------------------


def _slow_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), Restless(), nn.Tanh(), nn.Linear(7, 3)).double()


def _pairs(many: int) -> list[Batch]:
    return [(x[:, :5], y[:, :3]) for x, y in batches_of(4 * many, 4)]


def server_job(
    address: str,
    folder: str,
    rate: float,
    sync: Any = None,
    timeout: tuple[float, float] = (30.0, 20.0),
) -> ShardStatistics:
    """Two replicas' servers, of two stages."""
    replicas = Downpour(2, address=address, checkpoint=folder, checkpoint_every=5, sync=sync)
    return serve(
        _slow_net(),
        lambda params: torch.optim.SGD(params, lr=rate),
        replicas,
        stages=2,
        timeout=timeout,
        log=lambda line: print(line, flush=True),
    )


def replica_job(
    address: str,
    rate: float,
    many: int,
    dies_at: int | None,
    wait_for: str | None = None,
    sync: Any = None,
    timeout: tuple[float, float] = (30.0, 20.0),
) -> dict[str, Any]:
    """A replica that notes its pushes; it may die in the middle, its first rank by a signal."""
    random.seed(os.getpid())
    rank = int(os.environ["RANK"])
    sums: dict[str, Any] = {"file": f"pushes-{rank}.pt"}
    watch_pushes(sums)
    tell = sums.pop("watch")
    with Pipeline(
        _slow_net(),
        nn.MSELoss(),
        lambda params: torch.optim.SGD(params, lr=rate),
        stages=2,
        replicas=Downpour(2, address=address, sync=sync),
        balance=[2, 2],
        timeout=timeout,
    ) as pipe:
        engine = pipe._engines[0]
        tell(engine.stage.peers._connection, list(engine.stage.owned))

        def loader() -> Iterable[Batch]:
            for k, pair in enumerate(_pairs(many)):
                if k == dies_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                Path(f"batch-{k}").touch()
                yield pair

        pipe.train(loader() if rank == 0 else ())
        if wait_for is not None:
            while not Path(wait_for).exists():
                time.sleep(0.01)
        weights = pipe.state_dict()
    sums.pop("file")
    sums.pop("each")
    return {"sums": sums, "weights": weights, "replica": pipe.replica}


# Things that cannot be, or are warned of ---------------------------------------------------------


def refused(name: str) -> None:
    """Two replicas of one stage that cannot work."""
    sparse = nn.Sequential(nn.EmbeddingBag(9, 3, mode="sum", sparse=True))
    few = batches()[:1]
    data_set = TensorDataset(torch.zeros(24, 5).double(), torch.zeros(24, 3).double())
    wrong = DataLoader(data_set, 4, sampler=DistributedSampler(data_set, 3, 0))
    cases: dict[str, tuple[nn.Sequential, Replicas, Any]] = {
        "sparse": (sparse, Allreduce(), batches()),
        "too few": (tanh_net(), Hogwild(), few),
        "sampler": (tanh_net(), Hogwild(), wrong),
    }
    model, replicas, loader = cases[name]
    with Pipeline(
        model,
        nn.MSELoss(),
        sgd,
        stages=1,
        replicas=replicas,
        rule=Delayed("current"),
        balance="parameters",
        timeout=(30.0, 30.0),
    ) as pipe:
        pipe.train(loader)


def warned() -> None:
    """Hogwild with momentum, and under a rule that copies the weights."""
    with Pipeline(
        tanh_net(),
        nn.MSELoss(),
        momentum,
        stages=1,
        replicas=Hogwild(),
        rule=Delayed("stash"),
        balance="parameters",
        timeout=(30.0, 30.0),
    ) as pipe:
        pipe.train(batches())


# Things that go wrong ------------------------------------------------------------------------


def lose(kind: str, rank: int) -> None:
    """One rank is killed in the middle of training."""
    case = {"downpour": lambda: Downpour(2), **{"hogwild": Hogwild, "allreduce": Allreduce}}
    loader = batches_of(2000, 4)

    def dying() -> Iterable[Batch]:
        for k, pair in enumerate(loader):
            if k == 100:
                Path("now").touch()
            yield pair

    with Pipeline(
        tanh_net(),
        nn.MSELoss(),
        sgd,
        stages=2,
        replicas=case[kind](),
        rule=Delayed("current"),
        balance=SIZES[2],
        timeout=(30.0, 20.0),
    ) as pipe:
        if pipe.rank == rank:
            import threading

            threading.Thread(target=_die_when_told, daemon=True).start()
        for _ in range(50):
            pipe.train(dying())


def _die_when_told() -> None:
    while not Path("now").exists():
        time.sleep(0.005)
    os.kill(os.getpid(), signal.SIGKILL)
