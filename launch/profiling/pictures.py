"""Pictures for people, as PNG and SVG: timelines, speed-up over stages, speed over bandwidth."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from headrace.pipeline import Timeline
from headrace.pipeline.timeline import WORKING, Work

from ..plotting import clean, import_pyplot, save
from .prediction import Curve

__all__ = ["draw_bandwidth", "draw_speed_up", "draw_timelines"]

COLOURS = {
    Work.FORWARD: "#3B8BC2",
    Work.BACKWARD: "#E8A33D",
    Work.UPDATE: "#2A9D78",
    Work.LEARN: "#8D6CAB",
    Work.WAIT: "#ECECEC",
    Work.DATA: "#C77CAB",
}
"""Told apart by people who do not see all colours, and in print."""

NAMES = {
    Work.FORWARD: "forward",
    Work.BACKWARD: "backward",
    Work.UPDATE: "update",
    Work.LEARN: "a synthesizer learning",
    Work.WAIT: "waiting for a neighbour",
    Work.DATA: "waiting for data",
}

LINES = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#555555"]
STYLES = ["-", "-", (0, (4, 3)), (0, (1, 2)), "-"]
"""Lines that lie on each other are both seen."""


def draw_timelines(timelines: Mapping[str, Timeline], stem: Path, subtitle: str = "") -> list[Path]:
    """A panel a timeline on one time scale, a row a stage; gives the files written.

    Raises:
        ImportError: matplotlib is not installed.
    """
    plt = import_pyplot()
    rows = sum(len(t.stages) + 1.6 for t in timelines.values())
    fig, axes = plt.subplots(
        len(timelines),
        figsize=(11, 1.5 + 0.42 * rows),
        squeeze=False,
        gridspec_kw={"height_ratios": [len(t.stages) + 0.6 for t in timelines.values()]},
        layout="constrained",
    )
    end = max(t.seconds for t in timelines.values())
    for ax, (name, timeline) in zip(axes[:, 0], timelines.items(), strict=True):
        _panel(ax, name, timeline, end)
    axes[-1, 0].set_xlabel("milliseconds")
    used = {s.work for t in timelines.values() for spans in t.stages for s in spans}
    handles = [
        plt.Rectangle((0, 0), 1, 1, facecolor=colour, edgecolor="#999999", linewidth=0.5)
        for work, colour in COLOURS.items()
        if work in used
    ]
    labels = [NAMES[work] for work in COLOURS if work in used]
    if used & {Work.SEND_DOWN, Work.SEND_UP}:
        handles.append(plt.Line2D([], [], color="#444444", linewidth=1.5))
        labels.append("sending")
    fig.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    shares = ", ".join(f"{name} {_busy(t):.0%}" for name, t in timelines.items())
    fig.suptitle(f"How much of the time the stages work: {shares}", fontsize=13)
    if subtitle:
        axes[0, 0].annotate(
            subtitle, (0, 1), (0, 24), xycoords="axes fraction", textcoords="offset points",
            fontsize=9, color="#555555",
        )  # fmt: skip
    return save(fig, stem)


def _busy(timeline: Timeline) -> float:
    shares = [timeline.share(j, *WORKING) for j in range(len(timeline.stages))]
    return sum(shares) / len(shares)


def _panel(ax: Any, name: str, timeline: Timeline, end: float) -> None:
    for j, spans in enumerate(timeline.stages):
        for work, colour in COLOURS.items():
            bars = [(1e3 * s.start, 1e3 * s.seconds) for s in spans if s.work is work]
            edge = "white" if work in WORKING else "none"
            ax.broken_barh(bars, (j - 0.36, 0.72), facecolors=colour, edgecolor=edge, linewidth=0.4)
        for work, offset in ((Work.SEND_DOWN, 0.44), (Work.SEND_UP, -0.44)):
            for s in spans:
                if s.work is work:
                    ax.plot(
                        [1e3 * s.start, 1e3 * s.end], [j + offset] * 2, color="#444444",
                        linewidth=1.3, solid_capstyle="butt",
                    )  # fmt: skip
        _number(ax, j, timeline, end)
        share = timeline.share(j, *WORKING)
        ax.text(1e3 * end * 1.008, j, f"{share:.0%} at work", va="center", fontsize=9)
    ax.set_xlim(0, 1e3 * end)
    ax.set_ylim(len(timeline.stages) - 0.4, -0.6)
    ax.set_yticks(range(len(timeline.stages)), [f"stage {j}" for j in range(len(timeline.stages))])
    ax.tick_params(axis="y", length=0)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.set_title(name, loc="left", fontsize=11, fontweight="bold")


def _number(ax: Any, stage: int, timeline: Timeline, end: float) -> None:
    """The micro-batches' numbers, counted from the first in the window, where they fit."""
    working = (Work.FORWARD, Work.BACKWARD)
    seen = [s.index for spans in timeline.stages for s in spans if s.work in working]
    first = min(seen, default=0)
    for s in timeline.stages[stage]:
        text = str(s.index - first)
        if s.work in working and s.seconds > end * 0.011 * len(text):
            middle = 1e3 * (s.start + s.end) / 2
            ax.text(middle, stage, text, ha="center", va="center", fontsize=8, color="#1A1A1A")


