"""Diagnoses of pipelines whose limits one can work out by hand; times in milliseconds."""

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from headrace.launch.profiling.diagnosis import Diagnosis, Evidence, diagnose
from headrace.launch.profiling.observe import slack_of
from headrace.pipeline import Link
from headrace.pipeline.partition import LayerCost, Partition

FINE = "nothing to mend: the slowest stage works nearly all the time"
NOT_FOUND = "nothing to mend was found"


def cut(milliseconds: Sequence[float], sizes: Sequence[int], sent: Sequence[int] = ()) -> Partition:
    """Layers that take so long, a third of it forward; `sent` are their activations' bytes."""
    layers = [
        LayerCost(str(k), "Linear", 1, size, forward=ms / 3e3, backward=ms / 1.5e3, update=0.0)
        for k, (ms, size) in enumerate(
            zip(milliseconds, sent or [0] * len(milliseconds), strict=True)
        )
    ]
    return Partition(tuple(layers), tuple(sizes))


def stream(partition: Partition, **more: Any) -> Evidence:
    """A pipeline with perfect links, its slowest stage at work 95% of the time."""
    hops = len(partition.sizes) - 1
    busy = [0.95 * cost / max(partition.costs) for cost in partition.costs]
    healthy = Evidence(partition, [Link()] * hops, "stream", [0] * hops, 1, busy)
    return replace(healthy, **more)


def stages(*milliseconds: float, **more: Any) -> Evidence:
    """Stages of one layer each."""
    return stream(cut(milliseconds, [1] * len(milliseconds)), **more)


def linked(hop: float, *milliseconds: float, **more: Any) -> Evidence:
    """Stages of one layer each, with links that take so long however little they carry."""
    return stages(*milliseconds, links=[Link(latency=hop / 1e3)] * (len(milliseconds) - 1), **more)


def after(e: Evidence, found: Diagnosis) -> Evidence:
    """What would be seen with the fixes applied."""
    fixes = found.fixes
    sizes = fixes.get("pipeline.balance", e.partition.sizes)
    return replace(
        e,
        partition=Partition(e.partition.layers, tuple(sizes)),
        slack=fixes.get("pipeline.slack", e.slack),
        schedule=fixes.get("pipeline.schedule", e.schedule),
        micro_batches=fixes.get("pipeline.micro_batches", e.micro_batches),
    )


def rest(e: Evidence) -> tuple[str, ...]:
    """All lines but that on the bottleneck."""
    return diagnose(e).lines[1:]


# The bottleneck -------------------------------------------------------------------------------


def test_a_healthy_pipeline_has_a_bottleneck_and_nothing_to_mend() -> None:
    found = diagnose(stages(4, 4))
    bottleneck = "stage 0 is the bottleneck: 4.00 ms a micro-batch, 50% of all work, at work 95% of"
    assert found == Diagnosis((f"{bottleneck} the time; computing limits, not links", FINE), {})


def test_the_bottleneck_is_the_slowest_of_several() -> None:
    assert diagnose(stages(1, 3, 2, busy=[0.3, 0.91, 0.6])).lines[0] == (
        "stage 1 is the bottleneck: 3.00 ms a micro-batch, 50% of all work, at work 91% of the "
        "time; computing limits, not links"
    )


def test_what_is_not_known_is_not_said() -> None:
    found = diagnose(stages(4, 4, busy=[math.nan] * 2))
    bottleneck = "stage 0 is the bottleneck: 4.00 ms a micro-batch, 50% of all work"
    assert found == Diagnosis((f"{bottleneck}; computing limits, not links", NOT_FOUND), {})


@pytest.mark.parametrize(("busy", "line"), [(0.9, FINE), (0.89, NOT_FOUND)])
def test_who_is_idle_is_not_said_to_work_nearly_all_the_time(busy: float, line: str) -> None:
    assert rest(stages(4, 4.01, busy=[0.95, busy])) == (line,)


@pytest.mark.parametrize("schedule", ["stream", "1f1b", "gpipe"])
def test_one_stage_has_no_links_no_bubble_and_no_other_cut(schedule: str) -> None:
    whole = stream(cut([1, 5], [2]), schedule=schedule)
    assert diagnose(whole).lines == (
        "stage 0 is the bottleneck: 6.00 ms a micro-batch, 100% of all work, at work 95% of the "
        "time",
        FINE,
    )


