"""Pictures of a loss around minima: the line between two, and the worst direction out of each."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from .minima import Line
from .plotting import clean, import_pyplot, save

__all__ = ["draw_line", "draw_worst"]

TRAIN, TEST = "#0072B2", "#D55E00"


def draw_line(line: Line, small: str, large: str, stem: Path) -> list[Path]:
    """The loss, logarithmic, above the first metric, along the line; gives the files written.

    Args:
        small, large: names of the checkpoints at 0 and 1.

    Raises:
        ImportError: matplotlib is not installed.
    """
    plt = import_pyplot("sharpness")
    names = ["loss", *[name for name in line.train[0] if name != "loss"][:1]]
    fig, axes = plt.subplots(
        len(names), figsize=(8, 2.2 + 2.1 * len(names)), sharex=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for ax, name in zip(axes[:, 0], names, strict=True):
        ends = []
        for label, scores, colour, style in (
            ("training data", line.train, TRAIN, "o-"),
            ("test data", line.test, TEST, "s--"),
        ):
            if scores:
                values = [each[name] for each in scores]
                ax.plot(line.alphas, values, style, color=colour, markersize=3.5, label=label)
                ends.append(label)
        for at in (0, 1):
            ax.axvline(at, color="#999999", linewidth=1, zorder=0)
        if name == "loss":
            ax.set_yscale("log")
        ax.set_ylabel(f"{name}, logarithmic" if name == "loss" else name)
        ax.set_xlim(line.alphas[0], line.alphas[-1])
        clean(ax)
    top, bottom = axes[0, 0], axes[-1, 0]
    top.legend(frameon=False, loc="best", fontsize=9)
    for at, text in ((0, small), (1, large)):
        top.annotate(
            text, (at, 1), (0, 4), xycoords=("data", "axes fraction"),
            textcoords="offset points", ha="center", fontsize=9, color="#555555",
        )  # fmt: skip
    bottom.set_xlabel("α: the weights are α times the second's and 1 - α times the first's")
    fig.suptitle("On the line between two minima", fontsize=13)
    return save(fig, stem)


def draw_worst(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], epsilon: float, stem: Path
) -> list[Path]:
    """The training loss from each minimum along the worst direction out of it.

    Args:
        curves: by name, multiples t of the way y to the worst point of the box, and f(x + ty).

    Raises:
        ImportError: matplotlib is not installed.
    """
    plt = import_pyplot("sharpness")
    fig, ax = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    for (name, (steps, losses)), colour, style in zip(
        curves.items(), (TRAIN, TEST), ("o-", "s-"), strict=False
    ):
        ax.plot(steps, losses, style, color=colour, markersize=3.5, label=name)
    ax.axvline(0, color="#999999", linewidth=1, zorder=0)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("t: the weights are x + t·y, and y leads to the worst point found in the box")
    ax.set_ylabel("training loss")
    ax.legend(frameon=False, fontsize=9)
    ax.set_title(f"The loss along the worst direction, ε = {epsilon:g}", loc="left", fontsize=13)
    clean(ax)
    return save(fig, stem)
