"""HOGWILD!'s figures, against hypergraphs worked out by hand and against their definition."""

from itertools import combinations

import pytest
import torch
from torch import Tensor

from headrace.launch.studies.sparsity import Sparsity, sparsity


def by_definition(edges: list[set[int]]) -> Sparsity:
    count = len(edges)
    delta = max(sum(v in e for e in edges) for v in set().union(*edges))
    rho = max(sum(bool(e & other) for other in edges) for e in edges)
    return Sparsity(max(map(len, edges)), delta / count, rho / count)


def rows(*edges: list[int]) -> list[Tensor]:
    return [torch.tensor(edge, dtype=torch.int64) for edge in edges]


@pytest.mark.parametrize(
    ("edges", "expected"),
    [
        (rows([3]), Sparsity(1, 1.0, 1.0)),
        (rows([0, 1], [2, 3], [4, 5], [6, 7]), Sparsity(2, 1 / 4, 1 / 4)),
        # A chain: the inner edges meet both neighbours and themselves.
        (rows([0, 1], [1, 2], [2, 3], [3, 4], [4, 5]), Sparsity(2, 2 / 5, 3 / 5)),
        # A star: all meet in 9; numbers may be far apart.
        (rows([9, 10**12], [9, 5], [9, 7, 8]), Sparsity(3, 1.0, 1.0)),
        # The first meets all but the last, though no weight is in more than two edges.
        (rows([0, 1, 2], [0], [1], [2], [3]), Sparsity(3, 2 / 5, 4 / 5)),
        # [0, 1] and [0, 1, 2] share two weights and are one meeting; the two 3s are one weight.
        (rows([0, 1], [0, 1, 2], [3, 3], [4], []), Sparsity(3, 2 / 5, 2 / 5)),
    ],
)
def test_hypergraphs_worked_out_by_hand(edges: list[Tensor], expected: Sparsity) -> None:
    assert sparsity(edges) == expected


def test_all_pairs_of_five() -> None:
    edges = torch.tensor(list(combinations(range(5), 2)))  # each meets all but the 3 of the rest
    assert sparsity(edges) == Sparsity(2, 4 / 10, 7 / 10)


@pytest.mark.parametrize("seed", range(5))
def test_random_hypergraphs_have_the_figures_of_the_definition(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    popularity = torch.arange(1, 61) ** -0.8
    edges = popularity.expand(150, 60).multinomial(4, replacement=True, generator=generator)
    assert sparsity(edges) == by_definition([set(edge) for edge in edges.tolist()])


def test_where_few_edges_are_tried_rho_is_a_lower_bound() -> None:
    # The first three could meet 4 edges each: the first two meet each other, [2, 3] meets 3.
    edges = rows([0, 1], [0, 1], [2, 3], [2], [3], [4])
    assert sparsity(edges) == Sparsity(2, 2 / 6, 3 / 6)
    assert sparsity(edges, sample=2) == Sparsity(2, 2 / 6, 2 / 6, exact=False)


@pytest.mark.parametrize(
    ("edges", "sample", "error", "message"),
    [
        ([], 1, ValueError, "there is no index"),
        (rows([], []), 1, ValueError, "there is no index"),
        (torch.tensor([1, 2]), 1, ValueError, r"edges\[0\] has shape \(\): give rows"),
        (torch.ones(2, 3), 1, TypeError, r"edges\[0\] is torch.float32: give whole numbers"),
        (rows([1]), 0, ValueError, "sample=0: give a whole number"),
    ],
)
def test_what_is_no_hypergraph_is_refused(
    edges: list[Tensor] | Tensor, sample: int, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        sparsity(edges, sample)
