"""What a stage asks of its rule; each stage owns a copy, so a rule may keep state."""

from typing import TYPE_CHECKING

from ..versions import Version

if TYPE_CHECKING:
    from ..schedule import Schedule
    from ..stage import Stage

__all__ = ["Rule"]


class Rule:
    """The rule of plain back-propagation; the others override what they do otherwise."""

    recomputes = False
    """Keep a micro-batch's input only, and run its forward again when its gradient is there."""

    def check(self, schedule: "Schedule", stages: int) -> None:
        """Refuse a schedule under which this rule cannot be right.

        Raises:
            ValueError: with the reason and what to write instead.
        """

    @property
    def copies(self) -> int:
        """Copies of the weights that it keeps."""
        return 0

    def attach(self, stage: "Stage") -> None:
        """Look at the stage that this copy of the rule belongs to, once it is built."""

    def weights(self, stage: "Stage", index: int) -> Version | None:
        """The weights for the forward of micro-batch `index`; None: the stage's own, live."""
        return None

    def before_update(self, stage: "Stage") -> None:
        """Take a last look before the optimizer moves the weights."""
