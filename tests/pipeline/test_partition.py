"""The cut is the best there is, and what cannot be cut is refused with the way out."""

import itertools
import math
import random
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headrace.pipeline import LayerCost, Partition
from headrace.pipeline.partition import check_model, count, cut, partition


def costliest(costs: Sequence[float], sizes: Sequence[int]) -> float:
    ends = list(itertools.accumulate(sizes))
    return max(math.fsum(costs[e - s : e]) for e, s in zip(ends, sizes, strict=True))


def every_cut(layers: int, stages: int) -> list[tuple[int, ...]]:
    return [
        tuple(b - a for a, b in itertools.pairwise((0, *bounds, layers)))
        for bounds in itertools.combinations(range(1, layers), stages - 1)
    ]


def test_the_cut_is_the_best_of_all() -> None:
    dice = random.Random(0)
    for _ in range(200):
        layers = dice.randint(1, 10)
        stages = dice.randint(1, layers)
        kind = dice.randrange(3)
        costs = [
            (dice.random(), dice.randint(0, 3), 10 ** (3 * dice.random()))[kind]
            for _ in range(layers)
        ]
        sizes = cut(costs, stages)
        assert len(sizes) == stages and sum(sizes) == layers and min(sizes) >= 1
        best = min(costliest(costs, other) for other in every_cut(layers, stages))
        assert costliest(costs, sizes) == pytest.approx(best, rel=1e-12), (costs, sizes)


def test_cuts_by_hand() -> None:
    assert cut([1, 1, 1, 1], 2) == (2, 2)
    assert cut([1, 1, 1, 1, 1], 2) == (2, 3)  # among equals the earlier groups are smaller
    assert cut([5, 1, 1, 1, 1, 1], 2) == (1, 5)
    assert cut([1, 2, 3, 4, 5], 3) == (3, 1, 1)
    assert cut([2, 1, 1, 4], 4) == (1, 1, 1, 1)
    # Greedy filling up to the mean (10 / 2 = 5) would end at (1, 2): 4 | 1 + 5.
    assert cut([4, 1, 5], 2) == (2, 1)


def net() -> nn.Sequential:
    layers: dict[str, nn.Module] = {
        "in": nn.Linear(4, 100),
        "act": nn.ReLU(),
        "mid": nn.Linear(100, 4),
        "norm": nn.BatchNorm1d(4),
        "out": nn.Linear(4, 2),
    }
    return nn.Sequential(OrderedDict(layers))


def sizes_of(stages: int, balance: Any, model: nn.Sequential | None = None) -> tuple[int, ...]:
    model = model or net()
    return partition(model, stages, balance, count(model)).sizes


def test_by_parameters() -> None:
    assert [layer.parameters for layer in count(net())] == [500, 0, 404, 8, 10]
    assert sizes_of(2, "parameters") == (1, 4)
    assert sizes_of(3, "parameters") == (1, 1, 3)
    # Layers without parameters are dealt out too.
    assert sizes_of(3, "parameters", nn.Sequential(*(nn.ReLU() for _ in range(6)))) == (2, 2, 2)


def test_by_counts_and_by_names() -> None:
    assert sizes_of(3, [1, 1, 3]) == (1, 1, 3)
    assert sizes_of(3, (2, 2, 1)) == (2, 2, 1)
    assert sizes_of(3, ["in", "mid", "out"]) == (2, 2, 1)
    assert sizes_of(1, ["in"]) == (5,)


def test_by_time() -> None:
    costs = [LayerCost(str(k), "X", 0, 0, f, 2 * f, 0.5 * f) for k, f in enumerate((1, 1, 1, 3))]
    model = nn.Sequential(*(nn.ReLU() for _ in costs))
    result = partition(model, 2, "time", costs)
    assert result.sizes == (3, 1)
    assert result.costs == [10.5, 10.5]
    assert result.speed_up == 2.0
    assert [[layer.name for layer in stage] for stage in result.stages] == [["0", "1", "2"], ["3"]]


