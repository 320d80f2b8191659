"""Rules: which weights a forward uses, and which gradient moves them. One file a rule."""

from .delayed import Delayed
from .exact import Exact
from .rule import Rule

__all__ = ["Delayed", "Exact", "Rule"]
