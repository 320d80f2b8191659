"""Replicas of a pipeline: in step they are one pipeline; out of step nothing is lost."""

import math
import re
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headrace.pipeline import Pipeline

from ..pipeline.helpers import SIZES, assert_close, assert_same, batches_of, momentum, tanh_net
from .ranks import TRANSPORTS, Launcher, Outcome, free_port
from .replicas import (
    IN_STEP,
    KINDS,
    Account,
    account_of_pushes,
    batches,
    elastic_of_one,
    hogwild_of_one,
    in_hard_sync,
    join_batches,
    lose,
    on_servers,
    over_a_slow_link,
    refused,
    replica_job,
    run_cases,
    sampled,
    serial,
    server_job,
    sparse_hogwild,
    sparse_problem,
    warned,
)

pytestmark = pytest.mark.timeout(180)


# In step ---------------------------------------------------------------------------------------

GRIDS = [
    (2, 2, "one host", None),
    (3, 1, "one host", 0),
    (3, 1, "one host", None),
    (2, 2, "hosts apart", 0),
]
"""Replicas, stages, transport, and up to how many bytes gradients are small."""


@pytest.fixture(scope="module", params=GRIDS, ids=lambda g: f"{g[0]} x {g[1]}, {g[2]}, {g[3]}")
def in_step(request: pytest.FixtureRequest, launcher: Launcher) -> tuple[int, int, Outcome]:
    replicas, stages, transport, small = request.param
    ranks, how = replicas * stages, {"environment": TRANSPORTS[transport]}
    outcome = launcher.run(run_cases, ranks, "in step", stages, False, small, **how)
    outcome.expect(*[0] * ranks)
    return replicas, stages, outcome


@pytest.mark.parametrize("name", IN_STEP)
def test_allreduce_is_one_pipeline_on_the_joined_batches(
    in_step: tuple[int, int, Outcome], name: str
) -> None:
    replicas, stages, outcome = in_step
    case, loader = IN_STEP[name], join_batches(batches(), replicas)
    model = tanh_net()
    with Pipeline(
        model,
        nn.MSELoss(),
        case.optimizer,
        stages=stages,
        balance=SIZES[stages],
        **case.options,
    ) as pipe:
        for _ in range(2):
            pipe.train(loader)
        pipe.drain()  # the ranks have evaluated by then
        pipe.train(loader)
        expected = pipe.state_dict()
    for result in outcome.results:
        assert_close(result[name].weights, expected, 1e-10)
        assert_same(result[name].weights, outcome.results[0][name].weights)


def test_allreduce_with_uneven_shares(launcher: Launcher) -> None:
    """Eleven mini-batches for two replicas: one takes part with nothing in the end."""
    outcome = launcher.run(run_cases, 4, "in step", 2, True)
    outcome.expect(0, 0, 0, 0)
    for name in IN_STEP:
        accounts = [result[name] for result in outcome.results]
        for account in accounts:
            assert_same(account.weights, accounts[0].weights)
            assert account.scores == accounts[0].scores
        by_stage = {(r, j): updates for r, j, updates, _ in accounts[0].statistics}
        for stage in range(2):
            assert by_stage[0, stage] == by_stage[1, stage], "all count the same updates"


# Every kind ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kinds(launcher: Launcher) -> list[dict[str, Account]]:
    outcome = launcher.run(run_cases, 4, "kinds", 2, seconds=120)
    outcome.expect(0, 0, 0, 0)
    return outcome.results


@pytest.mark.parametrize("name", KINDS)
def test_what_every_rank_is_told(kinds: list[dict[str, Account]], name: str) -> None:
    accounts = [account[name] for account in kinds]
    for account in accounts:
        assert_same(account.weights, accounts[0].weights)
        assert account.scores == accounts[0].scores
        assert account.statistics == accounts[0].statistics
        assert_same(account.loaded, KINDS[name].model().state_dict())
        assert all(map(math.isfinite, account.losses))
    assert [row[:2] for row in accounts[0].statistics] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert accounts[0].scores[1]["loss"] < accounts[0].losses[0], "it learns"
    assert accounts[0].losses == accounts[1].losses
    assert accounts[0].losses != accounts[2].losses, "each replica has mini-batches of its own"


