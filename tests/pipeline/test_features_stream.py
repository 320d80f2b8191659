"""The stream and its ends: drains, partial updates, errors, numbers that are not finite."""

import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headrace.pipeline.pipeline import _end

from .alone import STAGES, pipeline
from .helpers import assert_same, batches_of
from .odd_models import Do, linears, vectors


def test_a_partial_update_waits_for_close() -> None:
    data = batches_of(28, 4)  # 7 micro-batches, 3 to an update
    pipe = pipeline(3, update_every=3)
    pipe.train(data)
    pipe.drain()
    assert pipe.version == 2
    before = pipe.state_dict()
    pipe.drain()
    assert_same(pipe.state_dict(), before)
    pipe.close()
    assert pipe.version == 3
    after = pipe.state_dict()
    assert all(not torch.equal(after[name], before[name]) for name in after)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_mini_batches_are_counted_across_calls(schedule: str) -> None:
    """Two to an update; what only looks is none."""
    data = batches_of(20, 4)
    together, apart = (pipeline(2, schedule=schedule, update_every=2) for _ in range(2))
    together.train(data)
    for k in range(5):
        apart.evaluate(data[:1])
        apart.train(data[k : k + 1])
        apart.drain()
        assert apart.version == (k + 1) // 2
    assert_same(apart.state_dict(), together.state_dict())
    apart.close()
    assert apart.version == 3


def test_a_drain_ends_what_is_in_flight_and_no_more() -> None:
    pipe = pipeline(3, slack=1)
    assert pipe.depths == (4, 2, 0)
    first = pipe.train(batches_of(24, 4))
    assert first.micro_batches == 2 and first.samples == 8  # 6 - 4
    assert [len(e.stage.flights) for e in pipe._engines] == [4, 2, 0]
    assert [e.stage.version for e in pipe._engines] == [2, 4, 6]
    pipe.drain()
    assert [e.stage.version for e in pipe._engines] == [6, 6, 6]
    pipe.drain()
    second = pipe.train(batches_of(24, 4))
    assert second.micro_batches == 4 + 2 and second.updates == 4 + 2


def test_close_twice_and_with() -> None:
    with pipeline(2) as pipe:
        pipe.train(batches_of(12, 4))
    assert pipe.version == 3
    pipe.close()
    pipe.close()
    assert pipe.version == 3


@pytest.mark.parametrize("stages", [1, 3])
def test_a_closed_pipeline_says_so(stages: int) -> None:
    data = batches_of(8, 4)
    pipe = pipeline(stages)
    pipe.train(data)
    pipe.close()
    calls: list[Callable[[], Any]] = [
        lambda: pipe.train(data), lambda: pipe.evaluate(data), lambda: pipe.predict(data),
        pipe.drain, pipe.statistics,
        pipe.named_parameters, lambda: pipe.load_state_dict(state),
    ]  # fmt: skip
    state = pipe.state_dict()  # alone, the model has the weights still
    for call in calls:
        with pytest.raises(RuntimeError, match=r"has ended, by close\(\)"):
            call()


def test_an_error_ends_the_pipeline_and_names_the_layer() -> None:
    def fail(x: Tensor) -> Tensor:
        if len(x) == 3:
            raise ZeroDivisionError("three")
        return x

    model = nn.Sequential(*linears(5, 4), Do(fail), nn.Linear(4, 3)).double()
    pipe = pipeline(2, model, balance=[2, 2])
    with pytest.raises(ZeroDivisionError, match="three") as caught:
        pipe.train(vectors([4, 4, 3, 4]))
    assert caught.value.__notes__ == [
        "headrace: in stage 1 of 2, layer '2' (Do), forward of micro-batch 2"
    ]
    with pytest.raises(RuntimeError, match="has ended"):
        pipe.train(vectors())
    assert set(pipe.state_dict()) == set(model.state_dict())
    pipe.close()
    _end(weakref.ref(pipe))  # at exit: without a second traceback


def test_at_exit_an_open_pipeline_is_drained() -> None:
    pipe = pipeline(2, slack=2)
    pipe.train(batches_of(20, 4))
    assert pipe.version == 2
    _end(weakref.ref(pipe))
    assert pipe.version == 5


def test_a_pipeline_that_is_let_go_of_frees_its_memory() -> None:
    pipe = pipeline(2)
    pipe.train(batches_of(20, 4))
    reference = weakref.ref(pipe)
    del pipe
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("stages", STAGES)
def test_data_that_are_not_finite_stop_the_run(stages: int, frozen: bool) -> None:
    """Even where the first stage learns nothing, so that no gradient of its own could tell."""
    model = nn.Sequential(*linears(5, 4, 4, 3)).double()
    model[0].requires_grad_(not frozen)
    data = vectors([4] * 12)
    data[5][0][2, 3] = math.nan
    pipe = pipeline(stages, model, balance={1: [6], 2: [2, 4], 3: [2, 2, 2]}[stages])
    match = rf"stage 0 of {stages}, micro-batch 5: its input is not finite: look at the data"
    with pytest.raises(FloatingPointError, match=match):
        pipe.train(data)


def test_an_overflow_between_frozen_layers_is_found_where_it_is() -> None:
    """The loss stays finite here: the last stage saturates."""
    model = nn.Sequential(
        nn.Linear(5, 4).requires_grad_(False), Do(lambda x: x / 0), nn.Linear(4, 4), nn.Sigmoid(),
        Do(lambda x: x.nan_to_num(0.5)), nn.Linear(4, 3),
    ).double()  # fmt: skip
    pipe = pipeline(3, model, balance=[2, 2, 2])
    match = r"stage 0 of 3, micro-batch 0: the output of layer '1' \(Do\) is not finite, its input"
    with pytest.raises(FloatingPointError, match=match):
        pipe.train(vectors([4] * 12))


def test_skipping_counts_and_leaves_the_weights() -> None:
    data = batches_of(48, 4)
    data[3][1][0] = math.inf
    pipe = pipeline(3, on_nonfinite="skip")
    pipe.train(data)
    rows = pipe.statistics()
    assert [row.skipped for row in rows] == [1, 1, 1]
    assert [row.updates for row in rows] == [12, 12, 12]
    assert all(t.isfinite().all() for t in pipe.state_dict().values())
