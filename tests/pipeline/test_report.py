"""The first stage's books: exact means, and losses that the host reads at the log interval only."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from headrace.pipeline import Progress, Report, StageStatistics
from headrace.pipeline.report import Books, Row

from .reads import count_reads

ROWS = [Row(2.0, 0.5, 1.0, 1.0), Row(0.0, 0.25, 1.0, 0.0)]
NUMBERS = ROWS[0] + ROWS[1]
ONE = ROWS[0]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    yield now


def test_a_report_rides_in_a_header_as_it_is() -> None:
    report = Report(0.1, 1437, 45, 44, 1.5, 2, (4.0, 2.0, 0.0))
    assert Report.from_numbers(report.numbers()) == report
    assert report.samples_per_second == 958
    assert all(type(getattr(Report.from_numbers(report.numbers()), name)) is int
               for name in ("samples", "micro_batches", "updates", "skipped"))  # fmt: skip
    assert math.isnan(Report(math.nan, 0, 0, 0, 0.0, 0, ()).samples_per_second)


def test_rows_ride_one_behind_the_other() -> None:
    assert Row.read(NUMBERS) == ROWS
    assert Row.read(()) == []


def test_the_loss_is_a_mean_over_samples(clock: list[float]) -> None:
    books = Books(2)
    books.begin()
    for loss, samples in ((1.0, 6), (3.0, 2)):
        books.fed(samples)
        books.note(torch.tensor(loss), NUMBERS, 1, 0.1)
    clock[0] += 4
    report = books.close(version=2)
    assert report == Report(1.5, 8, 2, 2, 4.0, 1, (2.0, 0.0))


def test_each_report_covers_what_came_since_the_last(clock: list[float]) -> None:
    books = Books(2)
    books.fed(1)
    books.note(torch.tensor(5.0), NUMBERS, 1, 0.1)  # of a drain before `train`
    books.begin()
    books.fed(1)
    books.note(torch.tensor(1.0), NUMBERS, 2, 0.1)
    assert books.close(2).loss == 3.0
    books.begin()
    empty = books.close(2)
    assert (
        math.isnan(empty.loss) and (empty.samples, empty.micro_batches, empty.updates) == (0,) * 3
    )
    books.begin()
    books.fed(4)
    books.note(torch.tensor(7.0), NUMBERS, 3, 0.1)
    last = books.close(5)
    assert (last.loss, last.samples, last.micro_batches, last.updates) == (7.0, 4, 1, 3)


def test_losses_are_added_exactly() -> None:
    """In float32 the sum of a long epoch would lose what the last losses say."""
    books = Books(1)
    losses = [1e8, *[0.1] * 1000]
    for loss in losses:
        books.fed(1)
        books.note(torch.tensor(loss, dtype=torch.float64), ONE, 0, 0.1)
    assert books.close(0).loss == math.fsum(losses) / len(losses)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_any_floating_loss(dtype: torch.dtype) -> None:
    books = Books(1)
    books.fed(2)
    books.note(torch.tensor(0.75, dtype=dtype), ONE, 0, 0.1)
    assert books.close(0).loss == 0.75


def test_logs_come_at_their_interval_with_what_is_known_then(clock: list[float]) -> None:
    books, logs = Books(2), list[Progress]()
    books.log, books.log_every = logs.append, 2
    books.begin()
    for k in range(5):
        clock[0] += 1
        rows = [Row(2.0, 0.6 * (k + 1), clock[0], 0.0), Row(0.0, 0.5 * (k + 1), clock[0], 0.0)]
        numbers = rows[0] + rows[1]
        books.fed(k + 1)
        books.note(torch.tensor(float(k)), numbers, version=k, rate=0.1 * k)
    assert [log.micro_batch for log in logs] == [2, 4]
    assert [log.samples for log in logs] == [3, 10]
    assert [log.loss for log in logs] == [2 / 3, (2 * 3 + 3 * 4) / 7]
    assert [log.samples_per_second for log in logs] == [1.5, 3.5]
    assert [log.update for log in logs] == [1, 3]
    assert [log.learning_rate for log in logs] == [0.1, pytest.approx(0.3)]
    assert logs[1].staleness == (2.0, 0.0)
    assert logs[1].busy == pytest.approx((0.6, 0.5))
    assert books.close(4).samples == 15


def test_the_host_reads_losses_at_the_log_interval_only() -> None:
    books = Books(1)
    books.log, books.log_every = lambda progress: None, 4
    losses: list[Tensor] = [torch.tensor(float(k)) for k in range(10)]
    found = []
    for loss in losses:
        with count_reads() as reads:
            books.fed(1)
            books.note(loss, ONE, 0, 0.1)
        found.append(len(reads))
    assert found == [0, 0, 0, 1, 0, 0, 0, 1, 0, 0]
    with count_reads() as reads:
        books.close(0)
    assert reads == ["tolist"]


def test_statistics_of_a_stage() -> None:
    statistics = StageStatistics(0, 12, 1, {0: 1, 1: 2, 4: 9}, 0.9, 0.1, 0.0, 0.1, 5, 4)
    assert statistics.staleness_mean == (2 + 36) / 12
    assert statistics.staleness_max == 4
    none = StageStatistics(0, 0, 0, {}, math.nan, math.nan, math.nan, 0.1, 0, 0)
    assert (none.staleness_mean, none.staleness_max) == (0.0, 0)