@pytest.mark.parametrize("name", [name for name in KINDS if "hogwild" in name])
def test_hogwild_counts_everybodys_updates(kinds: list[dict[str, Account]], name: str) -> None:
    """Staleness is counted in the updates of all; on the last stage all of it is the others'."""
    rows = kinds[0][name].statistics
    for _, _, updates, staleness in rows:
        assert updates == 18, "half of the mini-batches of three epochs"
        assert sum(staleness.values()) == 18
        assert max(staleness) < 2 * 18 + 2


def served(name: str) -> bool:
    return "hogwild" not in name and "allreduce" not in name


@pytest.mark.parametrize("name", [name for name in KINDS if served(name)])
def test_servers_count_what_came(kinds: list[dict[str, Account]], name: str) -> None:
    shards = kinds[0][name].shards
    assert [shard.stage for shard in shards] == [0, 1]
    assert kinds[3][name].shards == shards
    for shard in shards:
        assert set(shard.pushed) == {0, 1}
        assert sum(shard.pushed.values()) >= shard.updates
        if name in ("beside", "bound", "warm-up"):
            assert shard.pushed == {0: 18, 1: 18}
            assert shard.updates == 36
            assert sum(shard.staleness.values()) == 36
        if name == "n_fetch 3, n_push 2":
            assert sum(shard.staleness.values()) == 36, "two micro-batches to most pushes"


# Downpour --------------------------------------------------------------------------------------

SERIAL = {
    "stash": {},
    "adagrad": {"optimizer": "adagrad"},
    "1f1b": {"schedule": "1f1b", "micro_batches": 2},
    "every 3, clip": {"update_every": 3, "clip_grad_norm": 0.1},
}