def draw_speed_up(
    curves: Sequence[Curve],
    measured: Mapping[str, tuple[float, float]],
    stem: Path,
    subtitle: str = "",
) -> list[Path]:
    """Speed-up over one device against the number of stages, both on logarithmic axes.

    Args:
        measured: dots: a name to (stages, speed-up).
    """
    plt = import_pyplot()
    fig, ax = plt.subplots(figsize=(9, 6), layout="constrained")
    x = curves[0].x
    ax.plot(x, x, color="#BBBBBB", linestyle="--", linewidth=1)
    middle = x[len(x) // 2]
    ax.annotate("ideal", (middle, middle), (-6, 6), textcoords="offset points", color="#888888",
                ha="right")  # fmt: skip
    for curve, colour, style in zip(curves, LINES, STYLES, strict=False):
        ax.plot(curve.x, curve.y, color=colour, linestyle=style, marker=".", linewidth=2)
    dots = sorted(measured.items(), key=lambda dot: dot[1][1])
    for stages, speed_up in measured.values():
        ax.plot([stages], [speed_up], "o", mfc="white", mec="black", markersize=7, zorder=5)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    ax.set_xticks(x, [f"{n:.0f}" for n in x])
    top = math.ceil(math.log2(max(x)))
    least = min(y for y in (*(d[1][1] for d in dots), *(min(c.y) for c in curves)) if y > 0)
    ticks = range(math.floor(math.log2(min(1.0, least))), top + 1)
    ax.set_yticks([2.0**k for k in ticks], [f"{2.0**k:g}" for k in ticks])
    ax.set_ylim(0.6 * min(1.0, least), max(x) * 1.5)
    ax.set_xlabel("stages; the network grows with them, the mini-batch does not")
    ax.set_ylabel("predicted speed-up over one device")
    _finish(ax, "Speed-up over one device", subtitle)
    black = "#333333"
    _label(ax, [(f"{n}, measured {y:.2f}", at, y, black, 8) for n, (at, y) in dots])
    _label_ends(ax, curves)
    return save(fig, stem)


BANDWIDTH_TICKS = {
    12.5e6: "100 Mbit/s",
    125e6: "1 Gbit/s",
    1.25e9: "10 Gbit/s",
    12.5e9: "100 Gbit/s",
    32e9: "PCIe 4\nx16",
    450e9: "NVLink",
}


def draw_bandwidth(
    curves: Sequence[Curve],
    winners: Sequence[tuple[str, float, float]],
    stem: Path,
    subtitle: str = "",
) -> list[Path]:
    """Samples a second against the links' bandwidth; the background says which is the fastest."""
    plt = import_pyplot()
    fig, ax = plt.subplots(figsize=(9.5, 6), layout="constrained")
    colour = dict(zip([curve.name for curve in curves], LINES, strict=False))
    for curve in curves:
        ax.plot(curve.x, curve.y, color=colour[curve.name], linewidth=2)
    ax.set_xscale("log")
    ax.set_ylim(0, max(max(curve.y) for curve in curves) * 1.15)
    for name, a, b in winners:
        ax.axvspan(a, b, color=colour[name], alpha=0.07, linewidth=0)
        if math.log(b / a) > 0.08 * math.log(curves[0].x[-1] / curves[0].x[0]):
            ax.text(math.sqrt(a * b), 0.975, f"{name}\nis the fastest", ha="center", va="top",
                    fontsize=9, color=colour[name], transform=ax.get_xaxis_transform())  # fmt: skip
    ax.set_xlim(curves[0].x[0], curves[0].x[-1])
    ax.set_xticks([*BANDWIDTH_TICKS], [*BANDWIDTH_TICKS.values()], fontsize=8)
    ax.minorticks_off()
    ax.set_xlabel("bandwidth of each link")
    ax.set_ylabel("predicted samples/s")
    _finish(ax, "What the links allow", subtitle)
    _label_ends(ax, curves)
    return save(fig, stem)


def _label_ends(ax: Any, curves: Sequence[Curve]) -> None:
    """Names at the lines' right ends."""
    ends = [(c.name, c.x[-1], c.y[-1], f, 10) for c, f in zip(curves, LINES, strict=False)]
    _label(ax, ends)


def _label(ax: Any, labels: Sequence[tuple[str, float, float, str, int]]) -> None:
    """Words (text, x, y, colour, size) to the right of points, moved down if they would touch."""
    ax.figure.draw_without_rendering()
    lowest = math.inf
    points = 72 / ax.figure.dpi
    for text, x, y, colour, size in sorted(labels, key=lambda label: -label[2]):
        height = points * ax.transData.transform((x, y))[1]
        place = min(height, lowest - 1.3 * size)
        lowest = place
        ax.annotate(text, (x, y), (9, place - height), textcoords="offset points", color=colour,
                    fontsize=size, va="center", annotation_clip=False,
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5})  # fmt: skip


def _finish(ax: Any, title: str, subtitle: str) -> None:
    clean(ax)
    ax.set_title(f"{title}\n", loc="left", fontsize=13)
    ax.text(0, 1.02, subtitle, transform=ax.transAxes, fontsize=9, color="#555555")
