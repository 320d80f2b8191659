"""Corrections: what is done about a gradient's staleness. One a file, in the order given."""

from .asynchronous_nesterov import AsynchronousNesterov
from .auto import Auto
from .basis_rotation import BasisRotation
from .correction import Correction, correct
from .delay_compensation import DelayCompensation
from .gap_aware import GapAware
from .learning_rate import LearningRate
from .pipemare_t1 import PipeMareT1
from .pipemare_t2 import PipeMareT2
from .spike_compensation import SpikeCompensation
from .synchronous_warm_up import SynchronousWarmUp
from .two_versions import TwoVersions
from .weight_prediction import WeightPrediction

__all__ = [
    "AsynchronousNesterov",
    "Auto",
    "BasisRotation",
    "Correction",
    "DelayCompensation",
    "GapAware",
    "LearningRate",
    "PipeMareT1",
    "PipeMareT2",
    "SpikeCompensation",
    "SynchronousWarmUp",
    "TwoVersions",
    "WeightPrediction",
    "correct",
]
