"""What a large batch does to the minimum, and what to do with the rate when the batch grows.

python -m headrace.launch.studies.large_batch [--seeds 3] [--out FOLDER] [--quick]

Trains small networks on scikit-learn's digits, with a fifth of the training labels drawn anew (and
in the second part without, too). First part: minima of equal training loss, found with small and
large batches, and with a large batch after some epochs of a small one (Keskar et al. 2017). Second
part: batch growth beside decay of the rate (Smith et al. 2018). Prints a line of each run as it
comes, then tables in Markdown and whether each claim holds; ends with 1 if one does not.
"""

import argparse
import statistics
import sys
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, islice, pairwise
from operator import mul
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from headrace.models import mlp
from headrace.pipeline import Pipeline
from headrace.pipeline.batch_size import Steps
from headrace.pipeline.errors import InputError
from headrace.pipeline.gathering import Gathering
from headrace.pipeline.objective import Objective
from headrace.pipeline.sharpness import directions, lambda_max, phi

from ..data import Digits
from ..metrics import accuracy
from ..plotting import clean, import_pyplot
from ..run_files import check_folder

__all__ = ["Claim", "Minimum", "Plan", "Run", "check", "main", "minima_table", "runs_table"]

NOISE = 0.2
SMALL, TENTH, ALL = 16, 144, 1437

LINES: list[tuple[str, Any]] = [
    ("#999999", "-"),
    ("#D55E00", "-"),
    ("#0072B2", (0, (4, 3))),
    ("#009E73", (0, (1, 2))),
    ("#CC79A7", "-"),
    ("#E69F00", "-"),
    ("#555555", (0, (4, 3))),
]
"""Lines that lie on each other are both seen."""


# Data -----------------------------------------------------------------------------------------


