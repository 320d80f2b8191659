"""What the micro-batches of one update tell of the gradients of their samples."""

import math
from typing import NamedTuple

__all__ = ["UNKNOWN", "Sampled", "variance"]


class Sampled(NamedTuple):
    """Two sums over weights, for one update of a sample S; NaN is unknown.

    Args:
        variance: ‖Var_{i∈S} ∇l_i‖₁, of single samples' gradients.
        squared_norm: ‖∇J_S‖², of the update's own gradient, before it is clipped.
    """

    variance: float
    squared_norm: float


UNKNOWN = Sampled(math.nan, math.nan)


def variance(squares: float, weight: float, squared_mean: float, micro_batches: int) -> float:
    """‖Var_{i∈S} ∇l_i‖₁ from the micro-batches' mean gradients m_k, of b_k samples each.

    m_k has the b_k-th part of a single sample's variance, so Σ b_k (m_k - g)² / (K - 1) estimates
    that without bias, however the sizes differ; and Σ b_k (m_k - g)² = Σ b_k m_k² - |S| g².

    Args:
        squares: Σ b_k ‖m_k‖². weight: |S| = Σ b_k. squared_mean: ‖g‖², g = Σ b_k m_k / |S|.
        micro_batches: K.

    Returns:
        NaN for one micro-batch, which tells nothing.
    """
    if micro_batches < 2:
        return math.nan
    return max(0.0, squares - weight * squared_mean) / (micro_batches - 1)