# The cut --------------------------------------------------------------------------------------


def test_a_better_cut_is_advised() -> None:
    uneven = stream(cut([1, 1, 1, 3], [1, 3]))
    found = diagnose(uneven)
    line = (
        "the cut [1, 3] is 67% slower than the best one by layers: set pipeline.balance to [3, 1]"
    )
    assert found.lines[1:] == (line,)
    assert found.fixes == {"pipeline.balance": [3, 1]}
    assert diagnose(after(uneven, found)).fixes == {}


@pytest.mark.parametrize(("more", "advised"), [(2.1, {"pipeline.balance": [1, 2]}), (1.9, {})])
def test_a_cut_that_is_nearly_the_best_stays(more: float, advised: dict[str, Any]) -> None:
    assert diagnose(stream(cut([100, more, 90], [2, 1]))).fixes == advised


def test_a_cut_is_not_moved_to_where_the_link_would_limit() -> None:
    """[1, 2] would take 3 ms instead of 4, and send 5000 bytes instead of none."""
    uneven = stream(cut([2, 2, 1], [2, 1], sent=[5000, 0, 0]))
    assert diagnose(uneven).fixes == {"pipeline.balance": [1, 2]}
    slow = replace(uneven, links=[Link(bandwidth=1e6)])
    assert diagnose(slow).fixes == {}
    assert diagnose(replace(slow, links=[Link(bandwidth=2e6)])).fixes["pipeline.balance"] == [1, 2]


def test_one_layer_can_bound_every_cut() -> None:
    assert rest(stages(3, 1)) == (
        "layer 0 alone is 75% of the work: no cut by layers can exceed 1.33x on any number of "
        "stages; write it as several layers",
    )


def test_fewer_stages_are_named_only_if_they_do_as_well() -> None:
    """Two stages would take 3 ms, three and four take 2."""
    (line,) = rest(stages(2, 1, 1, 1))
    assert line == (
        "layer 0 alone is 40% of the work: no cut by layers can exceed 2.50x on any number of "
        "stages; write it as several layers; as it is, 3 stages would do as well"
    )


@pytest.mark.parametrize(("largest", "found"), [(104.2, True), (104.0, False)])
def test_a_layer_a_little_larger_than_a_stage_should_be_is_let_be(
    largest: float, found: bool
) -> None:
    """2a = 1.02 (a + 100) where a is 104.08."""
    assert rest(stages(largest, 100))[0].startswith("layer 0 alone is 51%") is found


# The links ------------------------------------------------------------------------------------


def test_slack_that_hides_the_latency_is_advised_and_enough() -> None:
    """A micro-batch takes 4 ms and, without slack, a hop."""
    slow = linked(2, 4, 4)
    found = diagnose(slow)
    assert found.lines[1:] == (
        "the links cost 33%: a hop takes up to 2.00 ms, and slack [0] does not hide that: set "
        "pipeline.slack to [1] (stage 0's gradients are then 2 updates old, not 1)",
    )
    assert found.fixes == {"pipeline.slack": [1]}
    assert found.lines[0].endswith("; the links limit more")
    assert rest(after(slow, found)) == (FINE,)


@pytest.mark.parametrize(("hop", "advised"), [(0.082, {"pipeline.slack": [1]}), (0.079, {})])
def test_a_short_latency_is_let_be(hop: float, advised: dict[str, Any]) -> None:
    assert diagnose(linked(hop, 4, 4)).fixes == advised


def test_each_hop_gets_the_slack_that_it_needs() -> None:
    uneven = replace(linked(0, 1, 1, 1), links=[Link(), Link(latency=0.001)])
    found = diagnose(uneven)
    assert "a hop takes up to 1.00 ms, and slack [0, 0] does not" in found.lines[1]
    assert found.fixes == {"pipeline.slack": [0, 2]}


def test_more_slack_than_is_needed_is_let_be() -> None:
    assert rest(linked(2, 4, 4, slack=[5])) == (FINE,)


