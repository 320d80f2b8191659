"""Headrace: train an nn.Sequential as a stream of micro-batches over stages, without a bubble."""

from .errors import InputError
from .partition import LayerCost, Partition
from .pipeline import Pipeline
from .report import Progress, Report, StageStatistics

__all__ = [
    "InputError",
    "LayerCost",
    "Partition",
    "Pipeline",
    "Progress",
    "Report",
    "StageStatistics",
]
