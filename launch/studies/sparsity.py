"""How sparse a problem is, by the figures that HOGWILD!'s rate of convergence depends on."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Sparsity", "sparsity"]


@dataclass(frozen=True)
class Sparsity:
    """Of a hypergraph, an edge a sample over the weights it touches (Niu et al. 2011, section 2).

    Args:
        omega: the most weights that one edge has.
        delta: the largest share of the edges that have one weight in common.
        rho: the largest share of the edges that one edge meets, itself among them.
        exact: whether `rho` is; if not, it is a lower bound.
    """

    omega: int
    delta: float
    rho: float
    exact: bool = True


def sparsity(edges: Iterable[Tensor], sample: int = 1000) -> Sparsity:
    """Omega, Delta and rho of `edges`: whole numbers (N, k), or N tensors of their own length [k].

    An edge meets at most as many edges as there are in its weights' lists, all added up. Edges are
    tried for rho in descending order of that, until the next cannot meet more than the best did:
    soon, on data with a few popular weights.

    Args:
        edges: the weights' numbers, row by row; one that is there twice counts once.
        sample: how many edges to try at most; beyond it rho is a lower bound.

    Raises:
        ValueError: no edges, not one weight in them, rows of another shape, `sample` below 1.
        TypeError: numbers that are not whole.
    """
    rows = list(edges)
    if sample < 1:
        raise ValueError(f"sample={sample!r}: give a whole number of at least 1")
    for number, row in enumerate(rows):
        if row.dim() != 1:
            raise ValueError(f"edges[{number}] has shape {tuple(row.shape)}: give rows of indices")
        if row.is_floating_point() or row.is_complex():
            raise TypeError(f"edges[{number}] is {row.dtype}: give whole numbers, the indices")
    if not any(len(row) for row in rows):
        raise ValueError("edges: there is no index in them")

    # Each weight of each edge once, as the number weight · N + edge, in order: an inverted index.
    count = len(rows)
    weights = torch.unique(torch.cat(rows), return_inverse=True)[1]
    lengths = torch.tensor([len(row) for row in rows])
    pairs = torch.unique(weights * count + torch.arange(count).repeat_interleave(lengths))
    weight, edge = pairs // count, pairs % count
    popularity, size = weight.bincount(), edge.bincount(minlength=count)
    edges_of = edge.split(popularity.tolist())
    weights_of = weight[edge.argsort(stable=True)].split(size.tolist())

    bound = torch.zeros_like(size).index_add_(0, edge, popularity[weight]).clamp(max=count)
    most, exact = 0, True
    for tried, candidate in enumerate(bound.argsort(descending=True, stable=True).tolist()):
        if bound[candidate] <= most:
            break
        if tried == sample:
            exact = False
            break
        met = torch.zeros(count, dtype=torch.bool)
        for each in weights_of[candidate].tolist():
            met[edges_of[each]] = True
        most = max(most, int(met.sum()))
    return Sparsity(int(size.max()), int(popularity.max()) / count, most / count, exact)
