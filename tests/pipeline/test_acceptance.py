"""Section 1's claims on real data: a delayed pipeline learns what a synchronous one does.

Pipelined back-propagation (Chen et al. 2012) with its own delays, that is slack 1: 6, 4, 2, 0 on
four stages. Every number is a mean over three seeds. `nohist` is an ablation and no policy of the
engine, so the simulator runs it.
"""

import math
import pathlib
import sysconfig
from collections.abc import Iterable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from headrace.pipeline.corrections import WeightPrediction
from headrace.pipeline.rules import Delayed
from headrace.pipeline.simulation import Simulation

from .simulator import Batch, cut, depths_of, simulate

pytestmark = pytest.mark.slow
SEEDS = (0, 1, 2)
EPOCHS, BATCH, STAGES = 15, 32, 4
STASH: dict[str, Any] = {"rule": Delayed(weights="stash"), "slack": 1}
SYNC: dict[str, Any] = {"schedule": "1f1b"}


def sgd(lr: float) -> Any:
    def factory(params: Iterable[tuple[str, nn.Parameter]]) -> Optimizer:
        return torch.optim.SGD(params, lr=lr)

    return factory


def cosine(updates: int) -> Any:
    def factory(optimizer: Optimizer) -> LRScheduler:
        return CosineAnnealingLR(optimizer, updates)

    return factory


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    return (output.argmax(1) == target).float().mean()


@cache
def digits() -> tuple[Batch, Batch]:
    """1437 images to train on and 360 to test with, less the mean, over one standard deviation."""
    data = pytest.importorskip("sklearn.datasets").load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32), torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1437], order[1437:]
    x = (x - x[train].mean(0)) / (x[train] - x[train].mean(0)).std()
    return (x[train], y[train]), (x[test], y[test])


def epochs_of_digits(seed: int) -> list[list[Batch]]:
    """15 epochs of 44 mini-batches of 32, each in its own order; the rest of 29 is left out."""
    (x, y), _ = digits()
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(x), generator=generator) for _ in range(EPOCHS)]
    return [
        [(x[order[a : a + BATCH]], y[order[a : a + BATCH]]) for a in range(0, len(x), BATCH)][:-1]
        for order in orders
    ]


