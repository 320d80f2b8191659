"""The stream against the simulator: every weight policy, delay, and drain gives its numbers."""

import math
from collections.abc import Sequence
from typing import Literal

import pytest
import torch
from torch import nn

from headrace.pipeline import Pipeline, Report
from headrace.pipeline.rules import Delayed, Exact

from .helpers import (
    OPTIMIZERS,
    SIZES,
    assert_close,
    assert_same,
    batches_of,
    clone,
    halve_slowly,
    momentum,
    normed,
    plain,
    tanh_net,
)
from .simulator import (
    Batch,
    OptimizerFactory,
    SchedulerFactory,
    Simulation,
    cut,
    depths_of,
    simulate,
)

Policy = Literal["current", "stash", "replay", "predict"]
POLICIES: tuple[Policy, ...] = ("current", "stash", "replay", "predict")
HELD_OUT = batches_of(11, 4, seed=5)


def compare(
    model: nn.Sequential,
    sizes: list[int],
    epochs: Sequence[Sequence[list[Batch]]],
    *,
    policy: Policy = "stash",
    slack: int | list[int] = 0,
    update_every: int = 1,
    optimizer: OptimizerFactory = momentum,
    scheduler: SchedulerFactory | None = None,
    clip: float | None = None,
) -> Simulation:
    """Train pipeline and simulator on `epochs`: groups of `train` calls with a drain in between.

    The drain is an `evaluate`, whose loss must be that of the simulator's weights at that moment.
    Then the weights are compared before and after `close`, which applies a partial accumulation.
    """
    groups = [[batch for loader in group for batch in loader] for group in epochs]
    drains = [sum(map(len, groups[:g])) for g in range(1, len(groups))]
    depths = depths_of(len(sizes), slack)
    wanted = simulate(
        cut(model, sizes),
        nn.MSELoss(),
        optimizer,
        [batch for group in groups for batch in group],
        depths=depths,
        policy=policy,
        update_every=update_every,
        drains=drains,
        scheduler=scheduler,
        clip=clip,
    )
    evaluated, reports = [], []
    pipe = Pipeline(
        model,
        nn.MSELoss(),
        optimizer,
        scheduler=scheduler,
        rule=Delayed(weights=policy),
        balance=sizes,
        stages=len(sizes),
        slack=slack,
        update_every=update_every,
        clip_grad_norm=clip,
    )
    with pipe:
        for g, group in enumerate(epochs):
            if g:
                evaluated.append(pipe.evaluate(HELD_OUT)["loss"])
            for loader in group:
                reports.append(pipe.train(loader))
        assert tuple(pipe.depths) == tuple(depths)
        assert_close(clone(pipe.state_dict()), wanted.weights)
    # In one process what is trained is the user's own model: there are the closed pipe's weights.
    assert_close(clone(model.state_dict()), wanted.closed)
    for loss, state in zip(evaluated, wanted.drained, strict=True):
        assert loss == pytest.approx(held_out_loss(model, state), rel=1e-6)
    assert_reports(reports, epochs, wanted.losses, depths[0])
    return wanted


def assert_reports(
    reports: list[Report], epochs: Sequence[Sequence[list[Batch]]], losses: list[float], d_0: int
) -> None:
    """A report covers what has come back to stage 0 since the one before: fed - d_0, or a drain."""
    samples = [len(x) for group in epochs for loader in group for x, _ in loader]
    fed = drained = told = 0
    remaining = iter(reports)
    for group in epochs:
        for loader in group:
            fed += len(loader)
            report, back = next(remaining), max(drained, fed - d_0)
            assert report.micro_batches == back - told
            assert report.samples == sum(samples[told:back])
            if report.samples:
                total = sum(losses[k] * samples[k] for k in range(told, back))
                assert report.loss == pytest.approx(total / report.samples, rel=1e-6)
            else:
                assert math.isnan(report.loss)
            told = back
        drained = fed