def epoch_of(data: Digits, size: int, order: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """An epoch's full mini-batches in a new order; the size may be another in every epoch."""
    rows = torch.randperm(len(data), generator=order)
    for chosen in rows[: len(data) // size * size].view(-1, size):
        yield data.inputs[chosen], data.targets[chosen]


def whole(data: Digits) -> list[tuple[Tensor, Tensor]]:
    """All samples as one mini-batch."""
    return [(data.inputs, data.targets)]


# Minima ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """A network trained to a training loss.

    Args:
        start, end: its weights before and after.
    """

    start: dict[str, Tensor]
    end: dict[str, Tensor]
    loss: float
    accuracy: float
    updates: int
    epochs: int


@dataclass(frozen=True)
class Minimum:
    """How sharp the minimum of such a network is.

    Args:
        phi, finer: of the whole space, ε = 1e-3 and 5e-4.
        random: φ of 100 random directions, ε = 1e-3.
        distance: of the weights from where they started.
    """

    phi: float
    finer: float
    random: float
    lambda_max: float
    distance: float
    accuracy: float
    updates: int


def _network() -> nn.Sequential:
    return mlp([64, 128, 128, 128, 10])


def train_until(
    seed: int, data: Digits, sizes: Iterable[int], until: float, most: int = 1000
) -> Trained:
    """Train with Adam at 1e-3 until the loss of all training samples is below `until`.

    Args:
        sizes: of the mini-batches of each epoch.
        most: epochs after which to give up.

    Raises:
        RuntimeError: the loss is not reached in so many.
    """
    torch.manual_seed(seed)
    model, order = _network(), torch.Generator().manual_seed(seed)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with Pipeline(
        model, nn.CrossEntropyLoss(), partial(torch.optim.Adam, lr=1e-3), stages=1, seed=seed
    ) as pipe:
        updates = epochs = 0
        for size in islice(sizes, most):
            epochs += 1
            updates += pipe.train(epoch_of(data, size, order)).updates
            loss = pipe.evaluate(whole(data))["loss"]
            if loss < until:
                break
        else:
            raise RuntimeError(f"after {most} epochs the training loss is {loss:.3g} still")
        score = pipe.evaluate(whole(Digits("test")), {"accuracy": accuracy})["accuracy"]
        return Trained(start, pipe.state_dict(), loss, score, updates, epochs)


def find_minimum(seed: int, sizes: Iterable[int], until: float) -> Minimum:
    """Train to this loss on the spoilt labels, and measure."""
    data = Digits("train", noise=NOISE)
    found = train_until(seed, data, sizes, until)
    with Objective(_network(), nn.CrossEntropyLoss(), whole(data), 1, stages=1) as f:
        start, x = f.at(found.start), f.at(found.end)
        return Minimum(
            phi=phi(f, x, 1e-3).phi,
            finer=phi(f, x, 5e-4).phi,
            random=phi(f, x, 1e-3, directions(len(x), 100, seed=0)).phi,
            lambda_max=lambda_max(f, x).value,
            distance=float((x - start).norm()),
            accuracy=found.accuracy,
            updates=found.updates,
        )


def warm(small_epochs: int) -> Iterator[int]:
    """The sizes of some epochs of the small batch, then of the whole training set."""
    yield from [SMALL] * small_epochs
    while True:
        yield ALL


def forever(size: int) -> Iterator[int]:
    """The same size in every epoch."""
    while True:
        yield size


# Growth ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What batch and rate do at a third and at two thirds of the epochs.

    Args:
        grows: what the batch is multiplied by at each.
        rates: what the rate is multiplied by at each.
        beside: the growth's own rule for the rate, in place of `rates`.
    """

    name: str
    grows: tuple[int, int]
    rates: tuple[float, float] = (1, 1)
    beside: str = "constant"


STEP = 5
CONSTANT = Plan("constant batch, constant rate", (1, 1), (1, 1))
DECAY = Plan("constant batch, rate decays", (1, 1), (1 / STEP, 1 / STEP))
GROWTH = Plan("batch grows, constant rate", (STEP, STEP), (1, 1))
HYBRID = Plan("batch grows, then rate decays", (STEP, 1), (1, 1 / STEP))
BOTH = Plan("batch grows and rate decays", (STEP, STEP), (1 / STEP, 1 / STEP))
ROOT_UP = Plan("batch grows, rate grows as its root", (STEP, STEP), beside="sqrt")
LINEAR_UP = Plan("batch grows, rate grows with it", (STEP, STEP), beside="linear")
PLANS = (CONSTANT, DECAY, GROWTH, HYBRID, BOTH, ROOT_UP, LINEAR_UP)


@dataclass(frozen=True)
class Run:
    """How a plan ended.

    Args:
        updates: of the whole run.
        path: after each epoch: updates so far, training loss, test accuracy.
    """

    loss: float
    accuracy: float
    updates: int
    path: list[tuple[int, float, float]]


def follow(plan: Plan, noise: float, seed: int, epochs: int) -> Run:
    """Train an MLP of 2 x 64 by SGD, momentum .9, rate .02 and batches of 16 at first."""
    train, test = Digits("train", noise=noise), Digits("test")
    at = [-(-epochs // 3), -(-2 * epochs // 3)]
    sizes = list(accumulate((SMALL, *plan.grows), mul))
    factor: list[float] = [1.0, *accumulate(plan.rates, mul)]
    growth = Steps(sizes, at, rate=plan.beside)
    ends = _ends(growth, len(train) // SMALL, epochs)

    def rate(update: int) -> float:
        return factor[bisect_right(at, bisect_right(ends, update))]

    torch.manual_seed(seed)
    model, order = mlp([64, 64, 64, 10]), torch.Generator().manual_seed(seed)
    path, updates = [], 0
    with Pipeline(
        model,
        nn.CrossEntropyLoss(),
        partial(torch.optim.SGD, lr=0.02, momentum=0.9),
        scheduler=lambda optimizer: LambdaLR(optimizer, rate),
        batch_size=growth,
        stages=1,
        seed=seed,
        on_nonfinite="skip",  # a plan that diverges is a result
    ) as pipe:
        for _ in range(epochs):
            updates += pipe.train(epoch_of(train, SMALL, order)).updates
            loss = pipe.evaluate(whole(train))["loss"]
            score = pipe.evaluate(whole(test), {"accuracy": accuracy})["accuracy"]
            path.append((updates, loss, score))
    return Run(loss, score, updates, path)


def _ends(growth: Steps, micro_batches: int, epochs: int) -> list[int]:
    """Updates made by the end of each epoch."""
    gathering = Gathering(1, growth, flushes=False)
    made: list[int] = []
    for _ in range(epochs):
        gathering.begin()
        closed = sum(gathering.closes(SMALL, last=True) for _ in range(micro_batches))
        made.append(closed + (made[-1] if made else 0))
    return made


# Claims ---------------------------------------------------------------------------------------

Minima = Mapping[str, Sequence[Minimum]]
Runs = Mapping[str, Mapping[str, Sequence[Run]]]


@dataclass(frozen=True)
class Claim:
    """A sentence with its numbers, and whether it holds."""

    text: str
    holds: bool


def check(minima: Minima, runs: Runs, warm_starts: Sequence[int]) -> list[Claim]:
    """The published claims, on the means over the seeds."""
    sharp = {size: _mean(minima[f"batch {size}"], "phi") for size in (SMALL, TENTH, ALL)}
    curved = {size: _mean(minima[f"batch {size}"], "lambda_max") for size in (SMALL, TENTH, ALL)}
    falls = [_mean(minima[_warm_name(k)], "phi") for k in warm_starts]
    found = [
        Claim(
            f"phi({TENTH}) > 1.5 phi({SMALL}): {sharp[TENTH]:.1f} and 1.5 x {sharp[SMALL]:.1f}",
            sharp[TENTH] > 1.5 * sharp[SMALL],
        ),
        Claim(
            f"phi({ALL}) > phi({TENTH}): {sharp[ALL]:.1f} and {sharp[TENTH]:.1f}",
            sharp[ALL] > sharp[TENTH],
        ),
        Claim(
            "lambda_max in the same order: " + ", ".join(f"{v:.1f}" for v in curved.values()),
            curved[SMALL] < curved[TENTH] < curved[ALL],
        ),
        Claim(
            f"phi falls with every longer warm start: {', '.join(f'{v:.1f}' for v in falls)}",
            all(b < a for a, b in pairwise(falls)),
        ),
    ]
    for labels, plans in runs.items():
        decay, growth = plans[DECAY.name], plans[GROWTH.name]
        accuracies = [_mean(each, "accuracy") for each in (growth, decay)]
        losses = [_mean(each, "loss") for each in (growth, decay)]
        counts = [_mean(each, "updates") for each in (growth, decay)]
        found += [
            Claim(
                f"{labels}: growth and decay differ by <= .015 in test accuracy: "
                f"{accuracies[0]:.3f} and {accuracies[1]:.3f}",
                abs(accuracies[0] - accuracies[1]) <= 0.015,
            ),
            Claim(
                f"{labels}: their training losses are within 10%: "
                f"{losses[0]:.3g} and {losses[1]:.3g}",
                abs(losses[0] / losses[1] - 1) <= 0.1,
            ),
            Claim(
                f"{labels}: growth takes at most half the updates: "
                f"{counts[0]:.0f} and {counts[1]:.0f}",
                counts[0] <= counts[1] / 2,
            ),
        ]
    return found


def _mean(values: Sequence[Any], field: str) -> float:
    return statistics.mean([float(getattr(value, field)) for value in values])


def _warm_name(epochs: int) -> str:
    """Without a warm start it is the run on all samples at once."""
    return f"{epochs} epochs of {SMALL}, then {ALL}" if epochs else f"batch {ALL}"


# Showing --------------------------------------------------------------------------------------


def _cell(values: Sequence[Any], field: str, style: str) -> str:
    """Mean and standard deviation."""
    numbers = [getattr(value, field) for value in values]
    spread = f" ± {statistics.stdev(numbers):{style}}" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):{style}}{spread}"


MINIMUM_COLUMNS = (
    ("phi, 1e-3", "phi", ".1f"),
    ("phi, 5e-4", "finer", ".2f"),
    ("phi, 100 directions, 1e-3", "random", ".1f"),
    ("lambda_max", "lambda_max", ".1f"),
    ("test accuracy", "accuracy", ".3f"),
    ("updates", "updates", ".0f"),
    ("distance from the start", "distance", ".1f"),
)


def minima_table(minima: Minima) -> str:
    """Markdown: a row a way of training, means and standard deviations over the seeds."""
    lines = [
        f"| trained with | {' | '.join(title for title, _, _ in MINIMUM_COLUMNS)} |",
        f"|---{'|---' * len(MINIMUM_COLUMNS)}|",
    ]
    for name, values in minima.items():
        cells = [_cell(values, field, style) for _, field, style in MINIMUM_COLUMNS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def runs_table(plans: Mapping[str, Sequence[Run]]) -> str:
    """Markdown: a row a plan, means and standard deviations over the seeds."""
    lines = ["| plan | test accuracy | training loss | updates |", "|---|---|---|---|"]
    for name, values in plans.items():
        cells = [_cell(values, f, s) for f, s in (("accuracy", ".3f"), ("loss", ".2g"))]
        lines.append(f"| {name} | {' | '.join(cells)} | {_mean(values, 'updates'):.0f} |")
    return "\n".join(lines)


def draw(runs: Runs, path: Path) -> None:
    """The seeds' mean training loss and test accuracy over epochs, a column for each data set.

    Raises:
        ImportError: matplotlib is not installed.
    """
    plt = import_pyplot("sharpness", "large_batch --out")
    fig, axes = plt.subplots(
        2, len(runs), figsize=(6 * len(runs), 7), squeeze=False, sharex=True, layout="constrained"
    )
    for column, (labels, plans) in enumerate(runs.items()):
        for (name, values), (colour, style) in zip(plans.items(), LINES, strict=False):
            points = list(zip(*(run.path for run in values), strict=True))
            for row in (0, 1):
                means = [statistics.mean(seen[row + 1] for seen in each) for each in points]
                axes[row, column].plot(
                    range(1, len(means) + 1), means, color=colour, linestyle=style, linewidth=2,
                    label=f"{name}: {values[0].updates:,} updates",
                )  # fmt: skip
        axes[0, column].set_yscale("log")
        axes[0, column].set_title(labels, loc="left", fontsize=11)
        axes[1, column].set_xlabel("epoch")
    axes[0, 0].set_ylabel("training loss, logarithmic")
    axes[1, 0].set_ylabel("test accuracy")
    for ax in axes.flat:
        clean(ax)
    handles, names = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, names, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    fig.suptitle("At a third and two thirds of the epochs: batch times 5, or rate over 5, or both",
                 fontsize=13)  # fmt: skip
    fig.savefig(path, dpi=110)
    plt.close(fig)


# The program ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Length:
    """How long the study is.

    Args:
        until: training loss at which the first part's runs stop.
        warm_starts: epochs of the small batch, from 0 on.
        epochs: of the second part's runs.
    """

    until: float
    warm_starts: tuple[int, ...]
    epochs: int
    plans: tuple[Plan, ...]
    noises: tuple[float, ...]


FULL = Length(0.02, (0, 5, 15, 30), 45, PLANS, (0.0, NOISE))
QUICK = Length(1.2, (0,), 3, (CONSTANT, DECAY, GROWTH), (NOISE,))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study, and end with 1 if a claim does not hold."""
    parser = argparse.ArgumentParser(
        prog="python -m headrace.launch.studies.large_batch",
        description=(__doc__ or "").splitlines()[0],
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each, from seed 0 (3)")
    parser.add_argument("--out", type=Path, help="folder for large-batch.md and a picture")
    parser.add_argument(
        "--quick", action="store_true", help="too short for the claims, which are left out"
    )
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error(f"--seeds {options.seeds}: give a whole number >= 1")
    if options.out is not None:
        try:
            check_folder(options.out, "--out")
            import_pyplot("sharpness", "large_batch --out")
        except (InputError, ImportError) as error:
            parser.error(str(error))
    torch.set_num_threads(1)
    length, seeds = QUICK if options.quick else FULL, range(options.seeds)
    minima = _find_minima(length, seeds)
    runs = _follow_plans(length, seeds)
    claims = [] if options.quick else check(minima, runs, length.warm_starts)
    text = _report(minima, runs, claims, length)
    print(f"\n{text}")
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "large-batch.md").write_text(text, encoding="utf-8")
        draw(runs, options.out / "large-batch.png")
    if not all(claim.holds for claim in claims):
        sys.exit(1)


def _find_minima(length: Length, seeds: Iterable[int]) -> dict[str, list[Minimum]]:
    ways: dict[str, Callable[[], Iterator[int]]] = {
        f"batch {size}": partial(forever, size) for size in (SMALL, TENTH, ALL)
    }
    ways |= {_warm_name(k): partial(warm, k) for k in length.warm_starts if k}
    found: dict[str, list[Minimum]] = {}
    for name, sizes in ways.items():
        start = time.perf_counter()
        found[name] = [find_minimum(seed, sizes(), length.until) for seed in seeds]
        _say(name, [f"{m.phi:.1f}" for m in found[name]], start)
    return found


def _follow_plans(length: Length, seeds: Iterable[int]) -> dict[str, dict[str, list[Run]]]:
    found: dict[str, dict[str, list[Run]]] = {}
    for noise in length.noises:
        labels = f"{noise:.0%} of the labels drawn anew" if noise else "clean labels"
        found[labels] = {}
        for plan in length.plans:
            start = time.perf_counter()
            runs = [follow(plan, noise, seed, length.epochs) for seed in seeds]
            found[labels][plan.name] = runs
            _say(f"{labels}: {plan.name}", [f"{run.accuracy:.3f}" for run in runs], start)
    return found


def _say(name: str, figures: Sequence[str], start: float) -> None:
    print(f"{name:<64} {' '.join(figures)}   {time.perf_counter() - start:.0f} s", flush=True)


def _report(minima: Minima, runs: Runs, claims: Sequence[Claim], length: Length) -> str:
    parts = [f"Minima of training loss < {length.until:g}:", minima_table(minima)]
    for labels, plans in runs.items():
        parts += [f"{length.epochs} epochs, {labels}:", runs_table(plans)]
    lines = [f"- {'holds' if c.holds else 'DOES NOT HOLD'}: {c.text}" for c in claims]
    return "\n\n".join([*parts, "\n".join(lines)]) + "\n"


if __name__ == "__main__":
    main()
