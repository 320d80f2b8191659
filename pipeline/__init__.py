"""Headrace: train an nn.Sequential as a stream of micro-batches over stages, without a bubble."""

from .errors import InputError
from .link import Link
from .partition import LayerCost, Partition
from .pipeline import Pipeline
from .report import Progress, Report, StageStatistics
from .timeline import Timeline

__all__ = [
    "InputError",
    "LayerCost",
    "Link",
    "Partition",
    "Pipeline",
    "Progress",
    "Report",
    "StageStatistics",
    "Timeline",
]
