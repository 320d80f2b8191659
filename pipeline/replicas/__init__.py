"""Replicas: copies of the whole pipeline, and how they share their weights. One way a file."""

from .allreduce import Allreduce
from .downpour import Downpour
from .elastic import Elastic
from .hogwild import Hogwild
from .replicas import Replicas

__all__ = ["Allreduce", "Downpour", "Elastic", "Hogwild", "Replicas"]
