"""Exact gradients: nothing is in flight when the weights move."""

from typing import TYPE_CHECKING

from .rule import Rule

if TYPE_CHECKING:
    from ..schedule import Schedule

__all__ = ["Exact"]


class Exact(Rule):
    """Plain back-propagation, as on one device: for schedules that flush, or a single stage."""

    def check(self, schedule: "Schedule", stages: int) -> None:
        if not schedule.flushes and stages > 1:
            raise ValueError(
                f"rule exact under schedule {schedule.name!r} with {stages} stages: a stream never "
                "waits for the gradients of what is in flight, so they cannot be exact; "
                "write rule=Delayed(weights='stash'), or schedule='1f1b'"
            )