def held_out_loss(model: nn.Sequential, state: dict[str, torch.Tensor]) -> float:
    """The samples' mean loss in evaluation mode."""
    (layers,) = cut(model, [len(model)])
    layers.load_state_dict(state)
    layers.eval()
    losses = [nn.functional.mse_loss(layers(x), y).item() * len(x) for x, y in HELD_OUT]
    return sum(losses) / sum(len(x) for x, _ in HELD_OUT)


def two_and_two(update_every: int) -> list[list[list[Batch]]]:
    """train, train, evaluate, train, train: the last batch of each `train` has 3 samples of 5.

    28 updates for K = 1; for K = 3 it is 21 and one partial, and the drain finds 2 of 3 gathered.
    """
    loader = batches_of(33 if update_every == 1 else 78, 5)
    assert len(loader) == (7 if update_every == 1 else 16)
    assert len(loader[-1][0]) == 3
    return [[loader, loader], [loader, loader]]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("update_every", [1, 3], ids=["every1", "every3"])
@pytest.mark.parametrize("slack", [0, 1], ids=["slack0", "slack1"])
@pytest.mark.parametrize("n", [1, 2, 3, 4], ids=["n1", "n2", "n3", "n4"])
@pytest.mark.parametrize("policy", POLICIES)
def test_equals_the_simulator(
    policy: Policy, n: int, slack: int, update_every: int, optimizer: str
) -> None:
    compare(
        tanh_net(),
        SIZES[n],
        two_and_two(update_every),
        policy=policy,
        slack=slack,
        update_every=update_every,
        optimizer=OPTIMIZERS[optimizer],
    )


@pytest.mark.parametrize("update_every", [1, 3], ids=["every1", "every3"])
@pytest.mark.parametrize("policy", POLICIES)
def test_slack_per_hop(policy: Policy, update_every: int) -> None:
    epochs = two_and_two(update_every)
    wanted = compare(
        tanh_net(), SIZES[4], epochs, policy=policy, slack=[0, 2, 1], update_every=update_every
    )
    if update_every == 1:
        assert [stage[-1] for stage in wanted.staleness] == [6, 5, 2, 0]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("slack", [0, 1], ids=["slack0", "slack1"])
@pytest.mark.parametrize("policy", POLICIES)
def test_batch_norm_and_layer_norm(policy: Policy, slack: int, optimizer: str) -> None:
    """Running statistics too: each micro-batch counts once, in order, `replay`'s included."""
    compare(
        normed(),
        [4] * 4,
        two_and_two(1),
        policy=policy,
        slack=slack,
        optimizer=OPTIMIZERS[optimizer],
    )


@pytest.mark.parametrize("policy", POLICIES)
def test_scheduler_per_update_and_clipping_per_stage(policy: Policy) -> None:
    """Several drains: before anything is fed, twice in mid-accumulation, after one micro-batch."""
    loader = batches_of(43, 5)  # 9 micro-batches: 4 updates in two and a rest
    compare(
        tanh_net(),
        SIZES[3],
        [[], [loader], [loader, loader], [loader[:1]], [loader]],
        policy=policy,
        slack=1,
        update_every=2,
        scheduler=halve_slowly,
        clip=0.25,
    )


@pytest.mark.parametrize("policy", POLICIES)
def test_frozen_stages_and_stages_without_parameters(policy: Policy) -> None:
    """Stage 0 is frozen, stage 2 is a lone Tanh, stage 3 is frozen in part: gradients pass."""
    model = tanh_net()
    model[:4].requires_grad_(False)
    model[8].requires_grad_(False)
    compare(model, [4, 3, 1, 4, 4], two_and_two(1), policy=policy)


