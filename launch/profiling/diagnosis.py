"""From what was measured to words: what limits the throughput, and what to write instead."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from headrace.pipeline import Link
from headrace.pipeline.partition import Partition, cut
from headrace.pipeline.schedule import SCHEDULES
from headrace.pipeline.slack import choose_slack, period

__all__ = ["Diagnosis", "Evidence", "diagnose"]

MATTERS = 0.02
"""Gains below this share are lost in the noise of measuring."""


@dataclass(frozen=True)
class Evidence:
    """What is known of a pipeline at work; NaN is what is not.

    Args:
        partition: the cut used, its layers' costs for one micro-batch.
        links: of each hop.
        slack: of each hop, as used.
        busy, bubble: each stage's shares of the time. data: the first stage's for its loader.
        samples_per_second, ceiling: measured.
    """

    partition: Partition
    links: Sequence[Link]
    schedule: str
    slack: Sequence[int]
    micro_batches: int
    busy: Sequence[float]
    bubble: Sequence[float]
    data: float = math.nan
    samples_per_second: float = math.nan
    ceiling: float = math.nan


@dataclass(frozen=True)
class Diagnosis:
    """Findings, one a line, and the configuration's keys that would mend them."""

    lines: tuple[str, ...]
    fixes: dict[str, Any] = field(default_factory=dict)


def diagnose(evidence: Evidence) -> Diagnosis:
    """Say what limits this pipeline, and what to set."""
    lines, fixes = [_bottleneck(evidence)], dict[str, Any]()
    for look in (_balance, _one_layer, _links, _loader, _flush, _rest):
        line, fix = look(evidence)
        if line:
            lines.append(line)
        fixes |= fix
    if len(lines) == 1:
        lines.append("nothing to mend: the slowest stage works nearly all the time")
    return Diagnosis(tuple(lines), fixes)


Finding = tuple[str, dict[str, Any]]
NOTHING: Finding = ("", {})


def _bottleneck(e: Evidence) -> str:
    work = e.partition.costs
    slowest = max(range(len(work)), key=lambda j: work[j])
    share = work[slowest] / sum(work)
    busy = e.busy[slowest]
    at_work = "" if math.isnan(busy) else f", at work {busy:.0%} of the time"
    return (
        f"stage {slowest} is the bottleneck: {1e3 * work[slowest]:.2f} ms a micro-batch, "
        f"{share:.0%} of all work{at_work}"
    )


def _balance(e: Evidence) -> Finding:
    costs = [layer.total for layer in e.partition.layers]
    sizes = cut(costs, len(e.partition.sizes))
    best = max(Partition(e.partition.layers, sizes).costs)
    used = max(e.partition.costs)
    gain = used / best - 1
    if gain <= MATTERS:
        return NOTHING
    return (
        f"the cut {[*e.partition.sizes]} is {gain:.0%} slower than the best one by layers: set "
        f"pipeline.balance to {[*sizes]}",
        {"pipeline.balance": [*sizes]},
    )


def _one_layer(e: Evidence) -> Finding:
    layers = e.partition.layers
    total, largest = sum(e.partition.costs), max(layers, key=lambda layer: layer.total)
    stages = len(e.partition.sizes)
    if largest.total * stages <= total * (1 + MATTERS):
        return NOTHING
    useful = max(2, math.floor(total / largest.total))
    fewer = f"; {useful} stages would do as well" if useful < stages else ""
    return (
        f"layer {largest.name} alone is {largest.total / total:.0%} of the work: no cut by layers "
        f"can exceed {total / largest.total:.2f}x on any number of stages; write it as several "
        f"layers{fewer}",
        {},
    )


def _links(e: Evidence) -> Finding:
    if SCHEDULES[e.schedule].flushes or not e.links:
        return NOTHING
    stages = e.partition.stages
    sizes = [stage[-1].activation_bytes for stage in stages[:-1]]
    hops = [link.seconds(size) for link, size in zip(e.links, sizes, strict=True)]
    work = e.partition.costs
    now = period(work, hops, e.slack)
    chosen, _ = choose_slack(work, hops)
    then = period(work, hops, chosen)
    gain = now / then - 1
    slowest = max(range(len(hops)), key=lambda k: hops[k])
    occupied = max(link.occupied(size) for link, size in zip(e.links, sizes, strict=True))
    if occupied > max(work):
        return (
            f"the link after stage {slowest} limits: it needs {1e3 * occupied:.2f} ms for an "
            f"activation, the slowest stage {1e3 * max(work):.2f} ms; cut where activations are "
            "smaller, send bfloat16 (pipeline.autocast), or take fewer stages",
            {},
        )
    if gain <= MATTERS:
        return NOTHING
    return (
        f"the links cost {1 - then / now:.0%}: a hop takes up to {1e3 * hops[slowest]:.2f} ms, and "
        f"slack {[*e.slack]} does not hide that: set pipeline.slack to {chosen} (staleness grows "
        "by as much)",
        {"pipeline.slack": chosen},
    )


def _loader(e: Evidence) -> Finding:
    if math.isnan(e.data) or e.data <= MATTERS:
        return NOTHING
    return (
        f"the first stage waits for its loader {e.data:.0%} of the time: set data.workers to 2 or "
        "more, or load less per sample",
        {},
    )


def _flush(e: Evidence) -> Finding:
    if not SCHEDULES[e.schedule].flushes:
        return NOTHING
    n, m = len(e.partition.sizes), e.micro_batches
    bubble = (n - 1) / (m + n - 1)
    if bubble <= MATTERS:
        return NOTHING
    return (
        f"{e.schedule} flushes at every mini-batch: with {m} micro-batches on {n} stages "
        f"{bubble:.0%} of the time is a bubble; set pipeline.schedule to stream, or cut "
        "mini-batches into more (pipeline.micro_batches)",
        {"pipeline.schedule": "stream"},
    )


def _rest(e: Evidence) -> Finding:
    """What neither the cut nor the links explain."""
    work = e.partition.costs
    allowed = e.ceiling * e.partition.speed_up / len(work)
    share = e.samples_per_second / allowed
    if SCHEDULES[e.schedule].flushes or math.isnan(share) or share >= 0.9:
        return NOTHING
    return (
        f"the stream reaches {share:.0%} of what this cut allows: something else takes the "
        "processors' or the links' time meanwhile (threads, other jobs), or micro-batches are so "
        "small that the engine's own cost shows; larger ones help",
        {},
    )
