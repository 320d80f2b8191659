"""A parameter server's shard, told of pushes and fetches one by one: no process, no clock.

Gradients and learning rates are small binary fractions where a test says what a weight must be: no
rounding, so that equal means equal.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headrace.pipeline.corrections import Correction, DelayCompensation, LearningRate
from headrace.pipeline.replicas.shard import Protocol, Shard
from headrace.pipeline.settings import OptimizerFactory, SchedulerFactory, Settings

SGD: OptimizerFactory = partial(torch.optim.SGD, lr=1.0)
ALL = (0, 1, 2)


def g(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def make(
    protocol: Protocol = Protocol(),  # noqa: B008
    *,
    replicas: Iterable[int] = ALL,
    optimizer: OptimizerFactory = SGD,
    scheduler: SchedulerFactory | None = None,
    corrections: Sequence[Correction] = (),
    start: float = 0.0,
) -> Shard:
    """A shard of one weight of one element."""
    settings = Settings(
        nn.MSELoss(), optimizer, scheduler=scheduler, corrections=tuple(corrections)
    )
    return Shard(3, {"w": g(start)}, settings, protocol, replicas)


def push(shard: Shard, replica: int, gradient: float, *versions: int, samples: int = 1) -> None:
    """A push of a gradient that was taken at a version; none: at the newest."""
    shard.take(replica, {"w": g(gradient)}, samples, versions or (shard.version,))


def w(shard: Shard) -> float:
    return shard.weights["w"].item()


# One replica ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "optimizer",
    [
        partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.01),
        partial(torch.optim.Adagrad, lr=0.05),
        partial(torch.optim.Adam, lr=3e-3),
    ],
    ids=["momentum", "adagrad", "adam"],
)
def test_one_replica_is_serial_training_bitwise(
    optimizer: Callable[..., torch.optim.Optimizer],
) -> None:
    """After every update, a scheduler's included."""
    decay = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.95)
    generator = torch.Generator().manual_seed(0)
    start = {"a": torch.randn(4, 3, generator=generator), "b": torch.randn(3, generator=generator)}
    shard = Shard(0, start, Settings(nn.MSELoss(), optimizer, decay), Protocol(), [0])
    weights = {name: nn.Parameter(value.clone()) for name, value in start.items()}
    serial = optimizer(list(weights.items()))
    scheduler = decay(serial)
    for k in range(20):
        x, y = torch.randn(5, 4, generator=generator), torch.randn(5, 3, generator=generator)
        shard.fetch(0)
        assert shard.answers() == [0]
        own = {name: value.requires_grad_() for name, value in copy.deepcopy(shard.give(0)).items()}
        loss = (x @ own["a"] + own["b"] - y).square().mean()
        gradients = torch.autograd.grad(loss, list(own.values()))
        shard.take(0, dict(zip(own, gradients, strict=True)), 5, [k])
        serial.zero_grad()
        (x @ weights["a"] + weights["b"] - y).square().mean().backward()
        serial.step()
        scheduler.step()
        for name, weight in weights.items():
            assert torch.equal(shard.weights[name], weight), f"{name} after update {k}"
    assert shard.version == 20 and shard.staleness == {0: 20} and shard.pushed == {0: 20}
    assert shard.learning_rates == [group["lr"] for group in serial.param_groups]


def test_the_shard_has_weights_of_its_own() -> None:
    given = nn.Parameter(g(1, 2))
    shard = Shard(0, {"w": given}, Settings(nn.MSELoss(), SGD), Protocol(), [0])
    handed = shard.snapshot()
    shard.take(0, {"w": g(1, 1)}, 1, [0])
    assert shard.weights["w"].tolist() == [0, 1]
    assert given.tolist() == handed["w"].tolist() == [1, 2]
    handed["w"].zero_()
    assert shard.weights["w"].tolist() == [0, 1]


