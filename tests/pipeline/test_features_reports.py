"""Reports, logs and statistics of whole runs."""

import copy
import math

import pytest
import torch
from torch import nn

from headrace.pipeline import Progress, StageStatistics

from .alone import MSE, pipeline
from .helpers import batches_of
from .odd_models import vectors
from .reads import count_reads


def test_logs_say_where_the_stream_is() -> None:
    logs: list[Progress] = []
    pipe = pipeline(3)
    data = batches_of(46, 4)  # 12 micro-batches, the last of 2 samples
    pipe.train(data, log=logs.append, log_every=4)
    # Two are in flight behind the first stage's forward: the 4th gradient comes after the 6th.
    assert [log.micro_batch for log in logs] == [6, 10]
    assert [log.samples for log in logs] == [16, 32]
    assert [log.update for log in logs] == [3, 7]
    assert [log.staleness for log in logs] == [(2.0, 1.0, 0.0)] * 2
    assert [log.learning_rate for log in logs] == [0.05] * 2
    assert all(log.loss > 0 and log.samples_per_second > 0 for log in logs)
    assert all(0 < share <= 1 for log in logs for share in log.busy)
    logs.clear()
    report = pipe.train(data, log=logs.append, log_every=4)
    assert report.micro_batches == 12 and report.samples == 46 and report.updates == 12
    assert [log.micro_batch for log in logs] == [16, 20, 24]
    assert [log.samples for log in logs] == [14, 30, 46]


def test_the_loss_reported_is_the_mean_over_the_samples() -> None:
    """At n = 1 everything has come back when `train` returns."""
    data = vectors([4, 4, 3])
    model = nn.Sequential(nn.Linear(5, 3).requires_grad_(False), nn.Identity()).double()
    expected = MSE(model(torch.cat([x for x, _ in data])), torch.cat([y for _, y in data]))
    for stages, schedule in ((1, "stream"), (2, "1f1b")):
        pipe = pipeline(stages, copy.deepcopy(model), schedule=schedule, micro_batches=3)
        assert pipe.train(data).loss == pytest.approx(expected.item(), rel=1e-12)


def test_a_report_before_anything_came_back() -> None:
    pipe = pipeline(3)
    report = pipe.train(batches_of(8, 4))
    assert math.isnan(report.loss)
    assert (report.samples, report.micro_batches, report.updates) == (0, 0, 0)
    assert report.staleness == (0.0, 0.0, 0.0)


def test_a_log_interval_must_be_one() -> None:
    with pytest.raises(ValueError, match="log_every=0: give a whole number >= 1"):
        pipeline(1).train(batches_of(4, 4), log_every=0)


def test_losses_are_read_at_the_log_interval_only() -> None:
    """Beside the reads at a log and at the end of the call, nothing waits for a loss."""
    pipe = pipeline(3)
    pipe.train(batches_of(20, 4))
    data = batches_of(80, 4)
    for log_every, expected in ((1000, 1), (10, 2), (5, 4), (8, 2 + 1)):
        with count_reads() as reads:
            pipe.train(data, log=lambda progress: None, log_every=log_every)
        assert reads == ["tolist"] * expected, log_every


def test_statistics() -> None:
    pipe = pipeline(3, slack=1)
    pipe.train(batches_of(80, 4))
    rows = pipe.statistics()
    assert all(isinstance(row, StageStatistics) for row in rows)
    assert [row.stage for row in rows] == [0, 1, 2]
    assert [row.updates for row in rows] == [20] * 3 and [row.skipped for row in rows] == [0] * 3
    # The first depth + 1 forwards all see version 0.
    assert rows[0].staleness == {0: 1, 1: 1, 2: 1, 3: 1, 4: 16}
    assert rows[1].staleness == {0: 1, 1: 1, 2: 18}
    assert rows[2].staleness == {0: 20}
    assert [row.staleness_max for row in rows] == [4, 2, 0]
    assert all(0 < row.busy <= 1 for row in rows) and sum(row.busy for row in rows) <= 1.01
    assert pipe.statistics()[0].updates == 20
