"""Rules: which weights a forward uses, and which gradient moves them. One file a rule."""

from .delayed import Delayed
from .exact import Exact
from .local import Local
from .rule import Rule
from .synthetic import Synthetic

__all__ = ["Delayed", "Exact", "Local", "Rule", "Synthetic"]
