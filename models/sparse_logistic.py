"""Logistic regression on sparse samples: a step reads and writes only the weights they touch."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from .checks import check_positive

__all__ = ["SparseLinear", "sparse_logistic"]


def sparse_logistic(features: int, outputs: int = 1) -> nn.Sequential:
    """One `SparseLinear`, whose outputs are logits: for `nn.BCEWithLogitsLoss` and the like.

    Raises:
        ValueError: `features` or `outputs` is not a whole number above 0.
    """
    check_positive(features=features, outputs=outputs)
    return nn.Sequential(SparseLinear(features, outputs))


class SparseLinear(nn.Module):
    """Indices int64 (N, k) and values (N, k) -> sums (N,), or (N, outputs) for more than one.

    The pair, a tuple or a list, says where a sample is not zero and what it is there; an index
    given twice counts twice. `weight` (features, outputs) starts at zero. Its gradient is sparse,
    with the rows of the features that occur, so that an update by plain SGD touches no other: the
    sparse separable case of HOGWILD! (Niu et al. 2011, section 2). There is no bias, which every
    update would touch; a feature that is always 1 makes one.
    """

    def __init__(self, features: int, outputs: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(features, outputs))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, pair: Sequence[Tensor]) -> Tensor:
        indices, values = pair
        sums = functional.embedding_bag(
            indices, self.weight, mode="sum", sparse=True, per_sample_weights=values
        )
        return sums.squeeze(1)  # of one output only

    def extra_repr(self) -> str:
        return "features={}, outputs={}".format(*self.weight.shape)
