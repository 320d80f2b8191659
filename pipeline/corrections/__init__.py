"""Corrections: what is done about a gradient's staleness. One a file, in the order given."""

from .correction import Correction, correct
from .delay_compensation import DelayCompensation
from .learning_rate import LearningRate

__all__ = ["Correction", "DelayCompensation", "LearningRate", "correct"]
