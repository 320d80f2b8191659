"""From what was measured to words: what limits the throughput, and what to write instead."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from headrace.pipeline import Link
from headrace.pipeline.partition import LayerCost, Partition, cut
from headrace.pipeline.schedule import SCHEDULES
from headrace.pipeline.slack import choose_slack
from headrace.pipeline.throughput import StageWork, period

__all__ = ["Diagnosis", "Evidence", "diagnose"]

MATTERS = 0.02
"""Gains below this share are lost in the noise of measuring."""

NEARLY_ALL = 0.9
"""Of the time at work, or of the rate that is allowed: there is little left to mend above it."""


@dataclass(frozen=True)
class Evidence:
    """What is known of a pipeline at work; NaN is what is not.

    Args:
        partition: the cut used, its layers' costs measured for one micro-batch.
        links: of each hop.
        slack: of each hop, as used; empty where not all stages wait for gradients.
        busy: each stage's share of the time. data: the first stage's for its loader.
        samples_per_second, ceiling: measured.
        update_every, workers, autocast: of the configuration.
        learning: each stage's share of the time for its synthesizers' learning.
    """

    partition: Partition
    links: Sequence[Link]
    schedule: str
    slack: Sequence[int]
    micro_batches: int
    busy: Sequence[float]
    data: float = math.nan
    samples_per_second: float = math.nan
    ceiling: float = math.nan
    update_every: int = 1
    workers: int = 0
    autocast: bool = False
    learning: Sequence[float] = ()


@dataclass(frozen=True)
class Diagnosis:
    """Findings, one a line, and the configuration's keys that would mend them."""

    lines: tuple[str, ...]
    fixes: dict[str, Any] = field(default_factory=dict)


def diagnose(e: Evidence) -> Diagnosis:
    """Say what limits this pipeline, and what to set."""
    lines, fixes = [_bottleneck(e)], dict[str, Any]()
    for look in (_balance, _one_layer, _bandwidth, _slack, _learning, _loader, _flush, _rest):
        line, fix = look(e)
        if line:
            lines.append(line)
        fixes |= fix
    if len(lines) == 1:
        works = e.busy[_slowest(e)] >= NEARLY_ALL
        why = ": the slowest stage works nearly all the time" if works else " was found"
        lines.append(f"nothing to mend{why}")
    return Diagnosis(tuple(lines), fixes)


Finding = tuple[str, dict[str, Any]]
NOTHING: Finding = ("", {})


def _slowest(e: Evidence) -> int:
    work = e.partition.costs
    if _learners(e) and not any(map(math.isnan, e.busy)):  # their costs are not the cut's
        return max(range(len(work)), key=lambda j: e.busy[j])
    return max(range(len(work)), key=lambda j: work[j])


def _best(layers: Sequence[LayerCost], stages: int) -> Partition:
    """The best cut by layers."""
    return Partition(tuple(layers), cut([layer.total for layer in layers], stages))


def _sent(partition: Partition) -> list[int]:
    """Bytes of an activation on each hop; its gradient has as many."""
    return [stage[-1].activation_bytes for stage in partition.stages[:-1]]


def _occupied(partition: Partition, links: Sequence[Link]) -> list[float]:
    """Seconds for which an activation keeps each link."""
    return [link.occupied(size) for link, size in zip(links, _sent(partition), strict=True)]


def _limit(partition: Partition, links: Sequence[Link]) -> float:
    """Seconds a micro-batch with all latency hidden: the slowest stage's or link's."""
    return max([*partition.costs, *_occupied(partition, links)])


def _advised(e: Evidence) -> Partition:
    """The best cut, or the one used where that is about as good."""
    best = _best(e.partition.layers, len(e.partition.sizes))
    gain = _limit(e.partition, e.links) / _limit(best, e.links) - 1
    return best if gain > MATTERS else e.partition


def _period(partition: Partition, links: Sequence[Link], slack: Sequence[int]) -> float:
    """Seconds a micro-batch that the cut, the links and the slack allow a stream."""
    sent = _sent(partition)
    works = [
        StageWork(
            sum(layer.forward for layer in layers),
            sum(layer.backward for layer in layers),
            sum(layer.update for layer in layers),
            down,
            up,
        )
        for layers, down, up in zip(partition.stages, [*sent, 0], [0, *sent], strict=True)
    ]
    return period(SCHEDULES["stream"], works, links, slack)


def _bottleneck(e: Evidence) -> str:
    work, slowest = e.partition.costs, _slowest(e)
    busy = e.busy[slowest]
    at_work = "" if math.isnan(busy) else f", at work {busy:.0%} of the time"
    limits = "" if SCHEDULES[e.schedule].flushes or not e.links else "; computing limits, not links"
    if _bandwidth(e) != NOTHING or _slack(e) != NOTHING:
        limits = "; the links limit more"
    return (
        f"stage {slowest} is the bottleneck: {1e3 * work[slowest]:.2f} ms a micro-batch, "
        f"{work[slowest] / sum(work):.0%} of all work{at_work}{limits}"
    )


def _balance(e: Evidence) -> Finding:
    used, best = e.partition, _advised(e)
    if best is used or _learners(e):
        return NOTHING
    gain = _limit(used, e.links) / _limit(best, e.links) - 1
    return (
        f"the cut {[*used.sizes]} is {gain:.0%} slower than the best one by layers: set "
        f"pipeline.balance to {[*best.sizes]}",
        {"pipeline.balance": [*best.sizes]},
    )


