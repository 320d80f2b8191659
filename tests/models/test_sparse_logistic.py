"""Sparse logistic regression equals a dense one, and touches only the weights of its samples."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from headrace.models import sparse_logistic

FEATURES = 7
INDICES = torch.tensor([[0, 2, 5], [2, 6, 2]])  # feature 2 is in both samples, twice in the second
VALUES = torch.tensor([[1.0, -2.0, 0.5], [3.0, 1.0, -1.0]])
DENSE = torch.tensor([[1.0, 0, -2.0, 0, 0, 0.5, 0], [0, 0, 2.0, 0, 0, 0, 1.0]])
TARGETS = torch.tensor([1.0, 0.0])


def weight(model: nn.Sequential) -> Tensor:
    found = model.get_parameter("0.weight")
    assert isinstance(found, nn.Parameter)
    return found


def loss(model: nn.Sequential) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(model([INDICES, VALUES]), TARGETS)


def test_it_is_one_layer_that_starts_at_zero_and_has_no_bias() -> None:
    model = sparse_logistic(FEATURES)
    assert {n: p.tolist() for n, p in model.named_parameters()} == {"0.weight": [[0.0]] * FEATURES}
    assert model([INDICES, VALUES]).tolist() == [0.0, 0.0]
    assert "features=7, outputs=1" in repr(model)


@pytest.mark.parametrize("outputs", [1, 3])
def test_logits_are_those_of_a_dense_layer(outputs: int) -> None:
    torch.manual_seed(0)
    model = sparse_logistic(FEATURES, outputs)
    nn.init.normal_(weight(model))
    expected = DENSE @ weight(model)
    for pair in ((INDICES, VALUES), [INDICES, VALUES]):
        output = model(pair)
        assert output.shape == ((2,) if outputs == 1 else (2, outputs))
        torch.testing.assert_close(output, expected.view_as(output))


def test_the_gradient_is_sparse_and_that_of_dense_logistic_regression() -> None:
    torch.manual_seed(0)
    model = sparse_logistic(FEATURES)
    nn.init.normal_(weight(model))
    loss(model).backward()
    gradient = weight(model).grad
    assert gradient is not None and gradient.is_sparse
    gradient = gradient.coalesce()
    assert gradient.indices().tolist() == [[0, 2, 5, 6]]
    expected = DENSE.T @ ((DENSE @ weight(model)).sigmoid() - TARGETS[:, None]) / 2
    torch.testing.assert_close(gradient.to_dense(), expected)


class Calls(TorchDispatchMode):
    """What is called with a tensor as large as all weights, or gives one: (name, of what kind)."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.seen: list[tuple[str, list[str]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in (*args, result) if isinstance(x, Tensor) and x.dim() == 2]
        if any(x.shape[0] == self.rows and not x.is_sparse for x in tensors):
            kinds = ["sparse" if x.is_sparse else "dense" for x in args if isinstance(x, Tensor)]
            self.seen.append((func.__name__, kinds))
        return result


def test_plain_sgd_touches_only_the_rows_that_occur() -> None:
    model = sparse_logistic(FEATURES)
    first = torch.tensor([0.0, 3.0, 0.0, 5.0, 7.0, 0.0, 0.0])
    with torch.no_grad():
        weight(model).copy_(first[:, None])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    loss(model).backward()
    with Calls(FEATURES) as calls:
        optimizer.step()
    # p = 1/2 for both samples: the gradient is (-DENSE[0] + DENSE[1]) / 4.
    assert weight(model).flatten().tolist() == [0.125, 3.0, -0.5, 5.0, 7.0, 0.0625, -0.125]
    assert calls.seen == [("add_.Tensor", ["dense", "sparse"])]


@pytest.mark.parametrize("features", [0, -3, 2.5, True])
def test_features_that_cannot_be_counted_are_refused(features: int) -> None:
    with pytest.raises(ValueError, match=f"features={features}: give a whole number"):
        sparse_logistic(features)
    with pytest.raises(ValueError, match="outputs=0: give a whole number"):
        sparse_logistic(3, 0)


def test_an_index_beyond_the_features_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"takes value 7 which is not in the valid range"):
        sparse_logistic(FEATURES)([torch.tensor([[7]]), torch.ones(1, 1)])
