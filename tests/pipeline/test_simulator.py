"""The oracle itself: against plain torch, and against a clocked pipeline with manual backprop."""

from collections import deque
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

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
from .simulator import cut, depths_of, simulate

POLICIES = ("current", "stash", "replay", "predict")
Array = NDArray[np.float64]


@pytest.mark.parametrize("build", [tanh_net, normed])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("policy", POLICIES)
def test_without_delay_it_is_plain_training(
    policy: str, optimizer: str, build: Callable[[], nn.Sequential]
) -> None:
    model, batches = build(), batches_of(60, 7) * 2
    stages = cut(model, SIZES[4])
    loss_fn, factory = nn.MSELoss(), OPTIMIZERS[optimizer]
    got = simulate(stages, loss_fn, factory, batches, depths=[0] * 4, policy=policy)
    plain(model, loss_fn, factory, batches)
    assert_close(got.weights, clone(model.state_dict()), 1e-13)
    assert_same(got.weights, got.closed)
    assert got.staleness == [[0] * len(batches)] * 4


def test_accumulation_is_the_gradient_of_the_joined_batch() -> None:
    """K micro-batches weighted by samples are one mini-batch of all of them; a rest waits."""
    model, batches = tanh_net(), batches_of(50, 7)  # 8 micro-batches: 3, 3 and a rest of 2
    got = simulate(
        cut(model, SIZES[2]), nn.MSELoss(), momentum, batches, depths=[0, 0], update_every=3
    )
    joined = [tuple(map(torch.cat, zip(*batches[a : a + 3], strict=True))) for a in (0, 3, 6)]
    assert [len(x) for x, _ in joined] == [21, 21, 8]
    opt = momentum(list(model.named_parameters()))
    for (x, y), wanted in zip(joined, (None, got.weights, got.closed), strict=True):
        opt.zero_grad()
        nn.MSELoss()(model(x), y).backward()
        opt.step()
        if wanted:
            assert_close(wanted, clone(model.state_dict()), 1e-13)


def test_depths() -> None:
    assert depths_of(4) == [3, 2, 1, 0]
    assert depths_of(4, 1) == [6, 4, 2, 0]
    assert depths_of(4, [0, 2, 1]) == [6, 5, 2, 0]
    assert depths_of(1) == [0]


def test_staleness_restarts_after_a_drain() -> None:
    batches = batches_of(40, 4)
    got = simulate(
        cut(tanh_net(), SIZES[3]), nn.MSELoss(), momentum, batches, depths=depths_of(3), drains=[5]
    )
    assert got.staleness == [
        [0, 1, 2, 2, 2, 0, 1, 2, 2, 2],
        [0, 1, 1, 1, 1, 0, 1, 1, 1, 1],
        [0] * 10,
    ]


class ClockedStage:
    """tanh(a W) V with its derivative by hand, and the micro-batches it has in flight."""

    def __init__(self, w: Array, v: Array, depth: int) -> None:
        self.now, self.before = (w, v), (w, v)
        self.depth, self.version, self.forwards, self.backwards = depth, 0, 0, 0
        self.inbox: deque[Array] = deque()
        self.gradients: deque[Array] = deque()
        self.kept: deque[tuple[Array, Array, tuple[Array, Array]]] = deque()
        self.sum, self.samples, self.drained = [0 * w, 0 * v], 0, 0

    def forward(self, policy: str, every: int) -> Array:
        a = self.inbox.popleft()
        w, v = self.now
        if policy == "predict":
            lead = self.forwards // every - self.version
            w, v = w + lead * (w - self.before[0]), v + lead * (v - self.before[1])
        h = np.tanh(a @ w)
        self.kept.append((a, h, (w, v)))
        self.forwards += 1
        return h @ v

    def backward(self, policy: str, every: int, rate: float) -> Array:
        a, h, (w, v) = self.kept.popleft()
        delta = self.gradients.popleft()
        if policy in ("current", "replay"):
            w, v = self.now
        if policy == "replay":
            h = np.tanh(a @ w)
        through = (delta @ v.T) * (1 - h * h)
        self.sum[0] = self.sum[0] + len(a) * (a.T @ through)
        self.sum[1] = self.sum[1] + len(a) * (h.T @ delta)
        self.samples += len(a)
        self.backwards += 1
        if self.backwards % every == 0:
            self.update(rate)
        return through @ w.T

    def update(self, rate: float) -> None:
        self.before = self.now
        w, v = self.now
        self.now = (w - rate * self.sum[0] / self.samples, v - rate * self.sum[1] / self.samples)
        self.sum, self.samples, self.version = [0 * w, 0 * v], 0, self.version + 1