def _one_layer(e: Evidence) -> Finding:
    layers, stages = e.partition.layers, len(e.partition.sizes)
    total, largest = sum(e.partition.costs), max(layers, key=lambda layer: layer.total)
    if largest.total * stages <= total * (1 + MATTERS):
        return NOTHING
    goal = (1 + MATTERS) * max(_best(layers, stages).costs)
    useful = next(n for n in range(2, stages + 1) if max(_best(layers, n).costs) <= goal)
    fewer = f"; as it is, {useful} stages would do as well" if useful < stages else ""
    return (
        f"layer {largest.name} alone is {largest.total / total:.0%} of the work: no cut by layers "
        f"can exceed {total / largest.total:.2f}x on any number of stages; write it as several "
        f"layers{fewer}",
        {},
    )


def _bandwidth(e: Evidence) -> Finding:
    if SCHEDULES[e.schedule].flushes or not e.links:
        return NOTHING
    partition = _advised(e)
    occupied, work = _occupied(partition, e.links), max(partition.costs)
    slowest = max(range(len(occupied)), key=lambda k: occupied[k])
    if occupied[slowest] <= work * (1 + MATTERS):
        return NOTHING
    less = "" if e.autocast else "send bfloat16 (pipeline.autocast), "
    return (
        f"the link after stage {slowest} limits: it needs {1e3 * occupied[slowest]:.2f} ms for an "
        f"activation, the slowest stage {1e3 * work:.2f} ms; cut where activations are smaller, "
        f"{less}or take fewer stages",
        {},
    )


def _slack(e: Evidence) -> Finding:
    """On the cut that is advised, so that both advices go together."""
    if SCHEDULES[e.schedule].flushes or not e.links or not e.slack:
        return NOTHING
    partition = _advised(e)
    hops = [k.seconds(size) for k, size in zip(e.links, _sent(partition), strict=True)]
    chosen, _ = choose_slack(partition.costs, hops)
    now = _period(partition, e.links, e.slack)
    then = _period(partition, e.links, chosen)
    if now <= then * (1 + MATTERS):
        return NOTHING
    stale = [(len(slacks) + sum(slacks)) / e.update_every for slacks in (e.slack, chosen)]
    return (
        f"the links cost {1 - then / now:.0%}: a hop takes up to {1e3 * max(hops):.2f} ms, and "
        f"slack {[*e.slack]} does not hide that: set pipeline.slack to {chosen} (stage 0's "
        f"gradients are then {stale[1]:g} updates old, not {stale[0]:g})",
        {"pipeline.slack": chosen},
    )


def _learners(e: Evidence) -> list[int]:
    """The stages that learn for more than a tenth of the time: the network should come first."""
    return [j for j, share in enumerate(e.learning) if share > 1 - NEARLY_ALL]


def _learning(e: Evidence) -> Finding:
    stages = _learners(e)
    if not stages:
        return NOTHING
    which = ", ".join(f"{j} ({e.learning[j]:.0%})" for j in stages)
    return (
        f"synthesizers take much of the time of stage {which} for learning, which no cut knows of: "
        "take smaller ones (linear, or a lower width), or larger micro-batches",
        {},
    )


def _loader(e: Evidence) -> Finding:
    if math.isnan(e.data) or e.data <= MATTERS:
        return NOTHING
    more = f"more than {e.workers}" if e.workers else "2 or more"
    return (
        f"reading the data as configured, which the tables leave out, takes {e.data:.0%} of the "
        f"first stage's time: set data.workers to {more}, or load less per sample",
        {},
    )


def _flush(e: Evidence) -> Finding:
    """A stream takes no exact rule, and one micro-batch to update on as many samples as before."""
    if not SCHEDULES[e.schedule].flushes:
        return NOTHING
    n, m = len(e.partition.sizes), e.micro_batches
    bubble = (n - 1) / (m + n - 1)
    if bubble <= MATTERS:
        return NOTHING
    return (
        f"{e.schedule} flushes at every mini-batch: with {m} micro-batch{'es' * (m > 1)} on {n} "
        f"stages {bubble:.0%} of the time is a bubble; set pipeline.schedule to stream "
        "(pipeline.rule to delayed, pipeline.micro_batches to 1), or cut mini-batches into more",
        {"pipeline.schedule": "stream", "pipeline.rule": "delayed", "pipeline.micro_batches": 1},
    )


def _rest(e: Evidence) -> Finding:
    """What neither the cut nor the links explain."""
    if SCHEDULES[e.schedule].flushes or _learners(e):
        return NOTHING
    work = e.partition.costs
    # Without gradients to wait for, the slowest stage or link alone is the limit.
    slowest = _period(e.partition, e.links, e.slack) if e.slack else _limit(e.partition, e.links)
    allowed = e.ceiling * sum(work) / len(work) / slowest
    share = e.samples_per_second / allowed
    if math.isnan(share) or share >= NEARLY_ALL:
        return NOTHING
    return (
        f"the stream reaches {share:.0%} of what this cut and these links allow: something else "
        "takes the processors' or the links' time meanwhile (threads, other jobs), or "
        "micro-batches are so small that the engine's own cost shows; larger ones help",
        {},
    )