def test_a_link_too_slow_for_its_activations_is_named() -> None:
    """The other one has the longer way, and does not limit."""
    partition = cut([4, 4, 4], [1, 1, 1], sent=[10, 6000, 0])
    links = [Link(latency=0.008), Link(bandwidth=1e6)]
    (line,) = rest(stream(partition, links=links, slack=[8, 8]))
    assert line == (
        "the link after stage 1 limits: it needs 6.00 ms for an activation, the slowest stage "
        "4.00 ms; cut where activations are smaller, send bfloat16 (pipeline.autocast), or take "
        "fewer stages"
    )


@pytest.mark.parametrize(("size", "found"), [(4090, True), (4070, False)])
def test_a_link_as_slow_as_a_stage_is_let_be(size: int, found: bool) -> None:
    partition = cut([4, 4], [1, 1], sent=[size, 0])
    (line,) = rest(stream(partition, links=[Link(bandwidth=1e6)], slack=[8]))
    assert line.startswith("the link after stage 0 limits") is found


def test_slack_is_advised_behind_a_link_that_limits_too() -> None:
    """Two micro-batches of 4 + 4 ms pay a way of 6 ms down and up: 10 ms each, and 6 at best."""
    partition = cut([4, 4], [1, 1], sent=[6000, 0])
    found = diagnose(stream(partition, links=[Link(bandwidth=1e6)]))
    assert [line.partition(":")[0] for line in found.lines[1:]] == [
        "the link after stage 0 limits",
        "the links cost 40%",
    ]
    assert found.fixes == {"pipeline.slack": [3]}


def test_slack_is_not_advised_where_it_gains_nothing() -> None:
    """404 ms without, 400 at best."""
    partition = cut([4, 4], [1, 1], sent=[400_000, 0])
    assert diagnose(stream(partition, links=[Link(bandwidth=1e6)])).fixes == {}


def test_what_is_advised_leaves_nothing_more_to_advise() -> None:
    """The slack must be that of the cut advised along with it."""
    dice = random.Random(0)
    advised: list[str] = []
    for _ in range(8):
        n = dice.choice([2, 3])
        sizes = [dice.randint(1, 3) for _ in range(n)]
        layers = sum(sizes)
        partition = cut(
            [dice.uniform(0.5, 2) for _ in range(layers)],
            sizes,
            sent=[dice.choice([10, 1000, 5000]) for _ in range(layers)],
        )
        links = [Link(dice.choice([0, 1e-3, 5e-3]), dice.choice([1e6, 1e9])) for _ in range(n - 1)]
        e = stream(partition, links=links)
        found = diagnose(e)
        assert diagnose(after(e, found)).fixes == {}, e
        advised.append(" ".join(found.fixes))
    assert {"pipeline.balance", "pipeline.balance pipeline.slack"} <= {*advised}


# The loader, the flush and the rest -----------------------------------------------------------


def test_a_slow_loader_is_named() -> None:
    found = diagnose(stages(4, 4, data=0.25))
    assert found.lines[1:] == (
        "reading the data as configured, which the tables leave out, takes 25% of the first "
        "stage's time: set data.workers to 2 or more, or load less per sample",
    )
    assert found.fixes == {}
    assert "to more than 4, or" in rest(stages(4, 4, data=0.25, workers=4))[0]
    assert rest(stages(4, 4, data=0.021)) != (FINE,)
    for little in (0.0, 0.02, math.nan):
        assert rest(stages(4, 4, data=little)) == (FINE,)


def test_a_flush_costs_a_bubble() -> None:
    """2 of 4 + 2 slots. A stream takes no exact rule, and updates after each micro-batch."""
    flushing = stages(4, 4, 4, schedule="1f1b", micro_batches=4)
    found = diagnose(flushing)
    assert found.lines[1:] == (
        "1f1b flushes at every mini-batch: with 4 micro-batches on 3 stages 33% of the time is a "
        "bubble; set pipeline.schedule to stream (pipeline.rule to delayed, pipeline.micro_batches "
        "to 1), or cut mini-batches into more",
    )
    assert found.fixes == {
        "pipeline.schedule": "stream",
        "pipeline.rule": "delayed",
        "pipeline.micro_batches": 1,
    }
    assert rest(after(flushing, found)) == (FINE,)
    (line,) = rest(stages(4, 4, schedule="gpipe"))
    assert line.startswith("gpipe flushes at every mini-batch: with 1 micro-batch on 2 stages 50% ")