def test_weights_are_copied_once_a_version() -> None:
    shard = make()
    first = shard.give(0)
    assert shard.give(1) is first and first["w"].item() == 0
    push(shard, 0, 1.0)
    assert shard.give(1)["w"].item() == -1 and first["w"].item() == 0
    shard.load({"w": g(7)})
    assert shard.give(1)["w"].item() == w(shard) == 7 and shard.version == 1


def test_a_weight_without_a_gradient_stays() -> None:
    settings = Settings(nn.MSELoss(), partial(torch.optim.SGD, lr=1.0, momentum=0.5))
    shard = Shard(0, {"v": g(5), "w": g(5)}, settings, Protocol(), [0])
    shard.take(0, {"w": g(1)}, 1, [0])
    assert (shard.names, shard.weights["v"].item(), w(shard)) == (["v", "w"], 5, 4)
    shard.take(0, {"v": g(1)}, 1, [1])
    assert (shard.weights["v"].item(), w(shard)) == (4, 4)


# Several: when gradients are applied ------------------------------------------------------------


def test_each_gradient_is_applied_as_it_comes() -> None:
    """Downpour: however old."""
    shard = make(start=10)
    for replica, version, gradient in ((0, 0, 1.0), (1, 0, 2.0), (2, 0, 4.0), (0, 1, 0.5)):
        push(shard, replica, gradient, version)
    assert (w(shard), shard.version) == (10 - 7.5, 4)
    assert shard.staleness == {0: 1, 1: 1, 2: 2}
    assert shard.latest == {0: 2, 1: 1, 2: 2}
    assert shard.statistics.pushed == {0: 2, 1: 1, 2: 1}
    assert (shard.statistics.stage, shard.statistics.updates) == (3, 4)
    assert shard.statistics.staleness == {0: 1, 1: 1, 2: 2}
    assert shard.statistics.learning_rate == 1.0


@pytest.mark.parametrize("many", [2, 3])
def test_softsync_applies_the_mean_of_so_many(many: int) -> None:
    """Whoever they are from, the same one twice included."""
    shard = make(Protocol(many), start=8)
    gradients = [1.0, 3.0, 6.0, 2.0, 4.0, 8.0]
    for k, gradient in enumerate(gradients):
        assert shard.version == k // many
        push(shard, min(k % many, 1), gradient, 0)
    means = [sum(gradients[k : k + many]) / many for k in range(0, 6, many)]
    assert w(shard) == pytest.approx(8 - sum(means), rel=1e-15) and shard.version == 6 // many


def test_softsync_with_momentum_is_one_step_on_the_mean() -> None:
    momentum = partial(torch.optim.SGD, lr=0.5, momentum=0.5)
    shard = make(Protocol(2), optimizer=momentum)
    for gradient in (1.0, 3.0, 0.0, 2.0):
        push(shard, 0, gradient)
    velocity = [2.0, 0.5 * 2.0 + 1.0]
    assert w(shard) == -0.5 * sum(velocity)


def test_the_mean_is_by_samples() -> None:
    shard = make(Protocol(2))
    push(shard, 0, 8.0, samples=1)
    push(shard, 1, 4.0, samples=3)
    assert w(shard) == -(8 + 3 * 4) / 4


def test_every_gradient_is_weighed_by_its_own_factor() -> None:
    """θ - (1/c) Σ α(τ_l) g_l, Zhang et al. 2016, eq. 3; exact."""
    shard = make(Protocol(4), replicas=range(4), corrections=[LearningRate("inverse")], start=100)
    for _ in range(4 * 4):
        push(shard, 0, 0.0)
    assert (w(shard), shard.version) == (100, 4)
    for replica, (gradient, version) in enumerate([(8.0, 4), (8.0, 3), (16.0, 2), (32.0, 0)]):
        push(shard, replica, gradient, version)
    assert w(shard) == 100 - (8 * 1 + 8 * 1 + 16 / 2 + 32 / 4) / 4


