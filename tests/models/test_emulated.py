"""Emulated layers take their time and have true gradients."""

import time
from importlib import import_module

import pytest
import torch

from headrace.models import EmulatedLayer, emulated


class Clock:
    """The module's `time`: a sleep ends 0.1 ms late, and nothing else takes any time."""

    late = 1e-4

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds + self.late


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    module = import_module("headrace.models.emulated")  # the name in the package is the function
    monkeypatch.setattr(module, "time", made)
    monkeypatch.setattr(module, "_late", 0.0)
    return made


def test_forward_and_backward_take_the_given_time(clock: Clock) -> None:
    output = emulated(layers=3, forward_ms=10, backward_ms=20)(torch.randn(2, 8))
    assert clock.now == pytest.approx(3 * 0.010 + clock.late)
    output.sum().backward()  # the input needs no gradient, the first layer's weight does
    assert clock.now == pytest.approx(3 * 0.030 + clock.late)


def test_over_many_layers_the_times_are_as_given(clock: Clock) -> None:
    """A sleep ends 0.1 ms late and more: the next one makes up for it."""
    with torch.no_grad():
        emulated(layers=100, forward_ms=2, backward_ms=0)(torch.randn(2, 8))
    assert clock.now == pytest.approx(0.2 + clock.late)


def test_what_happens_between_layers_is_not_taken_off(clock: Clock) -> None:
    layer, x = EmulatedLayer(forward_ms=5, backward_ms=0, width=8), torch.randn(2, 8)
    layer(x)
    clock.now += 0.05
    layer(x)
    assert clock.now == pytest.approx(0.05 + 2 * 0.005 + clock.late)


def test_times_are_in_proportion_to_the_samples_where_told(clock: Clock) -> None:
    layer = EmulatedLayer(forward_ms=100, backward_ms=0, width=8, samples=10)
    layer(torch.randn(2, 8))
    assert clock.now == pytest.approx(0.02 + clock.late)
    layer(torch.randn(20, 8))
    assert clock.now == pytest.approx(0.22 + clock.late)
    with pytest.raises(ValueError, match="samples=0"):
        EmulatedLayer(1, 1, 1, samples=0)
    assert "samples=10" in repr(layer) and "samples" not in repr(EmulatedLayer(1, 1, 1))


def test_sleeping_uses_no_processor_time() -> None:
    model, x = emulated(layers=2, forward_ms=50, backward_ms=100), torch.randn(2, 8)
    model(x).sum().backward()  # the first backward starts torch's threads
    start = time.process_time()
    model(x).sum().backward()
    assert time.process_time() - start < 0.1  # of 0.3 s


def test_evaluation_sleeps_forward_too(clock: Clock) -> None:
    with torch.no_grad():
        emulated(layers=1, forward_ms=10).eval()(torch.randn(2, 8))
    assert clock.now == pytest.approx(0.010 + clock.late)


def test_it_is_the_clock_that_sleeps() -> None:
    """Late ends of others before may be made up for in it, but not by more than there were."""
    model = emulated(layers=1, forward_ms=500)
    start = time.perf_counter()
    model(torch.randn(2, 8))
    assert time.perf_counter() - start > 0.1


def test_gradients_are_those_of_the_product() -> None:
    torch.manual_seed(0)
    layer = EmulatedLayer(forward_ms=0, backward_ms=0, width=3).double()
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.equal(layer.weight, torch.ones(3, dtype=torch.float64))
    assert torch.autograd.gradcheck(layer, (x,))
    layer(x).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, (2 * x * x).sum(0).detach())


def test_a_pace_is_kept_forward_and_backward_over_and_over(clock: Clock) -> None:
    layer = EmulatedLayer(forward_ms=10, backward_ms=20, width=8, pace=[1, 0, 3])
    x = torch.randn(2, 8)
    outputs, forward, backward = [], [], []
    for _ in range(4):
        start = clock.now
        outputs.append(layer(x).sum())
        forward.append(clock.now - start)
    for output in outputs:
        start = clock.now
        output.backward()
        backward.append(clock.now - start)
    for seconds, unit in ((forward, 0.01), (backward, 0.02)):
        assert seconds == pytest.approx([unit * factor for factor in (1, 0, 3, 1)], abs=2e-4)
    layer.eval()
    start = clock.now
    layer(x)
    assert clock.now - start == pytest.approx(0.01, abs=2e-4), "evaluation is at its own pace"


def test_one_of_several_is_slowed() -> None:
    model = emulated(layers=3, slowed=1, pace=[1, 5])
    assert [layer.pace for layer in model] == [(), (1, 5), ()]
    with pytest.raises(ValueError, match="slowed=3: give a layer from 0 to 2"):
        emulated(layers=3, slowed=3)
    with pytest.raises(ValueError, match=r"pace=\[-1\]: give factors, 0 or more"):
        emulated(layers=1, slowed=0, pace=[-1])
