"""Batch sizes: how many samples an update has, and how that grows. One file a growth."""

from .geometric import Geometric
from .growth import Growth
from .sampled import UNKNOWN, Sampled, variance
from .steps import Steps
from .variance_test import VarianceTest

__all__ = ["UNKNOWN", "Geometric", "Growth", "Sampled", "Steps", "VarianceTest", "variance"]