def test_the_factor_is_the_learning_rates_and_not_the_gradients() -> None:
    """Adagrad divides a gradient by its own size: half of it would move the weight as far."""
    adagrad = partial(torch.optim.Adagrad, lr=1.0, eps=0.0)
    shard = make(optimizer=adagrad, corrections=[LearningRate("inverse")])
    push(shard, 0, 4.0, 0)
    assert w(shard) == -1
    shard.version = 4
    push(shard, 0, 3.0, 0)
    assert w(shard) == -1 - (1 / 4) * 3 / 5  # sqrt(4² + 3²) = 5
    assert shard.learning_rates == [1.0]


def test_a_push_of_several_micro_batches_has_the_mean_of_their_factors() -> None:
    shard = make(corrections=[LearningRate("inverse")])
    shard.version = 4
    push(shard, 1, 8.0, 0, 2, 3, 3, samples=6)
    assert w(shard) == -8 * (1 / 4 + 1 / 2 + 1 + 1) / 4
    assert shard.staleness == {4: 1, 2: 1, 1: 2} and shard.latest == {1: (4 + 2 + 1 + 1) / 4}


def test_a_factor_of_0_makes_an_update_that_moves_nothing() -> None:
    shard = make(corrections=[LearningRate(lambda age: 0.0)], start=5)
    push(shard, 0, 8.0)
    assert (w(shard), shard.version, shard.pushed[0]) == (5, 1, 1)


