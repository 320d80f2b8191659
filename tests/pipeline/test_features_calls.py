"""The calls of a pipeline, one after the other: what each gives, drains, and leaves as it was."""

import copy
import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from headrace.pipeline import InputError, Pipeline, Progress, StageStatistics
from headrace.pipeline.pipeline import _end
from headrace.pipeline.rules import Delayed

from .helpers import SIZES, assert_same, batches_of, clone, momentum, tanh_net
from .odd_models import ODD, Do, linears, vectors
from .reads import count_reads

STAGES = [1, 2, 3]
MSE = nn.MSELoss()


def pipeline(stages: int, model: nn.Sequential | None = None, **more: Any) -> Pipeline:
    model = model or tanh_net()
    balance = SIZES[stages] if len(model) == 16 else None
    options = {"balance": balance or "time", "device": "cpu", **more}
    return Pipeline(model, MSE, momentum, stages=stages, **options)


# Weights in and out -----------------------------------------------------------------------------


@pytest.mark.parametrize("stages", STAGES)
def test_state_dict_is_the_users_own(stages: int) -> None:
    model, data = tanh_net(), batches_of(40, 4)
    pipe = pipeline(stages, model)
    pipe.train(data)
    state = pipe.state_dict()
    assert list(state) == list(model.state_dict())
    assert_same(state, model.state_dict())  # in one process the model itself is trained
    other = tanh_net(seed=1)
    other.load_state_dict(state)
    x = data[0][0]
    assert torch.equal(other(x), leaf(pipe.predict([x])))
    before = clone(state)
    pipe.train(data)
    assert_same(state, before)  # copies


def leaf(nest: Any) -> Tensor:
    assert isinstance(nest, Tensor)
    return nest


@pytest.mark.parametrize("rule", ["stash", "replay", "predict", "current"])
@pytest.mark.parametrize("stages", STAGES)
def test_load_state_dict_in_the_middle_of_a_stream(stages: int, rule: str) -> None:
    """Nothing of the old weights is left: as if they had been there from the beginning."""
    data, new = batches_of(40, 4), clone(tanh_net(seed=9).state_dict())

    def plain_sgd(params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.05)

    states = []
    for began_with in (0, 9):
        pipe = Pipeline(
            tanh_net(began_with), MSE, plain_sgd, stages=stages, balance=SIZES[stages],
            rule=Delayed(rule), device="cpu",
        )  # fmt: skip
        if began_with == 0:
            pipe.train(data)
            pipe.load_state_dict(new)
        assert_same(pipe.state_dict(), new)
        pipe.train(data)
        states.append(pipe.state_dict())
    assert_same(*states)


def test_weights_that_do_not_fit_are_refused() -> None:
    pipe = pipeline(2)
    state = pipe.state_dict()
    state["99.weight"] = state.pop("0.bias")
    with pytest.raises(RuntimeError, match=r"missing \['0.bias'\], unknown \['99.weight'\]"):
        pipe.load_state_dict(state)


def test_weights_before_the_cut() -> None:
    """balance='time' knows no stages yet: the weights are the model's."""
    pipe = pipeline(2, balance="time")
    new = clone(tanh_net(seed=4).state_dict())
    pipe.load_state_dict(new)
    assert_same(pipe.state_dict(), new)
    assert pipe.partition is None and pipe.version == 0
    for call in (pipe.named_parameters, pipe.statistics):
        with pytest.raises(RuntimeError, match=r"call prepare\(loader\) first"):
            call()
    pipe.drain()
    pipe.prepare(batches_of(8, 4))
    assert_same(pipe.state_dict(), new)


def test_meta_layers_have_no_weights_before_the_cut() -> None:
    """Loaded ones would have been lost without a word."""
    model = nn.Sequential(nn.Linear(5, 4, device="meta"), nn.Linear(4, 3, device="meta"))
    pipe = pipeline(2, model)
    state = {"0.weight": torch.ones(4, 5), "0.bias": torch.ones(4)}
    state |= {"1.weight": torch.ones(3, 4), "1.bias": torch.ones(3)}
    for call in (pipe.state_dict, lambda: pipe.load_state_dict(state)):
        with pytest.raises(RuntimeError, match=r"call prepare\(loader\) first"):
            call()
    pipe.prepare([(torch.ones(2, 5), torch.ones(2, 3))])
    pipe.load_state_dict(state)
    assert_same(pipe.state_dict(), state)


