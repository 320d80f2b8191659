"""The event simulator against plain loops, and the claims of its study on a short run."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from headrace.launch.data import Digits
from headrace.launch.studies.asynchronous import (
    CLAIMS,
    Outcome,
    Runs,
    Setting,
    batches,
    check,
    draw,
    network,
)
from headrace.launch.studies.asynchronous import main as asynchronous
from headrace.launch.studies.event_simulator import Times, simulate
from headrace.models import mlp
from headrace.pipeline.replicas import Downpour
from headrace.pipeline.replicas.shard import Shard
from headrace.pipeline.settings import Settings

Batches = list[tuple[Tensor, Tensor]]
SGD = partial(torch.optim.SGD, lr=0.05)
BY_LAYER = [["1.weight", "1.bias"], ["3.weight", "3.bias"]]


def model(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return mlp([8, 16, 4]).to(dtype)


def data(count: int, dtype: torch.dtype = torch.float64, size: int = 4) -> Batches:
    torch.manual_seed(1)
    return [(torch.randn(size, 8, dtype=dtype), torch.randint(0, 4, (size,))) for _ in range(count)]


def serial(
    net: nn.Sequential, given: Batches, optimizer: Callable[..., torch.optim.Optimizer] = SGD
) -> dict[str, Tensor]:
    """The plain loop."""
    moves = optimizer(net.parameters())
    for x, y in given:
        moves.zero_grad()
        cross_entropy(net(x), y).backward()
        moves.step()
    return net.state_dict()


def delayed(net: nn.Sequential, given: Batches, delay: int) -> dict[str, Tensor]:
    """SGD with the gradients of the weights as they were `delay` updates ago, where there were."""
    history = [{n: p.detach().clone() for n, p in net.named_parameters()}]
    for i, (x, y) in enumerate(given):
        then = {n: w.requires_grad_() for n, w in history[max(0, i - delay)].items()}
        loss = cross_entropy(torch.func.functional_call(net, then, (x,)), y)
        gradients = torch.autograd.grad(loss, list(then.values()))
        now = zip(history[-1].items(), gradients, strict=True)
        history.append({n: w.detach() - 0.05 * g for (n, w), g in now})
    return history[-1]


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize("shares", [None, BY_LAYER])
def test_one_learner_without_latency_is_the_plain_loop_bit_for_bit(
    shares: list[list[str]] | None,
) -> None:
    given = data(50, torch.float32)
    optimizer = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
    net = model(torch.float32)
    settings = Settings(cross_entropy, optimizer)
    shards = simulate(net, settings, Downpour(prefetch=0), 1, given, shares=shares)
    assert apart(net.state_dict(), serial(model(torch.float32), given, optimizer)) == 0
    assert [(shard.version, shard.staleness) for shard in shards] == [(50, {0: 50})] * len(shards)


@pytest.mark.parametrize("count", [35, 38])  # the last round may be of fewer
def test_hard_sync_is_the_plain_loop_on_joined_batches(count: int) -> None:
    given = data(count)
    optimizer = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
    net = model()
    settings = Settings(cross_entropy, optimizer)
    (shard,) = simulate(net, settings, Downpour(sync="hard"), 5, given)
    rounds = [given[k : k + 5] for k in range(0, count, 5)]
    joined = [(torch.cat([x for x, _ in each]), torch.cat([y for _, y in each])) for each in rounds]
    assert apart(net.state_dict(), serial(model(), joined, optimizer)) < 1e-10
    assert (shard.version, shard.staleness) == (len(rounds), {0: count})


def test_learners_that_take_turns_have_a_constant_delay() -> None:
    given, net = data(31), model()
    settings = Settings(cross_entropy, SGD)
    (shard,) = simulate(net, settings, Downpour(prefetch=0), 4, given, Times(spread=0))
    assert apart(net.state_dict(), delayed(model(), given, 3)) < 1e-12
    assert shard.staleness == {0: 1, 1: 1, 2: 1, 3: 28}


def test_who_prefetches_has_its_own_last_push_still_to_see() -> None:
    given, net = data(20), model()
    settings = Settings(cross_entropy, SGD)
    # With latency too: it takes in the answer to what it asked one update earlier, no newer one.
    simulate(net, settings, Downpour(prefetch=1), 1, given, Times(latency=0.3))
    assert apart(net.state_dict(), delayed(model(), given, 1)) < 1e-12


def test_with_latency_a_fetch_still_comes_after_its_own_pushes() -> None:
    given, net = data(20), model()
    settings, times = Settings(cross_entropy, SGD), Times(latency=2.0)
    shards = simulate(net, settings, Downpour(prefetch=0), 1, given, times, BY_LAYER)
    assert apart(net.state_dict(), serial(model(), given)) < 1e-12
    assert all(shard.staleness == {0: 20} for shard in shards)


def test_one_learner_that_moves_its_own_copy_is_the_plain_loop() -> None:
    given, net = data(22), model()
    settings = Settings(cross_entropy, SGD)
    way = Downpour(prefetch=0, n_fetch=5, n_push=5)
    (shard,) = simulate(net, settings, way, 1, given)
    assert apart(net.state_dict(), serial(model(), given)) < 1e-12
    assert shard.version == 5  # the last is of two
    assert shard.staleness == {0: 22}


def test_shards_know_nothing_of_each_other() -> None:
    settings, times = Settings(cross_entropy, SGD), Times(latency=0.5)
    shards = simulate(model(), settings, Downpour(prefetch=0), 6, data(60), times, BY_LAYER)
    assert [shard.version for shard in shards] == [60, 60]
    assert shards[0].staleness != shards[1].staleness


def test_the_first_learner_warms_up_alone() -> None:
    settings = Settings(cross_entropy, SGD)
    way = Downpour(prefetch=0, warm_up=7, warm_up_factor=0.1)
    (shard,) = simulate(model(), settings, way, 3, data(7))
    assert shard.pushed == {0: 7}
    (shard,) = simulate(model(), settings, way, 3, data(13), Times(spread=0))
    assert shard.pushed == {0: 9, 1: 2, 2: 2}
    assert shard.learning_rates == [pytest.approx(0.005)]


def test_slow_learners_do_less_and_their_gradients_are_older() -> None:
    settings, times = Settings(cross_entropy, SGD), Times(spread=0, paces=(1, 1, 1, 5.4))
    (shard,) = simulate(model(), settings, Downpour(prefetch=0), 4, data(100), times)
    assert shard.pushed[3] == pytest.approx(100 * (1 / 5.4) / (3 + 1 / 5.4), abs=1)
    assert max(shard.staleness) == 18  # 3 others, done 6 times in 5.4 at the most


@pytest.mark.parametrize("seed", [0, 1])
def test_the_same_seed_is_the_same_again(seed: int) -> None:
    settings, times = Settings(cross_entropy, SGD), Times(latency=0.3, seed=seed)

    def run(times: Times) -> tuple[list[dict[int, int]], dict[str, Tensor]]:
        net = model()
        shards = simulate(net, settings, Downpour(prefetch=0), 5, data(80), times, BY_LAYER)
        return [dict(shard.staleness) for shard in shards], net.state_dict()

    ages, weights = run(times)
    again, same = run(times)
    others, different = run(Times(latency=0.3, seed=seed + 2))
    assert again == ages != others
    assert apart(weights, same) == 0 < apart(weights, different)


def test_shares_that_leave_a_weight_out_are_refused() -> None:
    settings = Settings(cross_entropy, SGD)
    with pytest.raises(ValueError, match=r"give each of 1\.weight, 1\.bias, 3\.weight, 3\.bias"):
        simulate(model(), settings, Downpour(), 1, data(1), shares=BY_LAYER[:1])


def test_waiting_for_ever_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Shard, "answers", lambda self: [])
    with pytest.raises(RuntimeError, match="3 learners wait for each other for ever"):
        simulate(model(), Settings(cross_entropy, SGD), Downpour(), 3, data(9))


def test_batches_are_a_new_order_of_all_in_every_epoch() -> None:
    digits = Digits("train")
    given = [x for x, _ in batches(digits, 300, 9, seed=0)]
    epochs = [torch.cat(given[k : k + 4]) for k in (0, 4)]
    assert [len(x) for x in given] == [300] * 9
    assert not torch.equal(*epochs)
    assert len(epochs[0].unique(dim=0)) > 1190  # few images are there twice


def test_the_network_starts_with_he_weights() -> None:
    torch.manual_seed(0)
    first = network(2)[1]
    assert isinstance(first, nn.Linear)
    assert float(first.weight.detach().std()) == pytest.approx((2 / 64) ** 0.5, rel=0.05)
    assert not first.bias.any()


def fake(setting: Setting, seed: int, share: float) -> Outcome:
    """As the claims would have it."""
    if setting.learners == 30:
        falls = setting.discount == "α" and setting.sync in (15, 30)
        age = setting.sync if isinstance(setting.sync, int) else 0
        return Outcome(0.1 if falls else 0.97, float("nan") if falls else 0.02, {age: 1000})
    falls = setting.optimizer == "SGD" and setting.learners == 32
    return Outcome(0.1 if falls else 0.96, 0.1, {31: 1000})


def worse(setting: Setting, seed: int, share: float) -> Outcome:
    """All beside it, a little."""
    fine = fake(setting, seed, share)
    many = setting.learners == 32
    accuracy = {0.1: 0.67 if many else 0.3, 0.97: 0.97 if setting.sync == "hard" else 0.949}
    ages = {age + 2 + age // 10: 998 for age in fine.staleness} | {61: 2}
    return Outcome(accuracy.get(fine.accuracy, 0.88 if many else 0.96), 0.1, ages)


def test_each_claim_can_fail() -> None:
    assert list(check(Runs(2, run=fake)).values()) == [True] * len(CLAIMS)
    assert list(check(Runs(2, run=worse)).values()) == [False] * len(CLAIMS)


def test_a_setting_runs_once_and_only_softsync_is_shortened() -> None:
    made = []

    def run(setting: Setting, seed: int, share: float) -> Outcome:
        made.append((setting.learners, seed, share))
        return fake(setting, seed, share)

    runs = Runs(2, 0.3, run)
    for _ in range(2):
        check(runs)
    assert len(made) == 2 * (7 - 1 + 3)  # the mean of 1-softsync under α is no claim's affair
    assert {share for learners, _, share in made if learners == 30} == {0.3}
    assert {share for learners, _, share in made if learners != 30} == {1.0}


def test_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw(Runs(1, run=fake), tmp_path / "new" / "asynchronous.png")
    assert (tmp_path / "new" / "asynchronous.png").stat().st_size > 20_000


def test_no_seed_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        asynchronous(["--seeds", "0"])
    assert "--seeds 0: give a whole number >= 1" in capsys.readouterr().err


@pytest.mark.slow
def test_the_claims_hold_on_a_short_study(capsys: pytest.CaptureFixture[str]) -> None:
    asynchronous(["--seeds", "1", "--short"])
    out = capsys.readouterr().out
    assert len(re.findall(r"^holds ", out, re.M)) == len(CLAIMS), out
    assert "DOES NOT HOLD" not in out
    assert len(re.findall(r"^\| \w.* \|$", out, re.M)) == 5 + 3, out
