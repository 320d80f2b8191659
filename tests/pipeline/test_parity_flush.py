"""gpipe and 1f1b flush at every mini-batch: they must be plain autograd on one device."""

from typing import Literal

import pytest
import torch
from torch import nn

from headrace.pipeline import Pipeline

from .helpers import (
    OPTIMIZERS,
    SIZES,
    assert_close,
    batches_of,
    clone,
    halve_slowly,
    momentum,
    normed,
    plain,
    tanh_net,
)
from .simulator import Batch

Flushing = Literal["gpipe", "1f1b"]
SCHEDULES: tuple[Flushing, ...] = ("gpipe", "1f1b")


@pytest.mark.parametrize("clip", [None, 0.35], ids=["free", "clipped"])
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_equals_plain_autograd(
    schedule: Flushing, n: int, optimizer: str, micro_batches: int, clip: float | None
) -> None:
    """20 updates in two epochs, micro-batches of 3, 3 and 2 samples, at last 2, 1 and 1."""
    batches, factory, loss_fn = batches_of(76, 8), OPTIMIZERS[optimizer], nn.MSELoss()
    reference = tanh_net()
    loss, norms = plain(reference, loss_fn, factory, batches * 2, clip)
    assert clip is None or min(norms) < clip < max(norms)
    with Pipeline(
        tanh_net(),
        loss_fn,
        factory,
        schedule=schedule,
        balance=SIZES[n],
        stages=n,
        micro_batches=micro_batches,
        clip_grad_norm=clip,
    ) as pipe:
        reports = [pipe.train(batches) for _ in range(2)]
        assert_close(clone(pipe.state_dict()), clone(reference.state_dict()))
    for report in reports:
        assert (report.samples, report.updates) == (76, 10)
        assert report.micro_batches == 10 * micro_batches
        assert report.staleness == (0,) * n
    assert sum(r.loss for r in reports) / 2 == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_mini_batch_of_fewer_samples_than_micro_batches(schedule: Flushing, n: int) -> None:
    batches = batches_of(18, 8)  # the last one has 2 samples for 3 micro-batches
    reference = tanh_net()
    plain(reference, nn.MSELoss(), momentum, batches * 2)
    with Pipeline(
        tanh_net(),
        nn.MSELoss(),
        momentum,
        schedule=schedule,
        balance=SIZES[n],
        stages=n,
        micro_batches=3,
    ) as pipe:
        for _ in range(2):
            assert pipe.train(batches).samples == 18
        assert_close(clone(pipe.state_dict()), clone(reference.state_dict()))


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_update_every_joins_mini_batches(schedule: Flushing, micro_batches: int) -> None:
    """Three mini-batches are one batch of all their samples; `close` applies the last, partial sum.

    Two epochs of 10 mini-batches: the fourth update takes its mini-batches from both.
    """
    batches = batches_of(76, 8)
    stream = batches * 2
    joined = [_join(stream[a : a + 3]) for a in range(0, 20, 3)]
    assert [len(x) for x, _ in joined] == [24, 24, 24, 20, 24, 24, 12]
    reference = tanh_net()
    optimizer = torch.optim.AdamW(reference.named_parameters(), lr=3e-3)
    scheduler = halve_slowly(optimizer)
    model = tanh_net()
    pipe = Pipeline(
        model,
        nn.MSELoss(),
        lambda params: torch.optim.AdamW(params, lr=3e-3),
        scheduler=halve_slowly,
        schedule=schedule,
        balance=SIZES[4],
        stages=4,
        micro_batches=micro_batches,
        update_every=3,
    )
    updates = [pipe.train(batches).updates for _ in range(2)]
    assert updates == [3, 3]
    for update, (x, y) in enumerate(joined):
        if update == 6:
            assert_close(clone(pipe.state_dict()), clone(reference.state_dict()))
            pipe.close()
        optimizer.zero_grad()
        nn.MSELoss()(reference(x), y).backward()
        optimizer.step()
        scheduler.step()
    assert_close(clone(model.state_dict()), clone(reference.state_dict()))


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_batch_norm_sees_micro_batches_in_order(schedule: Flushing, n: int) -> None:
    """Its statistics are those of each micro-batch, and each counts once."""
    batches = batches_of(71, 9)  # the last one has 8 samples
    reference = normed()
    optimizer = momentum(list(reference.named_parameters()))
    for x, y in batches * 3:
        optimizer.zero_grad()
        for part, target in zip(x.tensor_split(3), y.tensor_split(3), strict=True):
            (nn.MSELoss()(reference(part), target) * (len(part) / len(x))).backward()
        optimizer.step()
    with Pipeline(
        normed(),
        nn.MSELoss(),
        momentum,
        schedule=schedule,
        balance=[4] * 4 if n == 4 else [16],
        stages=n,
        micro_batches=3,
    ) as pipe:
        for _ in range(3):
            pipe.train(batches)
        assert_close(clone(pipe.state_dict()), clone(reference.state_dict()))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_frozen_layers_stay_and_pass_gradients_on(schedule: Flushing) -> None:
    """The first stage frozen whole, another in part; clipping counts what is trained only."""
    batches = batches_of(76, 8)
    models = [tanh_net(), tanh_net()]
    for model in models:
        model[:4].requires_grad_(False)
        model[6].requires_grad_(False)
    before = clone(models[0].state_dict())
    _, norms = plain(models[0], nn.MSELoss(), momentum, batches * 2, clip=0.3)
    assert max(norms) > 0.3
    with Pipeline(
        models[1],
        nn.MSELoss(),
        momentum,
        schedule=schedule,
        balance=SIZES[4],
        stages=4,
        micro_batches=3,
        clip_grad_norm=0.3,
    ) as pipe:
        for _ in range(2):
            pipe.train(batches)
        got = clone(pipe.state_dict())
    assert_close(got, clone(models[0].state_dict()))
    assert torch.equal(got["0.weight"], before["0.weight"])
    assert torch.equal(got["6.weight"], before["6.weight"])


def _join(batches: list[Batch]) -> Batch:
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