def test_meta_layers_are_the_same_for_every_number_of_stages() -> None:
    def made(stages: int, seed: int) -> dict[str, Tensor]:
        layers = [nn.Linear(4, 4, device="meta"), nn.BatchNorm1d(4, device="meta"), nn.Tanh()]
        model = nn.Sequential(nn.Linear(5, 4), *copy.deepcopy(layers), *copy.deepcopy(layers))
        for parameter in model[0].parameters():
            nn.init.ones_(parameter)
        torch.rand(stages)  # the global random state has no say
        return pipeline(stages, model, balance="parameters", seed=seed).state_dict()

    one = made(1, 3)
    assert not any(t.is_meta for t in one.values())
    for stages in (2, 3):
        assert_same(made(stages, 3), one)
    assert not torch.equal(made(1, 4)["1.weight"], one["1.weight"])
    assert not torch.equal(one["1.weight"], one["4.weight"])


def test_named_parameters_are_the_live_ones() -> None:
    pipe = pipeline(3)
    pipe.train(batches_of(40, 4))
    named = dict(pipe.named_parameters())
    assert list(named) == [name for name, _ in tanh_net().named_parameters()]
    with torch.no_grad():
        named["0.weight"].fill_(0.5)
    assert set(pipe.state_dict()["0.weight"].flatten().tolist()) == {0.5}


# Evaluation and prediction ----------------------------------------------------------------------


