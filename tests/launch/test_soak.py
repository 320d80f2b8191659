"""What counts as growth, on samples made up; and what the soak refuses."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from headrace.launch.studies.growth import (
    Limits,
    Sample,
    growth,
    slowdown,
    theil_sen,
    what_grew,
)
from headrace.launch.studies.soak import main, table, trends

STEADY = Sample(0, 400 << 20, 90_000, 5 << 20, 7, 23, 4, 0.001, 0.003)


def run(**grown: float) -> list[Sample]:
    """20 samples, 100 micro-batches apart; each micro-batch adds so much to a figure."""
    steps = [100 * k for k in range(1, 21)]
    return [
        replace(
            STEADY, micro_batches=i, **{n: getattr(STEADY, n) + x * i for n, x in grown.items()}
        )
        for i in steps
    ]


def test_the_slope_is_the_median_of_all_pairs_and_deaf_to_a_jump() -> None:
    assert theil_sen([0, 1, 3], [0, 2, 3]) == 1, "of 2, 1 and 1/2"
    assert theil_sen(range(10), [0, 1, 2, 3, 4, 5, 6, 7, 8, 999]) == 1


def test_nothing_grows_where_all_is_steady() -> None:
    assert what_grew(run(), Limits()) == []


def test_growth_is_over_what_comes_after_the_first_fifth() -> None:
    samples = run(memory=1000)
    assert growth(samples, "memory") == 1000 * 1500
    warm = [replace(s, memory=0) for s in samples[:4]] + [replace(s, memory=9) for s in samples[4:]]
    assert growth(warm, "memory") == 0


@pytest.mark.parametrize(
    ("grown", "line"),
    [
        (
            {"memory": 3000},
            "resident bytes: 4,500,000 more from micro-batch 500 to 2,000; 4,194,304 is the limit",
        ),
        (
            {"device_memory": 4000},
            "GPU bytes: 6,000,000 more from micro-batch 500 to 2,000; 4,194,304 is the limit",
        ),
        ({"objects": 1}, "objects: 1,500 more from micro-batch 500 to 2,000; 200 is the limit"),
        (
            {"processor": 1e-6},
            "processor time a micro-batch: 1.80 times that of the run's second fifth in its last; "
            "1.25 is the limit",
        ),
    ],
)
def test_a_trend_beyond_its_limit_is_named(grown: dict[str, float], line: str) -> None:
    assert what_grew(run(**grown), Limits()) == [line]
    assert what_grew(run(**{name: x / 15 for name, x in grown.items()}), Limits()) == []


@pytest.mark.parametrize(
    ("name", "words"),
    [("threads", "threads"), ("files", "open files"), ("segments", "shared-memory segments")],
)
def test_what_is_counted_stays_one_number_once_warm(name: str, words: str) -> None:
    once = getattr(STEADY, name) + 1

    def changed(at: int) -> list[str]:
        samples = run()
        samples[at] = replace(samples[at], **{name: once})
        return what_grew(samples, Limits())

    assert changed(3) == []
    assert changed(12) == [
        f"{words}: from {once - 1} to {once} between micro-batch 500 and 2,000; one number is "
        "expected"
    ]


def test_time_is_that_of_the_quickest_sample_of_each_fifth() -> None:
    seconds = [9.0] * 4 + [1.0, 5, 5, 5] + [9.0] * 8 + [7.0, 7, 1.5, 7]
    samples = [replace(STEADY, processor=s) for s in seconds]
    assert slowdown(samples) == 1.5


def test_the_wall_clock_fails_nothing() -> None:
    assert what_grew(run(wall=1.0), Limits()) == []


def test_samples_survive_as_numbers() -> None:
    assert len(STEADY.numbers()) == Sample.WIDTH
    assert Sample.from_numbers(list(STEADY.numbers())) == STEADY


def test_the_tables() -> None:
    stages: Sequence[Sequence[Sample]] = [run(), run(memory=1024)]
    rows = table(stages).splitlines()
    assert len(rows) == 2 + 20
    assert rows[2] == (
        "| 100 | 400.0 400.1 | 90000 90000 | 5.00 5.00 | 7 7 | 23 23 | 4 4 | 1.000 1.000 "
        "| 3.000 3.000 |"
    )
    no_gpu = [[replace(sample, device_memory=0) for sample in run()]]
    assert "GPU" not in table(no_gpu) and "GPU" in rows[0]
    assert trends(stages).splitlines()[2:] == [
        "| 0 | +0 | +0 | 1.000 |",
        "| 1 | +1500 | +0 | 1.000 |",
    ]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--stages", "0"], "--stages 0: give a whole number >= 1"),
        (["--checkpoint-every", "0"], "--checkpoint-every 0: give a whole number >= 1"),
        (
            ["--micro-batches", "900", "--every", "100"],
            "--micro-batches 900 with a sample every 100: a trend needs 10 samples, so write "
            "--every 45",
        ),
    ],
)
def test_refusals(capsys: pytest.CaptureFixture[str], arguments: list[str], line: str) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert capsys.readouterr().err == f"headrace: {line}\n"
