"""Curves over training for each number of stages, and the loss at the end over all of them."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from ..display import count
from ..plotting import clean, import_pyplot, save
from .results import Row, best, loss_title, smooth, spread

__all__ = ["draw"]

COLOURS = ["#222222", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8D6CAB"]
"""Told apart by people who do not see all colours; the first is most often no delay."""

POINTS = 60
"""Of a curve, at most."""


def draw(rows: Sequence[Row], stem: Path, title: str) -> list[Path]:
    """A panel for each number of stages, of each variant's best rate; and one over the stages.

    Raises:
        ImportError: matplotlib is not installed.
    """
    plt = import_pyplot()
    columns = sorted({column for row in rows for column in row.case.columns})
    variants = list(dict.fromkeys(row.case.variant for row in rows))
    colours = {name: COLOURS[k % len(COLOURS)] for k, name in enumerate(variants)}
    panels = len(columns) + (len(columns) > 1)
    across = min(panels, 3)
    down = math.ceil(panels / across)
    fig, axes = plt.subplots(
        down, across, figsize=(4.2 * across + 0.6, 3.3 * down + 1.1), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    places = list(axes.flat)
    for ax in places[panels:]:
        ax.set_visible(False)
    top, bottom = _range(rows)
    for ax, column in zip(places, columns, strict=False):
        for name, row in best(rows, column).items():
            _curve(ax, row, colours[name], top)
        ax.set_ylim(bottom, top)
        ax.set_xlabel("samples")
        ax.xaxis.set_major_locator(plt.MaxNLocator(4))
        ax.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        _dress(ax, count(column, "stage"), "training loss")
    if len(columns) > 1:
        _ends(places[len(columns)], rows, columns, colours)
    lines = [plt.Line2D([], [], color=colours[name], label=name) for name in variants]
    # An entry is about half an inch and a thirteenth for each letter.
    entry = 0.5 + max(map(len, variants)) / 13
    ncols = max(1, min(len(lines), int(fig.get_figwidth() / entry)))
    fig.legend(handles=lines, loc="outside lower left", ncols=ncols, frameon=False, fontsize=9)
    fig.suptitle(title, x=0.01, ha="left", fontsize=12)
    return save(fig, stem)


def _curve(ax: Any, row: Row, colour: str, top: float) -> None:
    """The mean over the seeds, in a band of a standard deviation; a cross where one diverged.

    Args:
        top: of the axis: no cross lies above it.
    """
    curves = [smooth(outcome.curve, POINTS) for outcome in row.outcomes if outcome.curve]
    if not curves:
        return
    shared = min(map(len, curves))
    longest = max(curves, key=len)
    x = [point[0] for point in longest[:shared]]
    ys = [[curve[k][1] for curve in curves] for k in range(shared)]
    middle, deviation = zip(*(spread(y) for y in ys), strict=True)
    ax.plot(x, middle, color=colour, linewidth=1.4)
    if None not in deviation and not row.lost:
        low = [m - d for m, d in zip(middle, deviation, strict=True)]
        high = [m + d for m, d in zip(middle, deviation, strict=True)]
        ax.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    if row.lost:
        ax.plot(x[-1:], [min(middle[-1], top)], "x", color=colour, markersize=8, clip_on=False)


def _range(rows: Sequence[Row]) -> tuple[float, float]:
    """From the best to where the runs begin: what flies off above that is not shown."""
    curves = [smooth(o.curve, POINTS) for row in rows for o in row.outcomes if o.curve]
    values = [y for curve in curves for _, y in curve if math.isfinite(y)]
    starts = [curve[0][1] for curve in curves if math.isfinite(curve[0][1])]
    if not starts:
        return 1.0, 0.0
    top, bottom = 1.05 * median(starts), min(values)
    return top, bottom - 0.05 * (top - bottom)


def _ends(ax: Any, rows: Sequence[Row], columns: Sequence[int], colours: dict[str, str]) -> None:
    """The loss at the end over the number of stages."""
    for k, (name, colour) in enumerate(colours.items()):
        points = [
            (column, *spread([outcome.scores["loss"] for outcome in row.finished]))
            for column in columns
            if (row := best(rows, column).get(name)) and row.finished
        ]
        if points:
            columns_there, y, error = zip(*points, strict=True)
            bars = None if None in error else error
            # Beside each other, so that all bars are seen.
            x = [column * 2 ** (0.05 * (k - (len(colours) - 1) / 2)) for column in columns_there]
            ax.errorbar(
                x, y, bars, color=colour, marker="o", markersize=4, capsize=3, linewidth=1.4
            )
    ax.set_xscale("log", base=2)
    ax.set_xticks(columns, [str(column) for column in columns])
    ax.minorticks_off()
    ax.set_xlabel("stages")
    _dress(ax, "at the end", loss_title(rows))


def _dress(ax: Any, title: str, ylabel: str) -> None:
    clean(ax)
    ax.set_title(title, loc="left", fontsize=10)
    ax.set_ylabel(ylabel)