def run_clocked(
    stages: list[ClockedStage],
    batches: list[tuple[Array, Array]],
    policy: str,
    every: int,
    drains: list[int],
    rate: float,
) -> None:
    """F(i), then B(i - d_j) once there are that many behind; whoever has its message goes on."""
    ends = [*drains, len(batches)]
    for start, end in zip([0, *drains], ends, strict=True):
        stages[0].inbox.extend(x for x, _ in batches[start:end])
        for stage in stages:
            stage.drained = start
        moved = True
        while moved:
            moved = False
            for j, stage in enumerate(stages):
                in_flight = stage.forwards - stage.backwards
                if stage.forwards < end and in_flight <= stage.depth:
                    if stage.inbox:
                        i, out = stage.forwards, stage.forward(policy, every)
                        if j + 1 < len(stages):
                            stages[j + 1].inbox.append(out)
                        else:
                            y = batches[i][1]
                            stage.gradients.append(2 * (out - y) / out.size)
                        moved = True
                elif in_flight and stage.gradients:
                    back = stage.backward(policy, every, rate)
                    if j:
                        stages[j - 1].gradients.append(back)
                    moved = True
        assert all(stage.backwards == end for stage in stages)


@pytest.mark.parametrize("drains", [[], [13], [4, 5, 17]], ids=str)
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("slack", [0, 1, [2, 0]], ids=str)
@pytest.mark.parametrize("policy", POLICIES)
def test_equals_a_clocked_pipeline_with_manual_backprop(
    policy: str, slack: int | list[int], every: int, drains: list[int]
) -> None:
    """Two independent ways to the same numbers: versions by formula, and a pipeline that runs."""
    torch.manual_seed(0)
    widths, rate = (5, 6, 4, 7, 5, 4, 3), 0.3
    layers: list[nn.Module] = []
    for j in range(3):
        a, b, c = widths[2 * j : 2 * j + 3]
        layers += [nn.Linear(a, b, bias=False), nn.Tanh(), nn.Linear(b, c, bias=False)]
    model = nn.Sequential(*layers).double()
    batches = batches_of(96, 4)[:23] + batches_of(3, 3, seed=2)
    depths = depths_of(3, slack)
    start = clone(model.state_dict())
    clocked = []
    for j, depth in enumerate(depths):
        weights = [start[f"{3 * j + o}.weight"].numpy().T for o in (0, 2)]
        clocked.append(ClockedStage(weights[0], weights[1], depth))
    got = simulate(
        cut(model, [3, 3, 3]),
        nn.MSELoss(),
        lambda params: torch.optim.SGD(params, lr=rate),
        batches,
        depths=depths,
        policy=policy,
        update_every=every,
        drains=drains,
    )
    run_clocked(clocked, [(x.numpy(), y.numpy()) for x, y in batches], policy, every, drains, rate)
    wanted = {
        f"{3 * j + o}.weight": torch.from_numpy(stage.now[o // 2].T)
        for j, stage in enumerate(clocked)
        for o in (0, 2)
    }
    assert_close(got.weights, wanted, 1e-12)
    assert min((wanted[n] - start[n]).abs().max().item() for n in start) > 1e-3


def test_policies_differ_where_weights_move() -> None:
    """An oracle that gave every policy the same numbers would prove nothing."""
    results = [
        simulate(
            cut(tanh_net(), SIZES[3]),
            nn.MSELoss(),
            momentum,
            batches_of(120, 5),
            depths=depths_of(3),
            policy=policy,
            scheduler=halve_slowly,
        ).weights
        for policy in (*POLICIES, "nohist")
    ]
    for a in range(len(results)):
        for b in range(a):
            gap = max((results[a][n] - results[b][n]).abs().max().item() for n in results[a])
            assert gap > 1e-6