@pytest.mark.parametrize(("count", "found"), [(48, True), (49, False)])
def test_a_small_bubble_is_let_be(count: int, found: bool) -> None:
    (line,) = rest(stages(4, 4, schedule="1f1b", micro_batches=count))
    assert line.startswith(f"1f1b flushes at every mini-batch: with {count} ") is found


def test_of_a_flush_nothing_is_said_that_is_a_streams() -> None:
    slow = [Link(latency=0.004, bandwidth=1e5)]
    partition = cut([4, 4], [1, 1], sent=[1000, 0])
    flushing = stream(
        partition, links=slow, schedule="1f1b", samples_per_second=1.0, ceiling=1000.0
    )
    (line,) = rest(flushing)
    assert line.startswith("1f1b flushes")
    assert len(rest(replace(flushing, schedule="stream"))) == 3, "two on the links, one on the rest"


def test_what_nothing_explains_is_said() -> None:
    assert rest(stages(4, 4, samples_per_second=500.0, ceiling=1000.0)) == (
        "the stream reaches 50% of what this cut and these links allow: something else takes the "
        "processors' or the links' time meanwhile (threads, other jobs), or micro-batches are so "
        "small that the engine's own cost shows; larger ones help",
    )


@pytest.mark.parametrize(
    ("rate", "ceiling", "line"),
    [
        (901.0, 1000.0, FINE),
        (899.0, 1000.0, "the stream reaches 90%"),
        (math.nan, 1000.0, FINE),
        (1.0, math.nan, FINE),
    ],
)
def test_a_stream_near_what_is_allowed_is_fine(rate: float, ceiling: float, line: str) -> None:
    (got,) = rest(stages(4, 4, samples_per_second=rate, ceiling=ceiling))
    assert got.startswith(line)


def test_what_the_cut_and_the_links_explain_is_not_said_again() -> None:
    """Either allows two thirds of the ceiling: 2 of 3 ms a stage, 4 of 6 ms with the hop."""
    uneven = stages(1, 3, ceiling=900.0)
    slow = linked(2, 4, 4, ceiling=900.0)
    for e in (uneven, slow):
        assert len(rest(replace(e, samples_per_second=550.0))) == 1
        assert rest(replace(e, samples_per_second=450.0))[1].startswith("the stream reaches 75% ")


# Synthesizers ---------------------------------------------------------------------------------


def test_synthesizers_that_take_much_of_the_time() -> None:
    """They are not in the cut's costs: which stage is the slowest is seen, and no cut advised."""
    busy = [0.9, 0.4, 0.5]
    found = diagnose(stages(4, 4, 4, slack=[], learning=[0.31, 0.05, 0.11], busy=busy))
    assert found.lines[0].startswith("stage 0 is the bottleneck: 4.00 ms a micro-batch, 33% of")
    assert found.lines[1:] == (
        "synthesizers take much of the time of stage 0 (31%), 2 (11%) for learning, which no cut "
        "knows of: take smaller ones (linear, or a lower width), or larger micro-batches",
    )
    assert not found.fixes
    assert rest(stages(4, 4, 4, slack=[], learning=[0.05, 0.09, 0.0])) == (FINE,)
    unbalanced = stream(cut([4, 1, 1], [2, 1]), slack=[], learning=[0.3, 0.0])
    assert not diagnose(unbalanced).fixes
    assert diagnose(replace(unbalanced, learning=[])).fixes


def test_a_stage_that_does_not_wait_leaves_no_slack_to_speak_of() -> None:
    """Of a list of rules: what is in flight does not add up over such a stage."""
    assert slack_of((5, 3, 2, 0)) == [1, 0, 1]
    assert slack_of((0, 2, 1, 0)) == slack_of((2, 0, 1, 0)) == slack_of((0, 0)) == []


def test_slow_links_need_no_slack_where_no_gradient_is_waited_for() -> None:
    waits = linked(3, 4, 4)
    assert "pipeline.slack" in diagnose(waits).fixes
    assert rest(replace(waits, slack=[])) == (FINE,)
    # What is missing is measured against the slowest stage alone.
    slow = replace(waits, slack=[], ceiling=500.0, samples_per_second=300.0)
    assert "the stream reaches 60% of what this cut and these links allow" in rest(slow)[0]