@pytest.mark.parametrize(
    ("stages", "balance", "match"),
    [
        (2, [1, 3], r"balance=\[1, 3\] has 4 layers, the model has 5: give numbers >= 1 that add"),
        (2, [0, 5], r"balance=\[0, 5\] has 5 layers"),
        (3, [2, 3], r"for 3 stages: write 'time', 'parameters', the number of layers of each"),
        (3, "speed", "balance='speed' for 3 stages: write 'time', 'parameters'"),
        (3, 3, "balance=3 for 3 stages: write 'time'"),
        (2, ["in", "up"], r"names the layer 'up'; the layers are \['in', 'act', 'mid', 'norm', "),
        (2, ["act", "out"], "in order, beginning with the model's first, 'in'"),
        (3, ["in", "out", "mid"], "must name each stage's first layer in order"),
        (3, ["in", "mid", "mid"], "must name each stage's first layer in order"),
    ],
)
def test_a_balance_that_does_not_fit_is_refused(stages: int, balance: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        sizes_of(stages, balance)


def test_a_model_of_too_few_layers_is_refused() -> None:
    match = r"2 layers cannot make 3 stages.*0 \(Linear\), 1 \(ReLU\)"
    with pytest.raises(ValueError, match=match):
        check_model(nn.Sequential(nn.Linear(1, 1), nn.ReLU()), 3)
    with pytest.raises(ValueError, match="0 layers cannot make 1 stage, the layers being none"):
        check_model(nn.Sequential(), 1)
    check_model(net(), 5)


def test_a_model_that_is_no_sequential_is_refused() -> None:
    with pytest.raises(TypeError, match=r"model is a Linear: .* write the model as nn.Sequential"):
        check_model(nn.Linear(1, 1), 1)


def test_a_sequential_with_a_forward_of_its_own_is_refused() -> None:
    """Its layers one after the other are not that model."""

    class Residual(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    with pytest.raises(TypeError, match=r"a Residual with a forward\(\) of its own"):
        check_model(Residual(nn.Linear(1, 1)), 1)

    class Named(nn.Sequential):
        pass

    check_model(Named(nn.Linear(1, 1)), 1)


def test_a_lazy_layer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'0.weight' has no shape yet, its layer being lazy"):
        check_model(nn.Sequential(nn.LazyLinear(3)), 1)


def test_a_layer_that_keeps_no_tensor_is_refused() -> None:
    """It ended a training at the first save, with an AttributeError."""

    class Counting(nn.Identity):
        def __init__(self, extra: object) -> None:
            super().__init__()
            self.extra = extra

        def get_extra_state(self) -> Any:
            return self.extra

    check_model(nn.Sequential(Counting(torch.zeros(2))), 1)
    text = r"'1\.0\._extra_state' in the model's state_dict\(\) is a dict, .* give a tensor, or"
    with pytest.raises(TypeError, match=text):
        check_model(nn.Sequential(nn.Linear(1, 1), nn.Sequential(Counting({"seen": 3}))), 1)


class Table(nn.Module):
    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table)


def test_a_tensor_of_two_stages_is_refused_with_both_its_names() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    model = nn.Sequential(first, nn.ReLU(), nn.Sequential(second))
    match = r"'0.weight' \(stage 0\) and '2.0.weight' \(stage 1\) are one tensor.*balance=\[…\]"
    with pytest.raises(ValueError, match=match):
        sizes_of(2, [2, 1], model)
    assert sizes_of(1, [3], model) == (3,)

    table = torch.zeros(3)
    with pytest.raises(ValueError, match=r"'0.table' \(stage 0\) and '1.table' \(stage 1\)"):
        sizes_of(2, [1, 1], nn.Sequential(Table(table), Table(table)))


def test_a_layer_may_occur_twice() -> None:
    """`named_children` leaves the second occurrence out, and the model was another one then."""
    act, twice = nn.ReLU(), nn.Linear(4, 4)
    model = nn.Sequential(nn.Linear(4, 4), act, twice, act, twice)
    assert [layer.name for layer in count(model)] == ["0", "1", "2", "3", "4"]
    assert sizes_of(2, [2, 3], model) == (2, 3)  # a shared ReLU is nobody's weights
    with pytest.raises(ValueError, match=r"'2.weight' \(stage 0\) and '4.weight' \(stage 1\)"):
        sizes_of(2, [3, 2], model)


def test_json_round_trip() -> None:
    model = net()
    counted = partition(model, 2, "parameters", count(model))
    assert repr(Partition.from_json(counted.to_json())) == repr(counted)  # NaN is not NaN
    assert math.isnan(counted.speed_up) and all(map(math.isnan, counted.costs))
    measured = Partition((LayerCost("a.b", "Y", 3, 7, 0.1, 1 / 3, 1e-9),) * 2, (1, 1))
    assert Partition.from_json(measured.to_json()) == measured