def adagrad(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adagrad(params, lr=0.03)


WAYS = [
    ("stash", 1, False),
    ("stash", 2, True),
    ("adagrad", 2, False),
    ("1f1b", 2, True),
    ("every 3, clip", 1, True),
    ("every 3, clip", 2, False),
]
"""Options, stages, and whether servers live beside the replica."""


@pytest.mark.parametrize(("name", "stages", "beside"), WAYS)
def test_downpour_of_one_replica_is_serial(
    launcher: Launcher, name: str, stages: int, beside: bool
) -> None:
    """n_fetch = n_push = 1 and a prefetch of 0: the same weights, bit for bit."""

    def options() -> dict[str, Any]:
        chosen: dict[str, Any] = dict(SERIAL[name])
        if chosen.get("optimizer") == "adagrad":
            chosen["optimizer"] = adagrad
        return chosen

    ranks = stages if beside else 2 * stages
    outcome = launcher.run(serial, ranks, stages, 1, beside, options())
    outcome.expect(*[0] * ranks)
    weights, losses = serial(stages, None, False, options())
    for result in outcome.results[:stages]:
        assert_same(result[0], weights)
        assert result[1] == losses


def test_one_stage_served_is_a_plain_loop(launcher: Launcher) -> None:
    outcome = launcher.run(serial, 2, 1, 1, False, {})
    outcome.expect(0, 0)
    model = tanh_net(dtype=torch.float32)
    optimizer = momentum(model.named_parameters())
    for _ in range(3):
        for x, y in batches_of(66, 4, dtype=torch.float32):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
    assert_same(outcome.results[0][0], model.state_dict())


def test_what_was_pushed_is_what_was_applied(launcher: Launcher) -> None:
    """Three replicas with random delays: counts and sums, on each server."""
    outcome = launcher.run(account_of_pushes, 8, 2)
    outcome.expect(*[0] * 8)
    weights, first = outcome.results[0]["weights"], outcome.results[0]["first"]
    sums: Counter[str] = Counter()
    total: dict[str, Tensor] = {}
    for rank in range(6):
        result = outcome.results[rank]["sums"]
        sums[f"stage {rank % 2}"] += result["count"]
        for name, value in result.items():
            if name != "count":
                total[name] = total.get(name, torch.zeros(())) + value
    for shard in outcome.results[0]["shards"]:
        assert sum(shard.pushed.values()) == sums[f"stage {shard.stage}"] == shard.updates
        assert sum(shard.staleness.values()) == 60, "every micro-batch of two epochs, once"
    for name, value in weights.items():
        torch.testing.assert_close(value, first[name] - 0.05 * total[name], rtol=0, atol=1e-12)
    for server in (6, 7):
        own = outcome.results[server]["weights"]
        assert_same(own, {name: weights[name] for name in own})


@pytest.mark.parametrize("schedule", ["1f1b", "stream"])
def test_hard_sync_is_sgd_on_the_joined_batches(launcher: Launcher, schedule: str) -> None:
    outcome = launcher.run(in_hard_sync, 4, schedule)
    outcome.expect(0, 0, 0, 0)
    with Pipeline(
        tanh_net(), nn.MSELoss(), momentum, stages=2, balance=SIZES[2], schedule=schedule
    ) as pipe:
        for _ in range(2):
            pipe.train(join_batches(batches(), 2))
        expected = pipe.state_dict()
    assert_close(outcome.results[0], expected, 1e-10)


def test_a_slow_link_does_not_slow_the_computation(launcher: Launcher) -> None:
    """A round trip of 50 ms, updates of 20 ms: with three of them under way nobody waits."""
    waits = launcher.run(over_a_slow_link, 2, 0)
    waits.expect(0, 0)
    goes_on = launcher.run(over_a_slow_link, 2, 3)
    goes_on.expect(0, 0)
    for rank in range(2):
        assert waits.results[rank][0] > 0.5
        assert goes_on.results[rank][0] < 0.15
    assert sum(waits.results[0][1].values()) == sum(goes_on.results[0][1].values()) == 120


# Elastic ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 4])
def test_elastic_averaging_of_one_replica(launcher: Launcher, every: int) -> None:
    """d = a (x - c); x <- x - d; c <- c + d; when all settle, for what is left over."""
    alpha = 0.3
    outcome = launcher.run(elastic_of_one, 1, every, alpha)
    outcome.expect(0)
    model = tanh_net()
    centre = {name: p.detach().clone() for name, p in model.named_parameters()}

    def exchange() -> None:
        with torch.no_grad():
            for name, p in model.named_parameters():
                d = alpha * (p - centre[name])
                p -= d
                centre[name] += d

    for k, (x, y) in enumerate(batches_of(60, 4)):
        model.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.05 * p.grad  # type: ignore[operator]
        if (k + 1) % every == 0:
            exchange()
    if 15 % every:
        exchange()
    assert_close(outcome.results[0], centre, 1e-12)


# Hogwild and data ------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["current", "replay"])
@pytest.mark.parametrize("stages", [1, 2])
def test_hogwild_of_one_replica_is_serial(launcher: Launcher, stages: int, rule: str) -> None:
    outcome = launcher.run(hogwild_of_one, stages, stages, rule, True)
    outcome.expect(*[0] * stages)
    assert_same(outcome.results[0], hogwild_of_one(stages, rule, False))


@pytest.mark.parametrize("distributed", [False, True], ids=["dealt", "DistributedSampler"])
def test_each_sample_is_trained_on_once(launcher: Launcher, distributed: bool) -> None:
    outcome = launcher.run(sampled, 3, distributed)
    outcome.expect(0, 0, 0)
    seen = outcome.results
    assert sorted(seen[0] + seen[1] + seen[2]) == [*map(float, range(24))]
    assert [len(each) for each in seen] == [8, 8, 8]


def test_what_a_server_is_asked(launcher: Launcher) -> None:
    """It makes the same calls, though it has no stage."""
    outcome = launcher.run(on_servers, 6)
    outcome.expect(*[0] * 6)
    first, server = outcome.results[0], outcome.results[4]
    assert server["replica"] == 0 and server["replicas"] == 2
    assert server["scores"] == first["scores"] and server["report"] == first["report"]
    assert server["weights"] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert set(server["weights"]) < set(first["weights"])
    assert server["rows"] == first["rows"] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert server["version"] == 0


# Sparse ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hogwild", "downpour"])
def test_one_replica_of_a_sparse_model_is_serial(launcher: Launcher, kind: str) -> None:
    from headrace.models import sparse_logistic

    outcome = launcher.run(sparse_hogwild, 1, kind)
    outcome.expect(0)
    generator = torch.Generator().manual_seed(2)
    indices = torch.randint(0, 50, (200, 5), generator=generator) * 2
    values = torch.randn(200, 5, generator=generator)
    targets = (values.sum(1) > 0).float()
    model = sparse_logistic(100)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for k in range(200):
        optimizer.zero_grad()
        output = model((indices[k : k + 1], values[k : k + 1]))
        nn.functional.binary_cross_entropy_with_logits(output, targets[k : k + 1]).backward()
        optimizer.step()
    assert_same(outcome.results[0]["weights"], model.state_dict())


def test_hogwild_loses_nothing(launcher: Launcher) -> None:
    """Equal samples by one process, by two, by four: a loss that is no more than 5% above.

    The study has the whole problem, and both sides; this one is too small for that.
    """
    losses = {}
    for many in (1, 2, 4):
        how = {"environment": {"TORCHELASTIC_RUN_ID": "here"}}
        outcome = launcher.run(sparse_problem, many, 2000, **how)
        outcome.expect(*[0] * many)
        losses[many] = outcome.results[0]["loss"]
        assert sum(outcome.results[0]["staleness"].values()) == 4000
    assert losses[2] < 1.05 * losses[1], losses
    assert losses[4] < 1.05 * losses[1], losses


def test_sparse_hogwild(launcher: Launcher) -> None:
    outcome = launcher.run(sparse_hogwild, 3, "hogwild")
    outcome.expect(0, 0, 0)
    weight = outcome.results[0]["weights"]["0.weight"]
    assert not weight[1::2].any(), "rows that no sample has"
    assert weight[0::2].any(dim=1).sum() > 40
    for result in outcome.results:
        assert_same(result["weights"], outcome.results[0]["weights"])
        assert sum(sum(row.values()) for row in result["staleness"]) == 200


# Refused, or warned of ---------------------------------------------------------------------------

REFUSED = {
    "sparse": "layer '0' (EmbeddingBag) gives sparse gradients, and replicas: allreduce averages",
    "too few": "the loader has no mini-batch for replica 1 of 2: each takes every R-th, so give",
    "sampler": "the loader's DistributedSampler has num_replicas=3, rank=0, and this is replica",
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_a_line(launcher: Launcher, name: str) -> None:
    outcome = launcher.run(refused, 2, name)
    assert REFUSED[name] in outcome.report, f"{outcome}"
    assert all(outcome.codes)


def test_hogwild_warns_once(launcher: Launcher) -> None:
    outcome = launcher.run(warned, 2)
    outcome.expect(0, 0)
    said = "".join(outcome.err)
    assert said.count("hogwild with momentum: each replica has its own") == 1
    assert said.count("hogwild under a rule that copies the weights") == 1


# One that dies -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "ranks", "rank", "says"),
    [
        ("allreduce", 4, 3, "replica 1 of 2, stage 1 of 2 (rank 3) is gone"),
        ("hogwild", 4, 2, "replica 1 of 2, stage 0 of 2 (rank 2) is gone"),
        ("downpour", 6, 1, "replica 0 of 2, stage 1 of 2 (rank 1) is gone"),
        ("downpour", 6, 4, "the server of stage 0 (rank 4) is gone"),
    ],
)
def test_in_one_job_a_death_ends_all(
    launcher: Launcher, kind: str, ranks: int, rank: int, says: str
) -> None:
    outcome = launcher.run(lose, ranks, kind, rank)
    outcome.expect(*[-signal.SIGKILL if each == rank else 1 for each in range(ranks)])
    assert outcome.report.startswith(f"headrace: {says}"), f"{outcome}"
    assert outcome.seconds_from_first_to_last() < 20


RATE = 0.05


def start_servers(launcher: Launcher, folder: Path) -> tuple[Any, str]:
    address = f"127.0.0.1:{free_port()}"
    return launcher.start(server_job, 2, address, str(folder), RATE), address


def applied(folder: Path, first: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[Any]]:
    """What the servers' last checkpoints say: minus the sum of what was applied; who pushed."""
    moved, pushed = {}, []
    for stage in range(2):
        state = torch.load(folder / f"stage-{stage}.pt", weights_only=True)
        moved |= {n: (first[n] - w) / RATE for n, w in state["weights"].items()}
        pushed.append(state["pushed"])
    return moved, pushed


def test_a_replica_that_dies_ends_nobody_else(launcher: Launcher, tmp_path: Path) -> None:
    """One is killed, one goes on, one comes late; the servers applied what was pushed."""
    from .replicas import _slow_net

    servers, address = start_servers(launcher, tmp_path)
    steady = launcher.start(replica_job, 2, address, RATE, 160, None, "go")
    steady.wait_for("batch-4")
    doomed = launcher.start(replica_job, 2, address, RATE, 100, 30)
    ended = doomed.wait()
    ended.expect(-signal.SIGKILL, 1)
    late = launcher.start(replica_job, 2, address, RATE, 20, None).wait()
    late.expect(0, 0)
    (steady.folder / "go").touch()
    there = steady.wait()
    there.expect(0, 0)
    outcome = servers.wait()
    outcome.expect(0, 0)
    said = outcome.out[0].splitlines()
    assert said[1:] == [
        "replica 0 has joined; 1 is training",
        "replica 1 has joined; 2 are training",
        "replica 1 is gone: its connection was closed; 1 is training",
        "replica 2 has joined; 2 are training",
        "replica 2 has finished; 1 is training",
        "replica 0 has finished; 0 are training",
    ], f"{outcome}"
    assert late.results[0]["replica"] == 1, "the seat of the one that died"

    first = _slow_net().state_dict()
    moved, pushed = applied(tmp_path, first)
    for stage in range(2):
        died = torch.load(doomed.folder / f"pushes-{stage}.pt", weights_only=True)
        own = [there.results[stage]["sums"], late.results[stage]["sums"]]
        counts = pushed[stage]
        assert counts[0] == own[0]["count"] == 80, "every second of 160"
        assert counts[2] == own[1]["count"] == 10
        assert 0 <= len(died) - counts[1] <= 6, "what was under way when it died"
        for name in died[0]:
            total = own[0][name] + own[1][name] + sum(each[name] for each in died[: counts[1]])
            torch.testing.assert_close(moved[name], total, rtol=0, atol=1e-9)


def test_a_stopped_replica_is_let_go(launcher: Launcher, tmp_path: Path) -> None:
    """In hard sync, too, where the other waits for it until then."""
    address, timeout = f"127.0.0.1:{free_port()}", (30.0, 3.0)
    servers = launcher.start(server_job, 2, address, str(tmp_path), RATE, "hard", timeout)
    steady = launcher.start(replica_job, 2, address, RATE, 200, None, None, "hard", timeout)
    stopped = launcher.start(replica_job, 2, address, RATE, 2000, None, None, "hard", (30.0, 60.0))
    stopped.wait_for("batch-20")
    stopped.signal(signal.SIGSTOP)
    outcome = steady.wait()
    outcome.expect(0, 0)
    assert outcome.results[0]["sums"]["count"] == 100
    done = servers.wait()
    done.expect(0, 0)
    (line,) = (line for line in done.out[0].splitlines() if "gone" in line)
    assert re.match(r"replica \d is gone: it has been silent for 3 s; 1 is training", line)
    stopped.signal(signal.SIGKILL)


def test_stopped_servers_are_named(launcher: Launcher, tmp_path: Path) -> None:
    servers, address = start_servers(launcher, tmp_path)
    replica = launcher.start(replica_job, 2, address, RATE, 5000, None, None, None, (30.0, 3.0))
    replica.wait_for("batch-20")
    servers.signal(signal.SIGSTOP)
    outcome = replica.wait()
    outcome.expect(1, 1)
    assert re.match(r"headrace: the server of stage \d \(at .*silent for 3 s", outcome.report)
    servers.signal(signal.SIGKILL)


def test_servers_that_die_end_their_replicas(launcher: Launcher, tmp_path: Path) -> None:
    """A clear error, and the last checkpoint is whole; new servers go on from it."""
    servers, address = start_servers(launcher, tmp_path)
    replica = launcher.start(replica_job, 2, address, RATE, 1000, None)
    replica.wait_for("batch-60")
    servers.signal(signal.SIGKILL)
    servers.wait()
    outcome = replica.wait()
    outcome.expect(1, 1)
    assert "the server of stage" in outcome.report and "is gone" in outcome.report, f"{outcome}"
    _, pushed = applied(tmp_path, {n: w for n, w in _net().items()})
    assert all(sum(counts.values()) >= 5 for counts in pushed)
    servers, address = start_servers(launcher, tmp_path)
    jobs = [launcher.start(replica_job, 2, address, RATE, 20, None) for _ in range(2)]
    for job in jobs:
        job.wait().expect(0, 0)
    servers.wait().expect(0, 0)
    _, after = applied(tmp_path, _net())
    for before, later in zip(pushed, after, strict=True):
        assert sum(later.values()) >= sum(before.values()) + 20


def _net() -> dict[str, Tensor]:
    from .replicas import _slow_net

    return _slow_net().state_dict()
