"""What stale gradients cost, and where to draw the line between using and ignoring them.

python -m headrace.launch.studies.asynchronous [--seeds 3] [--short] [--picture FILE]

Trains small networks (He's first weights) on scikit-learn's digits by asynchronous SGD, all in one
process: the servers' shards, and learners that take drawn times (`event_simulator`). A mini-batch
takes 1 on average, gamma-distributed: with a standard deviation of 0.2 for Zhang et al.'s learners,
of 0.7 for Downpour's replicas, on machines that others use too (one table shows that less does
worse). Whoever begins takes the next mini-batch of an epoch's random order. A fetch comes after the
replica's own pushes, as in the product. Prints tables in Markdown, a row as it comes, and ends with
1 if a claim does not hold.
"""

import argparse
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import MultiStepLR

from headrace.models import mlp
from headrace.pipeline.corrections import Correction, LearningRate
from headrace.pipeline.errors import InputError
from headrace.pipeline.replicas import Downpour
from headrace.pipeline.settings import Settings

from ..data import Digits
from ..metrics import accuracy
from ..plotting import import_pyplot
from ..run_files import check_folder
from .event_simulator import Times, simulate

__all__ = ["CLAIMS", "Outcome", "Runs", "Setting", "batches", "check", "draw", "main", "train"]

WIDTH = 64
LEARNERS, REPLICAS, FEW = 30, 32, 8
"""Of Zhang et al.; of Downpour, and of Downpour with less traffic."""

SLOW, SLOWNESS = 6, 10.0
"""Learners that are slow, and how much."""

SHORT = 0.3
"""Of the epochs, in a short study."""

NUMBERS = 20
"""Width of a column that holds "0.123 ± 0.045, 1 NaN"."""

FAR = 2 * LEARNERS


def _ignoring(staleness: int) -> float:
    return 1 / max(1, staleness) if staleness <= FAR else 0.0


DISCOUNTS: dict[str, str | float | Callable[[int], float] | None] = {
    "α": None,
    "α/√τ": "inverse_sqrt",
    "α/30": 1 / LEARNERS,
    "α/τ": "inverse",
    "α/τ²": "inverse_square",
    f"α/τ, 0 if τ > {FAR}": _ignoring,
}
"""The learning rate for a gradient of staleness τ, from the boldest to the most cautious."""


@dataclass(frozen=True)
class Setting:
    """A way of training.

    Args:
        hidden: layers of 64 units.
        epochs: of samples, over all learners.
        rate: the learning rate α.
        sync: as in `Downpour`.
        discount: one of `DISCOUNTS`.
        cut: the share of the updates after which the rate falls to a tenth.
        spread, latency: as in `Times`.
        slow: learners that are `SLOWNESS` times slower.
        split: whether each layer is on a shard of its own.
        every: n_fetch and n_push.
        warm_up: epochs that the first replica makes alone.
        warm_up_factor: of the rate, after them.
    """

    learners: int
    batch: int
    hidden: int
    epochs: float
    rate: float
    optimizer: Literal["SGD", "Adagrad"] = "SGD"
    momentum: float = 0.0
    sync: int | Literal["hard"] | None = None
    discount: str = "α"
    cut: float = 1.0
    spread: float = 0.2
    latency: float = 0.0
    slow: int = 0
    split: bool = False
    every: int = 1
    warm_up: float = 0.0
    warm_up_factor: float = 1.0


SOFTSYNC = Setting(LEARNERS, 4, 2, 20, 0.02, momentum=0.9, cut=0.8)
DOWNPOUR = Setting(REPLICAS, 16, 3, 8, 0.03, spread=0.7, latency=0.3, split=True)
ADAGRAD = replace(DOWNPOUR, optimizer="Adagrad")
WARM = replace(DOWNPOUR, rate=0.05)


@dataclass(frozen=True)
class Outcome:
    """What became of a network.

    Args:
        accuracy: on the test images; a network of NaNs says 0 to all, which is right for a tenth.
        loss: on the training images, in the end.
        staleness: how many gradients had which, over all shards.
    """

    accuracy: float
    loss: float
    staleness: Mapping[int, int]


def network(hidden: int) -> nn.Sequential:
    """64 pixels, `hidden` times Linear-ReLU of 64 units, 10 classes; He et al. 2015's weights."""
    model = mlp([64, *[WIDTH] * hidden, 10])
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    return model