@pytest.mark.parametrize("policy", POLICIES)
def test_micro_batches_are_the_stream_s_unit(policy: Policy) -> None:
    """A mini-batch of 9, 8 or 5 samples is cut into three, and every one is an update."""
    batches = batches_of(26, 9, seed=3) + batches_of(5, 5, seed=4)
    assert [len(x) for x, _ in batches] == [9, 9, 8, 5]
    cuts = [
        part for x, y in batches for part in zip(x.tensor_split(3), y.tensor_split(3), strict=True)
    ]
    wanted = simulate(
        cut(tanh_net(), SIZES[3]),
        nn.MSELoss(),
        momentum,
        cuts * 2,
        depths=depths_of(3),
        policy=policy,
    )
    with Pipeline(
        tanh_net(),
        nn.MSELoss(),
        momentum,
        rule=Delayed(weights=policy),
        balance=SIZES[3],
        stages=3,
        micro_batches=3,
    ) as pipe:
        for _ in range(2):
            pipe.train(batches)
        assert_close(clone(pipe.state_dict()), wanted.weights)


def test_replay_repeats_dropout() -> None:
    """The second forward draws the first one's mask, and takes nothing from the next ones.

    With a tiny learning rate eta the two policies differ by eta² where the masks are the same,
    and by eta where they are not.
    """
    batches, weights = batches_of(100, 5), []
    for policy in (*POLICIES[1:3], POLICIES[1]):
        layers = [part for layer in tanh_net() for part in (layer, nn.Dropout(0.4))]
        torch.manual_seed(2)
        with Pipeline(
            nn.Sequential(*layers),
            nn.MSELoss(),
            lambda params: torch.optim.SGD(params, lr=1e-6),
            rule=Delayed(weights=policy),
            balance=[12, 10, 10],
            stages=3,
        ) as pipe:
            pipe.train(batches)
            weights.append(clone(pipe.state_dict()))
    stash, replay, again = weights
    assert_same(again, stash)
    assert_close(replay, stash, 1e-10)
    start = {
        f"{2 * int(n.split('.')[0])}.weight": w
        for n, w in tanh_net().state_dict().items()
        if "weight" in n
    }
    assert min((stash[n] - start[n]).abs().max().item() for n in start) > 1e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("policy", [*POLICIES, "exact"])
def test_one_stage_is_the_plain_loop_bitwise(
    policy: str, optimizer: str, dtype: torch.dtype
) -> None:
    """Nothing is stale, so not one rounding may differ; the batch sizes are no powers of two."""
    batches, factory = batches_of(45, 7, dtype=dtype), OPTIMIZERS[optimizer]
    reference = tanh_net(dtype=dtype)
    plain(reference, nn.MSELoss(), factory, batches * 3)
    rule = Exact() if policy == "exact" else Delayed(weights=policy)
    with Pipeline(
        tanh_net(dtype=dtype), nn.MSELoss(), factory, rule=rule, stages=1, balance=[16]
    ) as pipe:
        for _ in range(3):
            pipe.train(batches)
        assert_same(clone(pipe.state_dict()), clone(reference.state_dict()))


@pytest.mark.parametrize("policy", POLICIES)
def test_one_stage_is_the_plain_loop_bitwise_with_all_the_trimmings(policy: Policy) -> None:
    """BatchNorm, dropout from torch's own random state, clipping, a frozen layer, momentum."""

    def build() -> nn.Sequential:
        model = nn.Sequential(*normed().float(), nn.Dropout(0.3), nn.Linear(3, 3))
        model[0].requires_grad_(False)
        return model

    batches = batches_of(45, 7, dtype=torch.float32)
    reference = build()
    torch.manual_seed(11)
    _, norms = plain(reference, nn.MSELoss(), momentum, batches * 3, clip=0.8)
    assert min(norms) < 0.8 < max(norms)
    model = build()
    torch.manual_seed(11)
    with Pipeline(
        model,
        nn.MSELoss(),
        momentum,
        rule=Delayed(weights=policy),
        stages=1,
        balance=[18],
        clip_grad_norm=0.8,
    ) as pipe:
        for _ in range(3):
            pipe.train(batches)
        assert_same(clone(pipe.state_dict()), clone(reference.state_dict()))