def hits(output: Tensor, target: Tensor) -> Tensor:
    return (output.argmax(1) == target.argmax(1)).double().mean()


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("stages", STAGES)
def test_evaluate_is_the_mean_over_samples(stages: int, micro_batches: int) -> None:
    model = nn.Sequential(*linears(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    model.double()
    data = vectors([8, 8, 5, 1])
    pipe = pipeline(stages, model, micro_batches=micro_batches)
    pipe.train(data[:2])
    metrics: dict[str, Callable[[Any, Any], Any]] = {"accuracy": hits, "one": lambda o, t: 1}
    got = pipe.evaluate(data, metrics)
    model.eval()
    with torch.no_grad():
        output = torch.cat([model(x) for x, _ in data])
    target = torch.cat([y for _, y in data])
    assert list(got) == ["loss", "accuracy", "one"]
    assert got["loss"] == pytest.approx(MSE(output, target).item(), rel=1e-12)
    assert got["accuracy"] == pytest.approx(hits(output, target).item(), rel=1e-12)
    assert got["one"] == 1.0


def test_a_metric_that_is_no_single_number_is_named() -> None:
    def by_sample(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).abs().sum(1)

    with pytest.raises(InputError, match=r"the metric 'error' gave float64\[4\]: it must give one"):
        pipeline(2).evaluate(batches_of(4, 4), {"error": by_sample})


def test_a_loss_with_weights_of_its_own_is_refused() -> None:
    """No stage's optimizer would ever be told of them."""

    class Centres(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.centres = nn.Parameter(torch.zeros(3))

        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            return (output - self.centres).square().mean()

    model = nn.Sequential(nn.Linear(5, 3))
    with pytest.raises(ValueError, match=r"loss_fn=.*Centres has weights of its own"):
        Pipeline(model, Centres(), momentum)
    Pipeline(model, Centres().requires_grad_(False), momentum, device="cpu")


@pytest.mark.parametrize("stages", STAGES)
def test_evaluate_and_predict_leave_training_alone(stages: int) -> None:
    """They drain; but for that the weights are those of a run that only drains."""
    data = batches_of(60, 4)
    states = []
    for looks in (False, True):
        torch.manual_seed(0)
        pipe = pipeline(stages)
        for part in (data[:7], data[7:]):
            pipe.train(part)
            if looks:
                pipe.evaluate(data[:2])
                pipe.predict(data[:2])
            else:
                pipe.drain()
        pipe.close()
        states.append(pipe.state_dict())
        assert pipe.version == 15
    assert_same(*states)


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("stages", STAGES)
def test_predict_gives_all_outputs_in_order(stages: int, micro_batches: int) -> None:
    model = nn.Sequential(
        Do(lambda x: x * 2), Do(lambda x: {"y": (x, x[:, 0].long())}), nn.Identity()
    )
    pipe = pipeline(stages, model, balance="parameters", micro_batches=micro_batches)
    inputs = torch.arange(22.0).view(11, 2)
    pieces = [inputs[:4], inputs[4:8], inputs[8:]]
    nest: Any = pipe.predict(pieces)
    assert torch.equal(nest["y"][0], inputs * 2)
    assert torch.equal(nest["y"][1], inputs[:, 0].long() * 2)
    pairs = [(piece, torch.zeros(len(piece))) for piece in pieces]
    again: Any = pipe.predict(pairs)
    assert torch.equal(again["y"][0], nest["y"][0]) and not again["y"][0].requires_grad
    loader: DataLoader[Any] = DataLoader(TensorDataset(inputs), batch_size=4)
    nest = pipe.predict(loader)
    assert torch.equal(nest["y"][0], inputs * 2)


def test_predict_of_unlike_lengths_says_why_it_cannot_be_joined() -> None:
    pipe = pipeline(2, nn.Sequential(nn.Identity(), nn.Identity()), balance=[1, 1])
    with pytest.raises(InputError, match=r"float32\[2, 3\] and float32\[2, 5\]"):
        pipe.predict([torch.zeros(2, 3), torch.zeros(2, 5)])


def test_predict_may_come_first() -> None:
    """Inputs alone are enough to measure; the loss was once asked about a target of None."""
    model = nn.Sequential(*linears(5, 4), nn.Linear(4, 3)).double()
    pipe = pipeline(2, model)
    inputs = [x for x, _ in vectors()]
    expected = torch.cat([model(x) for x in inputs])
    assert torch.equal(leaf(pipe.predict(inputs)), expected)
    pipe.train(vectors())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "mode"])
@pytest.mark.parametrize("rule", ["stash", "replay"])
def test_a_callers_no_grad_stops_no_training(rule: str, context: Any) -> None:
    """`evaluate` inside no_grad is what everyone writes, and its drain must still train."""
    data = batches_of(40, 4)
    inside = pipeline(3, rule=Delayed(rule), balance="time")
    with context():
        inside.train(data[:1])  # measures and builds, too
        inside.evaluate(data[:3])
        inside.train(data[1:])
        inside.predict(data[:3])
    inside.train(data)
    assert inside.partition is not None
    outside = pipeline(3, rule=Delayed(rule), balance=inside.partition.sizes)
    outside.train(data[:1])
    outside.drain()
    outside.train(data[1:])
    outside.drain()
    outside.train(data)
    assert_same(inside.state_dict(), outside.state_dict())


def test_a_layer_that_works_in_place_in_training_only() -> None:
    """What evaluation tells of the first layer does not hold in training."""
    model = nn.Sequential(
        nn.Dropout(0.5, inplace=True),
        nn.Linear(5, 4),
        nn.Dropout(0.5, inplace=True),
        nn.Linear(4, 3),
    ).double()
    data = vectors()
    before = copy.deepcopy(data)
    pipe = pipeline(2, model, balance=[2, 2])
    pipe.evaluate(data)
    pipe.train(data)
    pipe.close()
    assert all(torch.equal(a[0], b[0]) for a, b in zip(data, before, strict=True))


# The stream and its ends ------------------------------------------------------------------------


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
        with pytest.raises(RuntimeError, match=r"has ended, by close\(\) or by an earlier error"):
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


# What is reported -------------------------------------------------------------------------------


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


# What is not finite -----------------------------------------------------------------------------


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


def test_every_odd_model_is_evaluated_and_predicted_alike() -> None:
    for name in ("lstm", "nested_data", "integers_beside_floats", "language_model"):
        found = []
        for stages in (1, 3):
            torch.manual_seed(0)
            odd = ODD[name]()
            pipe = Pipeline(
                odd.model, odd.loss_fn, momentum, stages=stages, balance=odd.balance(stages),
                device="cpu",
            )  # fmt: skip
            output: Any = pipe.predict([odd.batches[0]])
            found.append((pipe.evaluate(odd.batches)["loss"], output))
        assert found[0][0] == found[1][0]
        for a, b in zip(*(torch.utils._pytree.tree_leaves(o) for _, o in found), strict=True):
            assert torch.equal(a, b)
