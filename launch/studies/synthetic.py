"""How well a network learns on synthetic gradients, beside back-propagation and none at all.

python -m headrace.launch.studies.synthetic [--seeds 3] [--quick]

Trains small networks on scikit-learn's digits, a stage a hidden layer, and a GRU that must recall
what lies beyond its window; prints a row of each as it comes, then the table in Markdown, and ends
with 1 if a claim does not hold.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from headrace.pipeline.rules import Local, Synthetic
from headrace.pipeline.synthesizers import MLP

from .digits import train_digits
from .recall import train_recall

__all__ = ["CLAIMS", "ROWS", "Claim", "Row", "check", "main", "table"]


@dataclass(frozen=True)
class Row:
    """A way of training.

    Args:
        run: from a seed and a share of the full length, the accuracy.
        quick: whether it is in the short study.
    """

    task: str
    way: str
    run: Callable[[int, float], float]
    quick: bool = False


def _digits(hidden: int, iterations: int, way: str, quick: bool = False) -> Row:
    rule, only_top = _WAYS[way]

    def run(seed: int, share: float) -> float:
        return train_digits(hidden, round(share * iterations), seed, rule, only_top)

    return Row(f"digits, {hidden} hidden", way, run, quick)


_told = partial(Synthetic, conditional=True, classes=10)
_blind = partial(Synthetic, MLP)
_WAYS: dict[str, tuple[Callable[[], Synthetic | Local] | None, bool]] = {
    "back-propagation": (None, False),
    "cDNI": (_told, False),
    "DNI": (_blind, False),
    "cut": (None, True),
    "local losses": (partial(Local, 10), False),
    "cDNI, full unlock": (partial(_told, inputs="synthetic"), False),
    "DNI, full unlock": (partial(_blind, inputs="synthetic"), False),
    "cDNI, p_update .2": (partial(_told, p_update=0.2), False),
    "cDNI, p_update .05": (partial(_told, p_update=0.05), False),
}


def _recall(way: str, factor: float | None, delay: int, quick: bool = False) -> Row:
    def run(seed: int, share: float) -> float:
        return train_recall(delay, 4, round(share * 4000), seed, factor)

    return Row(f"recall, {delay} steps, window 4", way, run, quick)


QUICK = {"digits": 0.35, "recall": 0.6}
"""Of the iterations, in a short study: the claims keep their margins."""

ROWS = (
    _digits(3, 2000, "back-propagation", quick=True),
    _digits(3, 2000, "cDNI", quick=True),
    _digits(3, 2000, "DNI", quick=True),
    _digits(3, 2000, "cut", quick=True),
    _digits(3, 2000, "local losses"),
    _digits(3, 2000, "cDNI, full unlock"),
    _digits(3, 2000, "DNI, full unlock"),
    _digits(3, 2000, "cDNI, p_update .2"),
    _digits(3, 6000, "cDNI, p_update .05"),
    _digits(6, 1500, "back-propagation"),
    _digits(6, 1500, "cDNI", quick=True),
    _digits(6, 1500, "DNI"),
    _digits(6, 1500, "cut", quick=True),
    _digits(6, 1500, "local losses"),
    _recall("truncated back-propagation", None, 4, quick=True),
    _recall("DNI", 1.0, 4, quick=True),
)

Means = Mapping[tuple[str, str], float]


@dataclass(frozen=True)
class Claim:
    """What must hold of the means.

    Args:
        left: of the means, what is not to fall below `right`.
    """

    text: str
    left: Callable[[Means], float]
    right: Callable[[Means], float]


_THREE, _SIX, _RECALL = "digits, 3 hidden", "digits, 6 hidden", "recall, 4 steps, window 4"

CLAIMS = (
    Claim(
        "3 hidden: cDNI >= back-propagation - .015",
        lambda m: m[_THREE, "cDNI"],
        lambda m: m[_THREE, "back-propagation"] - 0.015,
    ),
    Claim(
        "3 hidden: DNI >= cut + .05",
        lambda m: m[_THREE, "DNI"],
        lambda m: m[_THREE, "cut"] + 0.05,
    ),
    Claim(
        "6 hidden: cDNI >= cut + .25",
        lambda m: m[_SIX, "cDNI"],
        lambda m: m[_SIX, "cut"] + 0.25,
    ),
    Claim("recall: DNI >= .85", lambda m: m[_RECALL, "DNI"], lambda m: 0.85),
    Claim(
        "recall: .45 >= truncated back-propagation",
        lambda m: 0.45,
        lambda m: m[_RECALL, "truncated back-propagation"],
    ),
)


def check(means: Means) -> list[tuple[str, bool]]:
    """Each claim, and whether it holds."""
    return [(claim.text, claim.left(means) >= claim.right(means)) for claim in CLAIMS]


def table(results: Mapping[tuple[str, str], Sequence[float]]) -> str:
    """The accuracies of all seeds as a Markdown table: mean and standard deviation."""
    lines = ["| task | way | accuracy |", "|---|---|---|"]
    for (task, way), values in results.items():
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        lines.append(f"| {task} | {way} | {statistics.mean(values):.3f}{spread} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study, and end with 1 if a claim does not hold."""
    parser = argparse.ArgumentParser(
        prog="python -m headrace.launch.studies.synthetic",
        description=(__doc__ or "").splitlines()[0],
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each, from seed 0 (3)")
    parser.add_argument(
        "--quick", action="store_true", help="the claims' rows only, digits a third as long"
    )
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error(f"--seeds {options.seeds}: give a whole number >= 1")
    torch.set_num_threads(1)
    results: dict[tuple[str, str], list[float]] = {}
    for row in ROWS:
        if options.quick and not row.quick:
            continue
        share = QUICK[row.task.split(",")[0]] if options.quick else 1.0
        start = time.perf_counter()
        values = [row.run(seed, share) for seed in range(options.seeds)]
        results[row.task, row.way] = values
        seconds = time.perf_counter() - start
        print(
            f"{row.task:<26} {row.way:<27} {' '.join(f'{v:.3f}' for v in values)}"
            f"   {seconds:.0f} s",
            flush=True,
        )
    print(f"\n{table(results)}\n")
    means = {key: statistics.mean(values) for key, values in results.items()}
    verdicts = check(means)
    for text, holds in verdicts:
        print(f"{'holds' if holds else 'DOES NOT HOLD':<14} {text}")
    if not all(holds for _, holds in verdicts):
        sys.exit(1)


if __name__ == "__main__":
    main()