def mlp(seed: int) -> nn.Sequential:
    """Eight Linear layers, 64 wide, with a ReLU between each two."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for _ in range(7):
        layers += [nn.Linear(64, 64), nn.ReLU()]
    for layer in layers[::2]:
        assert isinstance(layer, nn.Linear)
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers, nn.Linear(64, 10))


MLP_SIZES = [4, 4, 4, 3]


def digits_accuracy(seed: int, **how: Any) -> float:
    """Test accuracy of the MLP after 15 epochs, cosine learning rate .05, no momentum."""
    with Simulation(
        mlp(seed),
        nn.CrossEntropyLoss(),
        sgd(0.05),
        scheduler=cosine(EPOCHS * (1437 // BATCH)),
        balance=MLP_SIZES,
        stages=STAGES,
        **how,
    ) as pipe:
        for epoch in epochs_of_digits(seed):
            pipe.train(epoch)
        return float(pipe.evaluate([digits()[1]], {"accuracy": accuracy})["accuracy"])


def digits_accuracy_without_history(seed: int) -> float:
    model = mlp(seed)
    trained = simulate(
        cut(model, MLP_SIZES),
        nn.CrossEntropyLoss(),
        sgd(0.05),
        [batch for epoch in epochs_of_digits(seed) for batch in epoch],
        depths=depths_of(STAGES, 1),
        policy="nohist",
        scheduler=cosine(EPOCHS * (1437 // BATCH)),
    )
    model.load_state_dict(trained.weights)
    x, y = digits()[1]
    return float(accuracy(model(x), y))


def mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)


@cache
def mean_accuracy(how: str) -> float:
    if how == "nohist":
        return mean(digits_accuracy_without_history(seed) for seed in SEEDS)
    settings = {"sync": SYNC, "stash": STASH}[how]
    return mean(digits_accuracy(seed, **settings) for seed in SEEDS)


@pytest.mark.timeout(600)
def test_a2_stash_is_as_good_as_synchronous_training() -> None:
    sync, stash = mean_accuracy("sync"), mean_accuracy("stash")
    print(f"\ntest accuracy: sync {sync:.4f}, stash {stash:.4f}")
    assert sync > 0.95
    assert stash >= sync - 0.015


@pytest.mark.timeout(600)
def test_a3_activations_must_be_kept() -> None:
    stash, nohist = mean_accuracy("stash"), mean_accuracy("nohist")
    print(f"\ntest accuracy: stash {stash:.4f}, nohist {nohist:.4f}")
    assert nohist <= stash - 0.3


def loss_with_momentum(seed: int, **how: Any) -> float:
    """Training loss of the MLP on eight stages with the delays 14, 12, … 0, at momentum .9."""
    with Simulation(
        mlp(seed),
        nn.CrossEntropyLoss(),
        lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9),
        scheduler=cosine(EPOCHS * (1437 // BATCH)),
        balance=[2, 2, 2, 2, 2, 2, 2, 1],
        stages=8,
        rule=Delayed("stash"),
        slack=1,
        **how,
    ) as pipe:
        for epoch in epochs_of_digits(seed):
            pipe.train(epoch)
        return float(pipe.evaluate([digits()[0]])["loss"])


def test_a5_prediction_learns_what_momentum_and_delay_keep_stash_from() -> None:
    stash = mean(loss_with_momentum(seed) for seed in SEEDS)
    linear = [WeightPrediction("linear")]
    predicted = mean(loss_with_momentum(seed, corrections=linear) for seed in SEEDS)
    print(f"\ntraining loss: stash {stash:.4f}, linear prediction {predicted:.4f}")
    assert predicted <= 0.6 * stash


CONTEXT, STEPS, CHARACTERS = 12, 1000, 1_000_000
ALPHABET = "\n" + "".join(map(chr, range(32, 127)))  # 96 characters


@cache
def text() -> tuple[Tensor, Tensor]:
    """A million characters of the standard library's source: nine tenths to train on, the rest."""
    number = {c: i for i, c in enumerate(ALPHABET)}
    codes: list[int] = []
    for path in sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py")):
        source = path.read_text(encoding="utf-8", errors="ignore")
        codes += [number[c] for c in source if c in number]
        if len(codes) >= CHARACTERS:
            break
    whole = torch.tensor(codes)
    return whole[: CHARACTERS * 9 // 10], whole[CHARACTERS * 9 // 10 : CHARACTERS]


class Residual(nn.Module):
    """x + Linear(ReLU(Linear(LayerNorm(x))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.body(x)
        return y


def character_model(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Embedding(len(ALPHABET), 16),
        nn.Flatten(),
        nn.Linear(16 * CONTEXT, 128),
        *[Residual(128) for _ in range(4)],
        nn.LayerNorm(128),
        nn.Linear(128, len(ALPHABET)),
    )


def characters_at(source: Tensor, starts: Tensor) -> Batch:
    """Twelve characters and the one that follows, for each start."""
    windows = starts[:, None] + torch.arange(CONTEXT)
    return source[windows], source[starts + CONTEXT]


def bits_per_character(seed: int, **how: Any) -> float:
    """Validation bits after 1000 mini-batches of 64, cosine learning rate .3, no momentum."""
    train, validation = text()
    starts = torch.randint(
        len(train) - CONTEXT, (STEPS, 64), generator=torch.Generator().manual_seed(seed)
    )
    held_out = torch.arange(0, len(validation) - CONTEXT, 3)
    with Simulation(
        character_model(seed),
        nn.CrossEntropyLoss(),
        sgd(0.3),
        scheduler=cosine(STEPS),
        balance=[4, 1, 1, 3],
        stages=STAGES,
        **how,
    ) as pipe:
        pipe.train([characters_at(train, row) for row in starts])
        loss = pipe.evaluate([characters_at(validation, held_out)])["loss"]
    return float(loss) / math.log(2)


@pytest.mark.timeout(600)
def test_a4_a_character_model_loses_little() -> None:
    sync = mean(bits_per_character(seed, **SYNC) for seed in SEEDS)
    delayed = mean(bits_per_character(seed, **STASH) for seed in SEEDS)
    print(f"\nvalidation bits per character: sync {sync:.4f}, stash with slack 1 {delayed:.4f}")
    assert 2.5 < sync < 3.2
    assert delayed - sync <= 0.06
