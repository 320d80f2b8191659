"""Predictions from costs that one can work out by hand."""

import math
from dataclasses import replace

import pytest

from headrace.launch.profiling.costs import Costs, Passes, beside_the_layers, typical
from headrace.launch.profiling.prediction import Curve, by_bandwidth, by_stages, winners
from headrace.pipeline import Link, Timeline
from headrace.pipeline.partition import LayerCost, Partition
from headrace.pipeline.throughput import StageWork
from headrace.pipeline.timeline import Span, Work


def layer(forward: float, backward: float, update: float = 0.0, size: int = 0) -> LayerCost:
    return LayerCost("l", "Linear", 1, size, forward, backward, update)


def costs(links: int = 1, per_batch: float = 0.0, **more: object) -> Costs:
    """Two equal stages of 1 + 2 seconds for 8 samples, and `per_batch` more for any micro-batch."""
    large = [layer(1 + per_batch, 2 + per_batch, 0.5, 1000)] * 2
    small = tuple([layer(0.25 + per_batch, 0.5 + per_batch, 0.5, 250)] * 2)
    link = more.get("link", Link())
    assert isinstance(link, Link)
    return Costs(8, Partition(tuple(large), (1, 1)), 2, small, 1e6, (link,) * links)


def test_a_micro_batch_costs_its_samples_and_what_any_costs() -> None:
    stage = costs(per_batch=0.1).stages(4)[1]
    assert stage.forward == pytest.approx(0.5 + 0.1) and stage.backward == pytest.approx(1 + 0.1)
    assert stage.update == 0.5, "an update costs the same at any size"
    assert (stage.activation_bytes, stage.gradient_bytes) == (500, 500)
    assert costs().stages(8)[0].gradient_bytes == 0, "nothing goes up from the first stage"


def test_rates() -> None:
    c = costs()
    assert c.one_device() == pytest.approx(8 / 7)
    assert c.ceiling() == pytest.approx(2 * 8 / 7)
    assert c.stream(0) == pytest.approx(8 / 3.5)
    assert c.stream(0, 4, 4) == pytest.approx(8 / 3.5), "one update for four parts"
    assert c.flushing("1f1b", 4) == pytest.approx(8 / (5 * 0.75 + 0.5))
    assert c.flushing("gpipe", 1) == pytest.approx(8 / (2 * 3 + 0.5))
    assert c.data_parallel(Link()) == pytest.approx(8 / (3 + 1)), "half the samples, all weights"
    busy = replace(c, passes=Passes(reducing=2e-6))  # and 1e6 bytes of gradients
    assert busy.data_parallel(Link()) == pytest.approx(8 / (3 + 2 + 1))
    assert busy.data_parallel(Link(0, 1e6)) == pytest.approx(8 / (3 + 2 + 1 + 1)), "a ring of two"


def test_passes_over_memory() -> None:
    """Each of two equal stages has half of 1e6 bytes: 1 s to add, or to copy."""
    c = replace(costs(), passes=Passes(adding=2e-6))
    assert c.stream(0) == costs().stream(0)
    assert c.stream(0, copies=1) == pytest.approx(8 / 4.5), "on the first stage alone"
    assert c.stream(0, 4, 4) == pytest.approx(8 / (3.5 + 3)), "4 gradients are added to one"
    assert c.flushing("gpipe", 2) == pytest.approx(8 / (3 * (1.5 + 0.5) + 0.5))


def test_what_a_micro_batch_costs_beside_its_layers() -> None:
    """Two micro-batches in 10 s: one stage waits for 2 of them, and has 3 s of work for each."""
    waits = [Span(Work.FORWARD, 0, 0, 8), Span(Work.WAIT, 0, 8, 10)]
    timeline = Timeline((tuple(waits), (Span(Work.FORWARD, 0, 0, 10),)))
    works = [StageWork(1.0, 1.5, 1.0), StageWork(2.0, 2.0, 0.0)]
    assert beside_the_layers(timeline, 2, works, 2) == pytest.approx(((4 - 3) + (5 - 4)) / 2)
    assert beside_the_layers(timeline, 4, works, 2) == 0.0, "never less than nothing"
    c = replace(costs(), streaming=0.5, in_flushes=0.25)
    assert c.stream(0) == pytest.approx(8 / (3.5 + 0.5))
    assert c.flushing("1f1b", 2) == pytest.approx(8 / (3 * (1.5 + 0.25) + 0.5))


def test_the_typical_cost_is_each_layers_median() -> None:
    rounds = [(layer(f, 2 * f, 1.0), layer(10 - f, 1.0)) for f in (1.0, 7.0, 2.0)]
    found = typical(rounds)
    assert [(c.forward, c.backward, c.update) for c in found] == [(2, 4, 1), (8, 1, 0)]


def test_a_stream_is_as_fast_as_there_are_stages_and_a_flush_is_not() -> None:
    stream, one_f, gpipe = by_stages(costs(), (2, 4, 64))
    assert [c.name for c in (stream, one_f, gpipe)] == ["stream, slack 0", "1F1B", "GPipe"]
    assert stream.x == (2, 4, 64) and stream.y == pytest.approx((2, 4, 64))
    # 8 samples make 8 micro-batches at most: (8 + n - 1) slots of 3/8 s, and the update.
    for n, y in zip(one_f.x, one_f.y, strict=True):
        assert y == pytest.approx(n * 3.5 / ((8 + n - 1) * 3 / 8 + 0.5))
    assert gpipe.y == pytest.approx(one_f.y)


def test_micro_batches_are_as_many_as_is_best() -> None:
    """If any micro-batch costs as much as a whole mini-batch, one is best."""
    _, one_f, _ = by_stages(costs(per_batch=100.0), (2,))
    period = 2 * (101 + 102) + 0.5
    assert one_f.y[0] == pytest.approx(2 * (101 + 102 + 0.5) / period)


def test_slow_links_bring_slack() -> None:
    curves = by_stages(costs(link=Link(latency=1.0)), (4,))
    rates = {curve.name: curve.y[0] for curve in curves}
    assert rates["stream, slack auto"] == pytest.approx(4, rel=0.02)
    assert rates["stream, slack 0"] < 3.3


def test_bandwidth_limits_each_in_its_way() -> None:
    stream, one_f, ddp = by_bandwidth(costs(), (100.0, 1e12))
    # Slow: an activation of 1000 bytes each way takes 10 s.
    assert stream.y[0] == pytest.approx(8 / 10, rel=1e-3)
    assert ddp.y[0] < 8 / 1e4 * 1.01
    assert stream.y[1] == pytest.approx(8 / 3.5)
    assert one_f.y[0] < stream.y[0] and one_f.y[1] < stream.y[1]


def test_who_wins_where() -> None:
    x = (1.0, 10.0, 100.0, 1000.0)
    a, b = Curve("a", x, (4, 3, 1, 0)), Curve("b", x, (0, 1, 3, 4))
    assert winners([a, b]) == [
        ("a", 1.0, pytest.approx(math.sqrt(1000))),
        ("b", pytest.approx(math.sqrt(1000)), 1000.0),
    ]
    assert winners([a]) == [("a", 1.0, 1000.0)]
