"""Synthesizers: shapes, what the target adds, the zero start, and what they refuse."""

import re
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from headrace.pipeline.synthesizers import (
    MLP,
    Condition,
    Convolution,
    Linear,
    Sequence,
    choose,
    start_at_zero,
)

LABELS, NUMBERS = Condition(classes=5), Condition(features=3)


def size(*numbers: int) -> torch.Size:
    return torch.Size(numbers)


KINDS: dict[str, tuple[Any, torch.Size]] = {
    "linear, vectors": (Linear, size(7)),
    "linear, positions": (Linear, size(6, 7)),
    "linear, flattened": (Linear, size(2, 3, 4)),
    "mlp, vectors": (MLP, size(7)),
    "mlp, positions": (MLP, size(6, 7)),
    "mlp, flattened": (MLP, size(2, 3, 4)),
    "convolution, 1-d": (Convolution, size(3, 9)),
    "convolution, 2-d": (Convolution, size(3, 9, 8)),
    "convolution, 3-d": (Convolution, size(2, 4, 5, 6)),
    "sequence": (Sequence, size(6, 7)),
}


@pytest.mark.parametrize("told", ["nothing", "labels", "numbers"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_shape_stays_and_the_first_guess_is_zero(kind: str, told: str) -> None:
    make, shape = KINDS[kind]
    torch.manual_seed(0)
    condition = {"nothing": None, "labels": LABELS, "numbers": NUMBERS}[told]
    target = {
        "nothing": None,
        "labels": torch.tensor([0, 4, 2, 2]),
        "numbers": torch.randn(4, 3),
    }[told]
    network, x = make(shape, shape, condition), torch.randn(4, *shape)
    assert network(x, target).shape == x.shape
    assert network(x, target).abs().sum() > 0
    start_at_zero(network)
    assert torch.equal(network(x, target), torch.zeros_like(x))
    # One step, and it is not zero any more: something can be learned from there.
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    (network(x, target) - 1).square().sum().backward()
    optimizer.step()
    assert network(x, target).abs().sum() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_target_matters(kind: str) -> None:
    make, shape = KINDS[kind]
    torch.manual_seed(0)
    network, x = make(shape, shape, LABELS), torch.randn(1, *shape)
    outputs = [network(x, torch.tensor([label])) for label in range(5)]
    assert all(not torch.allclose(a, b) for a, b in pairwise(outputs))
    unknown = network(x, torch.tensor([-1]))
    assert torch.equal(unknown, network(x, torch.tensor([-100]))), "negative: no label"
    assert torch.equal(unknown, network(x, None))


def test_labels_are_a_one_hot_code_appended() -> None:
    torch.manual_seed(0)
    network, x = Linear(size(7), size(4), LABELS), torch.randn(6, 7)
    labels = torch.randint(0, 5, (6,))
    joint, told = network.last.linear, network.last.conditioned
    assert told is not None
    weight = torch.cat([joint.weight, told.weight.T], dim=1)
    joined = torch.cat([x, functional.one_hot(labels, 5).float()], dim=1)
    torch.testing.assert_close(network(x, labels), joined @ weight.T + joint.bias)


def test_next_tokens_are_told_position_by_position() -> None:
    torch.manual_seed(0)
    for make in (Linear, MLP, Sequence):
        network, x = make(size(6, 7), size(6, 7), LABELS), torch.randn(2, 6, 7)
        tokens = torch.randint(0, 5, (2, 6))
        other = tokens.clone()
        other[1, 3] = (other[1, 3] + 1) % 5
        changed = (network(x, tokens) != network(x, other)).any(-1)
        near = torch.zeros(2, 6, dtype=torch.bool)
        reach = 4 if make is Sequence else 0  # two layers of five positions
        # The target joins after the first layer: only the second one spreads it.
        reach //= 2
        near[1, 3 - reach : 3 + reach + 1] = True
        assert torch.equal(changed, near), make.__name__


def test_labels_of_places_in_a_map() -> None:
    torch.manual_seed(0)
    network, x = Convolution(size(3, 8, 8), size(3, 8, 8), LABELS), torch.randn(2, 3, 8, 8)
    places = torch.randint(0, 5, (2, 8, 8))
    assert network(x, places).shape == x.shape
    assert not torch.allclose(network(x, places), network(x, (places + 1) % 5))


@pytest.mark.parametrize("make", [Linear, MLP, Sequence])
def test_sequences_may_change_their_length(make: Any) -> None:
    network = make(size(6, 7), size(6, 7))
    assert network(torch.randn(2, 11, 7)).shape == (2, 11, 7)


def test_an_input_may_have_another_shape() -> None:
    assert Linear(size(8, 8), size(5))(torch.randn(2, 8, 8)).shape == (2, 5)
    assert MLP(size(1, 8, 8), size(5, 4, 4))(torch.randn(2, 1, 8, 8)).shape == (2, 5, 4, 4)
    bigger, smaller = size(5, 16, 16), size(5, 4, 4)
    for wanted in (bigger, smaller):
        image = torch.randn(2, 1, 8, 8)
        assert Convolution(size(1, 8, 8), wanted)(image).shape == (2, *wanted)
    tokens = torch.randint(0, 30, (2, 9))
    assert Sequence(size(9), size(9, 7), vocabulary=30)(tokens).shape == (2, 9, 7)


def test_what_is_chosen() -> None:
    found = {
        kind: type(choose(shape, shape, told)).__name__
        for kind, shape, told in (
            ("vector", size(7), None),
            ("vector, told", size(7), LABELS),
            ("sequence", size(6, 7), None),
            ("sequence, told", size(6, 7), LABELS),
            ("map", size(3, 8, 8), None),
            ("map, told", size(3, 8, 8), LABELS),
        )
    }
    assert found == {
        "vector": "MLP",
        "vector, told": "Linear",
        "sequence": "Sequence",
        "sequence, told": "Sequence",
        "map": "Convolution",
        "map, told": "Convolution",
    }
    assert type(choose(size(1, 8, 8), size(64), None)) is MLP
    assert type(choose(size(6, 7), size(6, 9), None)) is Sequence


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: MLP(size(7), size(7), width=0), "width=0: give a whole number >= 1"),
        (lambda: MLP(size(7), size(7), hidden=0), "hidden=0: give a whole number >= 1"),
        (
            lambda: Linear(size(128, 16, 16), size(128, 16, 16)),
            "a linear synthesizer layer of 32768 x 32768 weights: write synthesizer convolution",
        ),
        (
            lambda: Convolution(size(7), size(7)),
            "a convolutional synthesizer from (7,) to (7,): both must be (channels, places …)",
        ),
        (lambda: Convolution(size(3, 8, 8), size(3, 8, 8), kernel=4), "kernel=4: give an odd one"),
        (
            lambda: Sequence(size(7), size(7)),
            "a synthesizer of sequences from (7,) to (7,): it takes (positions, features)",
        ),
        (lambda: Sequence(size(6, 7), size(6, 7), hidden=-1), "hidden=-1"),
    ],
)
def test_refused(make: Any, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        make()


def test_conditions() -> None:
    assert Condition.of(torch.randn(4, 2, 3), None, size(4, 7)) == Condition(features=6)
    assert Condition.of(torch.tensor([0, 4]), 5, size(2, 7)) == LABELS
    for target, classes, says in (
        (torch.tensor([0, 4]), None, "needs the number of classes: write classes=5"),
        (torch.tensor([0, 5]), 5, "classes=5, but there is a label 5"),
        (torch.randn(4, 3), 5, "classes=5, but the target is torch.float32"),
    ):
        with pytest.raises(ValueError, match=re.escape(says)):
            Condition.of(target, classes, size(len(target), 7))
    with pytest.raises(TypeError, match="one tensor, not a tuple: leave it out"):
        Condition.of((torch.zeros(2), torch.zeros(2)), None, size(2, 7))


def test_one_of_ones_own_starts_as_it_was_made() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
            y: Tensor = self.layer(x)
            return y

    own = Own()
    before = own.layer.weight.clone()
    start_at_zero(own)
    assert torch.equal(own.layer.weight, before)