def batches(data: Digits, batch: int, count: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Full mini-batches, a new order in every epoch."""

    def forever() -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(data), generator=generator)
            for rows in order[: len(data) // batch * batch].view(-1, batch):
                yield data.inputs[rows], data.targets[rows]

    return islice(forever(), count)


def train(setting: Setting, seed: int, share: float = 1.0) -> Outcome:
    """Simulate one training, of a share of the epochs."""
    data, test = Digits("train"), Digits("test")
    an_epoch = share * (len(data) // setting.batch)
    count = round(setting.epochs * an_epoch)
    way = Downpour(
        prefetch=0,
        n_fetch=setting.every,
        n_push=setting.every,
        sync=setting.sync,
        warm_up=round(setting.warm_up * an_epoch),
        warm_up_factor=setting.warm_up_factor,
    )
    updates = count / way.protocol(setting.learners).gradients
    momentum = {"momentum": setting.momentum} if setting.momentum else {}
    factor = DISCOUNTS[setting.discount]
    corrections: tuple[Correction, ...] = () if factor is None else (LearningRate(factor),)
    settings = Settings(
        cross_entropy,
        partial(getattr(torch.optim, setting.optimizer), lr=setting.rate, **momentum),
        partial(MultiStepLR, milestones=[round(setting.cut * updates)], gamma=0.1),
        corrections=corrections,
    )
    torch.manual_seed(seed)
    model = network(setting.hidden)
    paces = [*[1.0] * (setting.learners - setting.slow), *[SLOWNESS] * setting.slow]
    shards = simulate(
        model,
        settings,
        way,
        setting.learners,
        batches(data, setting.batch, count, seed),
        Times(setting.spread, setting.latency, paces, seed),
        _by_layer(model) if setting.split else None,
    )
    staleness: Counter[int] = Counter()
    for shard in shards:
        staleness.update(shard.staleness)
    with torch.no_grad():
        right = float(accuracy(model(test.inputs), test.targets))
        loss = float(cross_entropy(model(data.inputs), data.targets))
    return Outcome(right, loss, dict(staleness))


def _by_layer(model: nn.Sequential) -> list[list[str]]:
    layers = [[n for n, _ in layer.named_parameters(k)] for k, layer in model.named_children()]
    return [names for names in layers if names]


class Runs:
    """Outcomes of a setting, a seed each; made once.

    Args:
        seeds: how many, from 0.
        share: of the epochs, in `SOFTSYNC`'s settings.
        run: `train`, or what is to take its place.
    """

    def __init__(
        self,
        seeds: int,
        share: float = 1.0,
        run: Callable[[Setting, int, float], Outcome] = train,
    ) -> None:
        self._seeds, self._share, self._run = seeds, share, run
        self._made: dict[Setting, list[Outcome]] = {}

    def __call__(self, setting: Setting) -> list[Outcome]:
        share = self._share if setting.learners == LEARNERS else 1.0
        if setting not in self._made:
            self._made[setting] = [self._run(setting, k, share) for k in range(self._seeds)]
        return self._made[setting]

    def accuracy(self, setting: Setting) -> float:
        """The mean."""
        return statistics.mean(outcome.accuracy for outcome in self(setting))

    def loss(self, setting: Setting) -> float:
        """The mean; NaN if one is."""
        return statistics.mean(outcome.loss for outcome in self(setting))

    def diverged(self, setting: Setting) -> int:
        """How many ended in NaNs."""
        return sum(math.isnan(outcome.loss) for outcome in self(setting))

    def staleness(self, setting: Setting) -> "Counter[int]":
        """Of all seeds together."""
        return sum((Counter(outcome.staleness) for outcome in self(setting)), Counter())

    def staleness_mean(self, setting: Setting) -> float:
        counted = self.staleness(setting)
        return sum(age * many for age, many in counted.items()) / counted.total()

    def staleness_above(self, setting: Setting, limit: int) -> float:
        """The share of gradients that are more stale."""
        counted = self.staleness(setting)
        return sum(many for age, many in counted.items() if age > limit) / counted.total()


# Claims ---------------------------------------------------------------------------------------


def _soft(n: int, discount: str = "α/τ", slow: int = 0) -> Setting:
    return replace(SOFTSYNC, sync=n, discount=discount, slow=slow)


HARD = replace(SOFTSYNC, sync="hard")
SPLITS = (1, 15, 30)


def _fall_apart(runs: Runs) -> bool:
    return all(runs.accuracy(_soft(n, "α")) < 0.3 for n in (15, 30))


def _as_hard_sync(runs: Runs) -> bool:
    hard = runs.accuracy(HARD)
    return all(abs(runs.accuracy(_soft(n)) - hard) <= 0.02 for n in SPLITS)


def _staleness_is_n(runs: Runs) -> bool:
    means = {n: runs.staleness_mean(_soft(n)) for n in SPLITS}
    near = all(abs(mean - n) <= max(1, 0.1 * n) for n, mean in means.items())
    return near and runs.staleness_mean(HARD) == 0


def _staleness_is_bounded(runs: Runs) -> bool:
    return all(runs.staleness_above(_soft(n), 2 * n) < 0.001 for n in SPLITS)


def _adagrad_stands(runs: Runs) -> bool:
    return runs.diverged(ADAGRAD) == 0 and runs.accuracy(ADAGRAD) > 0.88


def _sgd_falls(runs: Runs) -> bool:
    many = replace(DOWNPOUR, rate=0.1)
    lost = runs.accuracy(replace(many, learners=1)) - runs.accuracy(many)
    return runs.diverged(many) > 0 or lost > 0.3


CLAIMS: dict[str, Callable[[Runs], bool]] = {
    "α at n = 15 and 30: accuracy below .3": _fall_apart,
    "α/τ at n = 1, 15, 30: within .02 of hard sync": _as_hard_sync,
    "mean τ within max(1, n/10) of n; 0 under hard sync": _staleness_is_n,
    "τ <= 2n for more than 99.9% of the gradients": _staleness_is_bounded,
    "32 replicas, Adagrad .03: finite for every seed, accuracy above .88": _adagrad_stands,
    "32 replicas, SGD .1: NaN, or .3 below 1 replica's accuracy": _sgd_falls,
}


def check(runs: Runs) -> dict[str, bool]:
    """Each claim, and whether it holds."""
    return {text: holds(runs) for text, holds in CLAIMS.items()}


# Tables ---------------------------------------------------------------------------------------


def _accuracy(runs: Runs, setting: Setting) -> str:
    values = [outcome.accuracy for outcome in runs(setting)]
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    diverged = runs.diverged(setting)
    return f"{runs.accuracy(setting):.3f}{spread}" + (f", {diverged} NaN" if diverged else "")


def _loss(runs: Runs, setting: Setting) -> str:
    return f"{runs.loss(setting):.2g}"


def _table(title: str, columns: Mapping[str, int], rows: Iterator[Sequence[str]]) -> None:
    """Print in Markdown, each row as soon as it is there.

    Args:
        columns: their widths by name.
    """
    widths = [max(len(name), width) for name, width in columns.items()]

    def line(cells: Iterable[str]) -> str:
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        return f"| {' | '.join(padded)} |"

    print(f"\n{title}\n\n{line(columns)}\n|{'|'.join('-' * (w + 2) for w in widths)}|", flush=True)
    for row in rows:
        print(line(row), flush=True)


def _protocols(runs: Runs) -> Iterator[Sequence[str]]:
    yield ["hard sync", _accuracy(runs, HARD), "the same", *_staleness(runs, HARD), "-"]
    for n in SPLITS:
        above = f"{runs.staleness_above(_soft(n), 2 * n):.2%}"
        yield [
            f"{n}-softsync",
            _accuracy(runs, _soft(n, "α")),
            _accuracy(runs, _soft(n)),
            *_staleness(runs, _soft(n)),
            above,
        ]


def _staleness(runs: Runs, setting: Setting) -> list[str]:
    return [f"{runs.staleness_mean(setting):.1f}", str(max(runs.staleness(setting)))]


def _discounts(runs: Runs) -> Iterator[Sequence[str]]:
    for discount in DISCOUNTS:
        cells = [discount]
        for slow in (0, SLOW):
            setting = _soft(LEARNERS, discount, slow)
            cells += [_accuracy(runs, setting), _loss(runs, setting)]
        yield cells
    ages = [_staleness(runs, _soft(LEARNERS, "α/τ", slow)) for slow in (0, SLOW)]
    yield ["mean τ, max τ", ", ".join(ages[0]), "", ", ".join(ages[1]), ""]


def _server_optimizers(runs: Runs, short: bool) -> Iterator[Sequence[str]]:
    every = [
        *(replace(DOWNPOUR, rate=rate) for rate in (0.03, 0.1, 0.3)),
        *(replace(ADAGRAD, rate=rate) for rate in (0.01, 0.03, 0.1)),
    ]
    for setting in every:
        if not short or setting in (replace(DOWNPOUR, rate=0.1), ADAGRAD):
            name = f"{setting.optimizer} {setting.rate:g}"
            alone = _accuracy(runs, replace(setting, learners=1))
            mean, _ = _staleness(runs, setting)
            yield [name, alone, _accuracy(runs, setting), mean]


def _regular(runs: Runs) -> Iterator[Sequence[str]]:
    for spread in (0.2, 0.45, 0.7):
        settings = replace(WARM, spread=spread), replace(ADAGRAD, spread=spread)
        yield [f"{spread:g}", *(_accuracy(runs, setting) for setting in settings)]


def _seldom(runs: Runs) -> Iterator[Sequence[str]]:
    for every in (1, 5):
        settings = (replace(s, learners=FEW, every=every) for s in (DOWNPOUR, ADAGRAD))
        yield [f"{every}", *(_accuracy(runs, setting) for setting in settings)]


STARTS = {
    "cold": WARM,
    "cold, α/10 after 2 epochs": replace(WARM, cut=2 / WARM.epochs),
    "warm": replace(WARM, warm_up=2),
    "warm, 0.3 α afterwards": replace(WARM, warm_up=2, warm_up_factor=0.3),
    "warm, α/10 afterwards": replace(WARM, warm_up=2, warm_up_factor=0.1),
}


def _starts(runs: Runs) -> Iterator[Sequence[str]]:
    for name, setting in STARTS.items():
        yield [name, _accuracy(runs, setting), _loss(runs, setting)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study, and end with 1 if a claim does not hold."""
    parser = argparse.ArgumentParser(
        prog="python -m headrace.launch.studies.asynchronous",
        description=(__doc__ or "").splitlines()[0],
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each, from seed 0 (3)")
    parser.add_argument(
        "--short", action="store_true", help="the claims' rows only, softsync 0.3 times as long"
    )
    parser.add_argument("--picture", type=Path, help="file to draw the discounts' effect into")
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error(f"--seeds {options.seeds}: give a whole number >= 1")
    if (picture := options.picture) is not None:
        if picture.is_dir() or picture.suffix not in (".png", ".svg", ".pdf"):
            parser.error(f"--picture {picture}: give a file, as staleness.png, .svg or .pdf")
        try:
            check_folder(picture.parent, "--picture, whose folder is")
        except InputError as error:
            parser.error(str(error))
    torch.set_num_threads(1)
    start = time.perf_counter()
    short, runs = options.short, Runs(options.seeds, SHORT if options.short else 1.0)
    _table(
        f"Staleness-aware SGD: {LEARNERS} learners, mini-batches of 4, momentum 0.9, α = 0.02",
        {
            "protocol": 11,
            "accuracy: α": NUMBERS,
            "accuracy: α/τ": NUMBERS,
            "mean τ": 6,
            "max τ": 5,
            "τ > 2n": 6,
        },
        _protocols(runs),
    )
    if not short or options.picture:
        _table(
            f"Using or ignoring stale gradients: {LEARNERS}-softsync, all learners alike or {SLOW} "
            f"of them {SLOWNESS:g} times slower",
            {
                "learning rate": 17,
                "accuracy": NUMBERS,
                "loss": 7,
                f"accuracy, {SLOW} slow": NUMBERS,
                f"loss, {SLOW} slow": 7,
            },
            _discounts(runs),
        )
    _table(
        f"Downpour: a shard a layer, messages late by {DOWNPOUR.latency:g} on average",
        {"on the server": 13, "1 replica": NUMBERS, f"{REPLICAS} replicas": NUMBERS, "mean τ": 6},
        _server_optimizers(runs, short),
    )
    if not short:
        _table(
            f"{REPLICAS} replicas: the more regular their times, the closer to lockstep",
            {"spread of times": 15, "SGD 0.05": NUMBERS, "Adagrad 0.03": NUMBERS},
            _regular(runs),
        )
        _table(
            f"{FEW} replicas that fetch and push seldom",
            {"n_fetch, n_push": 15, "SGD 0.03": NUMBERS, "Adagrad 0.03": NUMBERS},
            _seldom(runs),
        )
        _table(
            f"Warm start: {REPLICAS} replicas, SGD, α = 0.05; 2 of the 8 epochs by one replica",
            {"start": 25, "accuracy": NUMBERS, "loss": 7},
            _starts(runs),
        )
    print(f"\n{time.perf_counter() - start:.0f} s\n")
    verdicts = check(runs)
    for text, holds in verdicts.items():
        print(f"{'holds' if holds else 'DOES NOT HOLD':<14} {text}")
    if options.picture:
        draw(runs, options.picture)
        print(f"\n{options.picture}")
    if not all(verdicts.values()):
        sys.exit(1)


# A picture ------------------------------------------------------------------------------------


def draw(runs: Runs, path: Path) -> None:
    """Test error and training loss against how strongly stale gradients are discounted."""
    plt = import_pyplot(user="asynchronous")
    fig, axes = plt.subplots(1, 2, figsize=(11, 4.9), layout="constrained")
    names = [name for name in DISCOUNTS if "if" not in name]
    _panel(axes[0], "Test error, in percent", names, lambda o: 100 * (1 - o.accuracy), runs)
    ticks = (2, 5, 10, 20, 50, 100)
    axes[0].set_yticks(ticks, [f"{tick}" for tick in ticks])
    axes[0].set_ylim(1.3, 110)
    axes[0].legend(frameon=False, loc="upper center")
    _panel(axes[1], "Training loss in the end", names, lambda o: o.loss, runs)
    diverged = sum(runs.diverged(_soft(LEARNERS, "α", slow)) for slow in (0, SLOW))
    if diverged:
        axes[1].annotate(
            f"{diverged} of {2 * len(runs(HARD))} runs\nended in NaN", (0.5, 1), (0, -34),
            xycoords=("data", "axes fraction"), textcoords="offset points", fontsize=9,
            color="#555555", bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )  # fmt: skip
    fig.suptitle(
        f"How much a stale gradient should count: {LEARNERS} learners, τ ≈ {LEARNERS - 1}",
        fontsize=13,
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=130)
    plt.close(fig)


def _panel(
    ax: Any, title: str, names: Sequence[str], what: Callable[[Outcome], float], runs: Runs
) -> None:
    """One measure, on a logarithmic scale: a dot a seed, lines through their means."""
    lines = {
        f"{LEARNERS} learners alike": (0, "#0072B2", "o", -0.06),
        f"{SLOW} of them {SLOWNESS:g} times slower": (SLOW, "#D55E00", "s", 0.06),
    }
    for label, (slow, colour, marker, aside) in lines.items():
        x = [k + aside for k in range(len(names))]
        means = []
        for k, name in enumerate(names):
            values = [what(outcome) for outcome in runs(_soft(LEARNERS, name, slow))]
            values = [value for value in values if math.isfinite(value)]
            means.append(statistics.mean(values) if values else math.nan)
            ax.plot([x[k]] * len(values), values, marker, color=colour, alpha=0.35, markersize=5,
                    markeredgewidth=0)  # fmt: skip
        ax.plot(x, means, f"{marker}-", color=colour, label=label, linewidth=2, markersize=7,
                markeredgecolor="white")  # fmt: skip
    hard = statistics.mean(map(what, runs(HARD)))
    ax.axhline(hard, color="#777777", linestyle="--", linewidth=1, zorder=0)
    ax.annotate("hard sync", (-0.2, hard), (0, 4), textcoords="offset points", fontsize=9,
                color="#555555")  # fmt: skip
    ax.set_yscale("log")
    ax.minorticks_off()
    ax.set_xticks(range(len(names)), names, fontsize=12)
    ax.set_xlim(-0.25, len(names) - 0.75)
    ax.set_xlabel("learning rate of a gradient that is τ updates old\n← bold          cautious →")
    ax.set_title(title, loc="left", fontsize=11)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(True, axis="y", color="#EEEEEE", linewidth=0.8)
    ax.set_axisbelow(True)


if __name__ == "__main__":
    main()