def test_a_scheduler_is_stepped_once_an_update() -> None:
    halve = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
    shard = make(Protocol(2), scheduler=halve)
    for k in range(6):
        assert shard.learning_rates == [0.5 ** (k // 2)]
        push(shard, k % 2, 1.0)
    assert w(shard) == -(1 + 0.5 + 0.25)


# Who waits --------------------------------------------------------------------------------------


def fetch(shard: Shard, *replicas: int) -> list[int]:
    """Ask for each; who may have the weights."""
    for replica in replicas:
        shard.fetch(replica)
    return shard.answers()


def test_without_a_protocol_nobody_waits() -> None:
    shard = make()
    assert fetch(shard, 2, 0) == [2, 0] and shard.answers() == []
    for _ in range(100):
        push(shard, 0, 1.0)
        assert fetch(shard, 0) == [0]


def test_hard_sync_waits_for_everybodys_gradient() -> None:
    shard = make(Protocol(3, waits=True))
    assert fetch(shard, 0, 1, 2) == [0, 1, 2]  # nobody has pushed anything yet
    for update in range(3):
        for replica in (1, 0):
            push(shard, replica, 3.0)
            assert fetch(shard, replica) == []
        assert shard.version == update
        push(shard, 2, 6.0)
        assert shard.answers() == [1, 0]
        assert fetch(shard, 2) == [2] and shard.answers() == []
        assert (w(shard), shard.version) == (-4 * (update + 1), update + 1)
    assert shard.staleness == {0: 9}


def test_hard_sync_lets_one_fetch_that_has_nothing_pending() -> None:
    shard = make(Protocol(2, waits=True), replicas=[0, 1])
    push(shard, 0, 1.0)
    assert fetch(shard, 0, 1) == [1]
    push(shard, 1, 1.0)
    assert shard.answers() == [0]


def test_the_bound_holds_back_who_is_too_far_ahead() -> None:
    """Ho et al. 2013: the fastest goes on once the slowest is within the bound."""
    shard = make(Protocol(bound=2))
    for _ in range(2):
        push(shard, 0, 1.0)
        assert fetch(shard, 0) == [0]
    push(shard, 0, 1.0)
    assert fetch(shard, 0) == []  # three ahead of both
    for _ in range(2):
        push(shard, 1, 1.0)
        assert fetch(shard, 1) == [1]  # within two of replica 2, which holds replica 0 back
    push(shard, 2, 1.0)
    assert fetch(shard, 2) == [0, 2]
    assert w(shard) == -6, "what it has pushed is applied, whether it waits or not"


def test_a_bound_of_0_goes_in_step() -> None:
    shard = make(Protocol(bound=0), replicas=[0, 1])
    for _ in range(3):
        push(shard, 0, 1.0)
        assert fetch(shard, 0) == []
        push(shard, 1, 1.0)
        assert fetch(shard, 1) == [0, 1]


def test_who_has_waited_longest_is_answered_first() -> None:
    shard = make(Protocol(3, waits=True))
    for replica in (2, 0):
        push(shard, replica, 1.0)
        shard.fetch(replica)
    push(shard, 1, 1.0)
    assert shard.answers() == [2, 0]


# Who comes and goes -----------------------------------------------------------------------------


@pytest.mark.parametrize("pushed", [False, True], ids=["before its push", "after its push"])
def test_when_one_leaves_the_others_go_on_and_no_gradient_is_lost(pushed: bool) -> None:
    shard = make(Protocol(3, waits=True))
    push(shard, 0, 2.0)
    assert fetch(shard, 0) == []
    if pushed:
        push(shard, 2, 4.0)
        shard.fetch(2)
    shard.leave(2)
    assert shard.version == int(pushed)  # two are two of two
    push(shard, 1, 6.0)
    shard.finish()
    assert w(shard) == (-(2 + 4) / 2 - 6 if pushed else -(2 + 6) / 2)
    assert fetch(shard, 1) == [0, 1]


def test_the_last_one_goes_on_alone() -> None:
    shard = make(Protocol(3, waits=True))
    shard.leave(0)
    shard.leave(2)
    push(shard, 1, 1.0)
    assert fetch(shard, 1) == [1] and shard.version == 1
    shard.leave(1)
    assert (w(shard), shard.training) == (-1, set())


def test_nobody_waits_for_the_slowest_once_it_has_left() -> None:
    shard = make(Protocol(bound=1))
    for _ in range(3):
        push(shard, 0, 1.0)
        push(shard, 1, 1.0)
    assert fetch(shard, 0, 1) == []
    shard.leave(2)
    assert shard.answers() == [0, 1]


def test_one_that_left_is_not_answered() -> None:
    shard = make(Protocol(3, waits=True))
    push(shard, 0, 1.0)
    assert fetch(shard, 0) == []
    shard.leave(0)
    push(shard, 1, 1.0)
    push(shard, 2, 1.0)
    assert fetch(shard, 1) == [1]


def test_what_is_left_over_is_applied_in_the_end() -> None:
    shard = make(Protocol(3))
    push(shard, 0, 2.0, samples=1)
    push(shard, 1, 6.0, samples=3)
    assert (w(shard), shard.version) == (0, 0)
    shard.finish()
    assert (w(shard), shard.version) == (-(2 + 18) / 4, 1)
    shard.finish()
    assert shard.version == 1
    push(shard, 0, 1.0)
    assert shard.version == 1, "a count begins anew"


def test_a_newcomer_counts_as_no_slower_than_the_slowest() -> None:
    shard = make(Protocol(bound=1), replicas=[0, 1])
    for _ in range(5):
        push(shard, 0, 1.0)
        push(shard, 1, 1.0)
    shard.enter(7)
    assert fetch(shard, 0, 7) == [0, 7]
    for _ in range(2):
        push(shard, 0, 1.0)
    assert fetch(shard, 0) == []  # two ahead of it
    push(shard, 7, 1.0)
    assert fetch(shard, 0) == []  # and of replica 1
    push(shard, 1, 1.0)
    assert shard.answers() == [0, 0]


def test_a_newcomer_has_pushed_nothing_yet() -> None:
    shard = make(replicas=[0])
    for _ in range(5):
        push(shard, 0, 1.0)
    shard.enter(7)
    push(shard, 7, 1.0)
    assert shard.statistics.pushed == {0: 5, 7: 1}


def test_one_that_comes_back_does_not_hold_the_others_up() -> None:
    """It was away for long: as for a newcomer, nobody waits until it has caught up."""
    shard = make(Protocol(bound=1), replicas=[0, 1])
    push(shard, 1, 1.0)
    shard.leave(1)
    for _ in range(9):
        push(shard, 0, 1.0)
    shard.enter(1)
    assert fetch(shard, 0) == [0]
    push(shard, 0, 1.0)
    push(shard, 0, 1.0)
    assert fetch(shard, 0) == []


def test_softsync_takes_as_many_whoever_is_there() -> None:
    """Nobody waits for an update, so nobody's absence makes it smaller."""
    shard = make(Protocol(2), replicas=[0, 1])
    shard.leave(1)
    push(shard, 0, 1.0)
    assert shard.version == 0
    push(shard, 0, 3.0)
    assert (w(shard), shard.version) == (-2, 1)


def test_hard_sync_needs_more_again_when_one_enters() -> None:
    shard = make(Protocol(2, waits=True), replicas=[0])
    push(shard, 0, 1.0)
    assert shard.version == 1
    shard.enter(1)
    push(shard, 0, 1.0)
    assert shard.version == 1
    push(shard, 1, 3.0)
    assert (w(shard), shard.version) == (-1 - 2, 2)


# Warming up -------------------------------------------------------------------------------------


def test_the_first_replica_warms_up_alone_and_then_the_rate_is_multiplied() -> None:
    shard = make(Protocol(gradients=3, warm_up=2, warm_up_factor=0.25))
    assert shard.warms_up and shard.learning_rates == [1.0]
    assert fetch(shard, 1, 0, 2) == [0]
    push(shard, 0, 1.0)
    assert (w(shard), shard.version, fetch(shard, 0)) == (-1, 1, [0])
    push(shard, 0, 2.0)
    assert (w(shard), shard.version, shard.warms_up) == (-3, 2, False)
    assert shard.answers() == [1, 2]
    assert shard.learning_rates == [0.25] and shard.statistics.learning_rate == 0.25
    for replica in ALL:
        push(shard, replica, 4.0)
    assert (w(shard), shard.version) == (-3 - 0.25 * 4, 3)
    assert shard.optimizers[0].param_groups[0]["lr"] == 1.0


def test_warming_up_ends_when_the_first_replica_leaves() -> None:
    shard = make(Protocol(warm_up=100))
    assert fetch(shard, 1, 2) == []
    shard.leave(0)
    assert shard.answers() == [1, 2]


def test_without_a_warm_up_there_is_nothing_after_it() -> None:
    shard = make(Protocol(warm_up=0, warm_up_factor=0.25))
    assert not shard.warms_up and shard.learning_rates == [1.0]
    push(shard, 2, 1.0)
    assert w(shard) == -1


def test_warming_up_and_staleness_multiply_the_rate_together() -> None:
    shard = make(Protocol(warm_up=4, warm_up_factor=0.5), corrections=[LearningRate("inverse")])
    for version in (0, 1, 0, 3):  # τ is 0, 0, 2, 0
        push(shard, 0, 1.0, version)
    assert w(shard) == -3.5
    push(shard, 1, 8.0, 0)
    assert w(shard) == -3.5 - 8 / 4 * 0.5


# Delay compensation -----------------------------------------------------------------------------


def test_a_gradient_is_compensated_with_the_weights_that_were_sent() -> None:
    """g + λ g² (w_now - w_then), with λ = 1/2 and a rate of 1."""
    shard = make(corrections=[DelayCompensation(0.5)], start=4, replicas=[0, 1])
    assert fetch(shard, 0, 1) == [0, 1]  # w_0 = 4
    push(shard, 0, 2.0, 0)
    assert w(shard) == 2  # nothing to compensate yet
    assert fetch(shard, 0) == [0]  # w_1 = 2
    push(shard, 1, 1.0, 0)
    assert w(shard) == 2 - (1 + 0.5 * 1 * (2 - 4))  # 2
    push(shard, 0, 2.0, 1)
    assert w(shard) == 2 - (2 + 0.5 * 4 * (2 - 2))  # 0
    push(shard, 0, -2.0, 1)
    assert w(shard) == 0 - (-2 + 0.5 * 4 * (0 - 2))  # 6
    push(shard, 1, 2.0, 0)
    assert w(shard) == 6 - (2 + 0.5 * 4 * (6 - 4))  # 0


def test_a_fresh_gradient_is_not_changed_and_one_of_softsync_is() -> None:
    shard = make(Protocol(2), corrections=[DelayCompensation(1.0)], replicas=[0, 1])
    fetch(shard, 0, 1)
    push(shard, 0, 1.0, 0)
    push(shard, 1, 3.0, 0)
    assert w(shard) == -2
    fetch(shard, 0)
    push(shard, 0, 1.0, 1)
    push(shard, 1, 1.0, 0)
    assert w(shard) == -2 - (1 + (1 + 1 * (-2 - 0))) / 2


def test_versions_are_kept_for_as_long_as_a_gradient_may_refer_to_them() -> None:
    shard = make(corrections=[DelayCompensation()])
    fetch(shard, *ALL)
    for k in range(10):
        push(shard, 0, 0.5, k)
        fetch(shard, 0)
    push(shard, 1, 0.5, 0)  # computed on version 0 all the while, and 2 may still be
    assert set(shard._kept) == set(range(11))
    fetch(shard, 1)
    push(shard, 2, 0.5, 0)
    fetch(shard, 2)
    push(shard, 1, 0.5, 11)
    push(shard, 2, 0.5, 12)
    assert set(shard._kept) == {9, 10, 11, 12}, "replica 0's next may be of 9 at the earliest"
    push(shard, 0, 0.5, 10)
    assert set(shard._kept) == {10, 11, 12}


def test_a_replica_that_left_keeps_no_version_alive() -> None:
    shard = make(corrections=[DelayCompensation()])
    fetch(shard, *ALL)
    shard.leave(2)
    for _ in range(5):
        for replica in (0, 1):
            push(shard, replica, 0.5, shard.version)
            fetch(shard, replica)
    assert len(shard._kept) <= 3
    push(shard, 2, 0.5, 0)  # was still on its way when its connection was lost
    for _ in range(50):
        for replica in (0, 1):
            push(shard, replica, 0.5, shard.version)
            fetch(shard, replica)
    assert len(shard._kept) <= 3


def test_in_step_only_what_is_needed_is_kept() -> None:
    shard = make(corrections=[DelayCompensation()], replicas=[0])
    for k in range(20):
        fetch(shard, 0)
        push(shard, 0, 1.0, k)
        assert set(shard._kept) == {k}


def test_without_compensation_nothing_is_kept() -> None:
    shard = make(corrections=[LearningRate("inverse")])
    for k in range(5):
        fetch(shard, *ALL)
        push(shard, 0, 1.0, k)
    assert not shard._kept


def test_after_other_weights_were_loaded_a_gradient_is_compensated_from_those() -> None:
    """Version 0 is what was loaded, and no longer what it was when it was first sent."""
    shard = make(corrections=[DelayCompensation(1.0)], start=4, replicas=[0])
    fetch(shard, 0)
    shard.load({"w": g(10)})
    push(shard, 0, 1.0, 0)
    assert w(shard) == 9


def test_sparse_gradients_cannot_be_compensated() -> None:
    settings = Settings(nn.MSELoss(), SGD, corrections=(DelayCompensation(),))
    shard = Shard(0, {"w": torch.zeros(4, 2)}, settings, Protocol(), [0])
    fetch(shard, 0)
    with pytest.raises(ValueError, match="needs dense gradients"):
        shard.take(0, {"w": torch.eye(4, 2).to_sparse()}, 1, [0])


# Sparse gradients -------------------------------------------------------------------------------


def sparse(rows: Sequence[int], value: float) -> Tensor:
    values = torch.full((len(rows), 2), value, dtype=torch.float64)
    return torch.sparse_coo_tensor([[*rows]], values, (6, 2), check_invariants=True)


@pytest.mark.parametrize("many", [1, 2])
@pytest.mark.parametrize("name", ["sgd", "adagrad"])
def test_sparse_gradients_touch_only_their_rows(name: str, many: int) -> None:
    """And do there what dense ones do."""
    optimizer: OptimizerFactory = partial(torch.optim.Adagrad, lr=0.5) if name != "sgd" else SGD
    start = torch.arange(12, dtype=torch.float64).view(6, 2)
    settings = Settings(nn.MSELoss(), optimizer)
    shards = [Shard(0, {"w": start}, settings, Protocol(many), [0, 1]) for _ in range(2)]
    for replica, rows, value in ((0, [0, 4], 1.0), (1, [4], 3.0), (0, [0, 0], 0.5), (1, [1], 2.0)):
        gradient = sparse(rows, value)
        shards[0].take(replica, {"w": gradient.to_dense()}, 1, [0])
        shards[1].take(replica, {"w": gradient}, 1, [0])
    dense, touched = (shard.weights["w"].detach() for shard in shards)
    assert torch.allclose(touched, dense, rtol=1e-14, atol=0)
    assert torch.equal(touched[[2, 3, 5]], start[[2, 3, 5]])
    assert (touched[[0, 1, 4]] < start[[0, 1, 4]]).all()
    if name == "sgd":
        expected = start - torch.tensor([2.0, 2, 0, 0, 4, 0]).view(6, 1) / many
        assert torch.equal(touched, expected)


# Its state --------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, OptimizerFactory] = {
    "momentum": partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    "adam": partial(torch.optim.Adam, lr=3e-3),
}


def stateful(optimizer: OptimizerFactory) -> Shard:
    decay = partial(torch.optim.lr_scheduler.StepLR, step_size=3, gamma=0.5)
    return make(
        Protocol(gradients=2), optimizer=optimizer, scheduler=decay, start=1,
        corrections=[LearningRate("inverse")],
    )  # fmt: skip


def go_on(shard: Shard) -> list[float]:
    found = []
    for k in range(8):
        push(shard, k % 3, 0.1 * k - w(shard), max(0, shard.version - k % 3))
        found.append(w(shard))
    return found


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_goes_on_from_its_state_bitwise(name: str) -> None:
    shard, other = stateful(OPTIMIZERS[name]), stateful(OPTIMIZERS[name])
    go_on(shard)
    other.load_state_dict(shard.state_dict())
    assert (other.version, other.learning_rates) == (4, shard.learning_rates)
    assert other.statistics == shard.statistics
    assert other.give(0)["w"].item() == w(shard)
    assert go_on(other) == go_on(shard)
    assert other.statistics == shard.statistics and other.version == 8


def test_after_a_restart_a_new_replica_does_not_hold_the_others_up() -> None:
    """What was pushed before counts in the statistics alone."""
    shard = make(Protocol(bound=1), replicas=[0, 1])
    for _ in range(9):
        push(shard, 0, 1.0)
        push(shard, 1, 1.0)
    other = make(Protocol(bound=1))
    other.load_state_dict(shard.state_dict())
    push(other, 0, 1.0)
    assert fetch(other, 0) == [0]
    push(other, 0, 1.0)
    assert fetch(other, 0) == []
    assert other.statistics.pushed == {0: 11, 1: 9}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_its_state_is_a_copy(name: str) -> None:
    """It is written by another thread while the shard goes on."""
    shard = stateful(OPTIMIZERS[name])
    go_on(shard)
    state = shard.state_dict()
    before = copy.deepcopy(state)
    go_on(shard)
    assert same(state, before)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_may_be_taken_up_twice(name: str) -> None:
    """So the shard that goes on from it must not change it."""
    shard, other = stateful(OPTIMIZERS[name]), stateful(OPTIMIZERS[name])
    go_on(shard)
    state = shard.state_dict()
    before = copy.deepcopy(state)
    other.load_state_dict(state)
    go_on(other)
    assert same(state, before)
