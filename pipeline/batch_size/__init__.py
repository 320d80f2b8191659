"""Batch sizes: how many samples an update has, and how that grows. One file a growth."""

from .geometric import Geometric
from .growth import Growth
from .steps import Steps
from .variance_test import VarianceTest

__all__ = ["Geometric", "Growth", "Steps", "VarianceTest"]
