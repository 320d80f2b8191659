"""What a stage asks of its rule; each stage owns a copy, so a rule may keep state."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..report import Figures
from ..stateful import Stateful
from ..versions import Version

if TYPE_CHECKING:
    from ..schedule import Schedule
    from ..stage import Flight, Stage

__all__ = ["Rule"]


class Rule(Stateful):
    """The rule of plain back-propagation; the others override what they do otherwise.

    What training changes of it is named in `state`, for checkpoints.
    """

    recomputes = False
    """Keep a micro-batch's input only, and run its forward again when its gradient is there."""

    keeps_weights = False
    """Keep the weights that a micro-batch's forward ran with until its backward."""

    looks_ahead = False
    """Run forwards with the weights that a correction predicts."""

    reads_newest = False
    """Run backwards through the old activations with the newest weights."""

    ahead: int | None = None
    """Micro-batches sent on at most of which nothing has come back yet, for a stage that does not
    wait for gradients but has a `guess`; None: it waits for each."""

    eager = False
    """With `ahead`: take in what came back as it comes, and not always `ahead` later."""

    wants_gradients = True
    """Whether the stage after is to send gradients back."""

    synthesizes_inputs = False
    """Whether stages run on guessed inputs, and need not wait for the stage before."""

    def check(self, schedule: "Schedule", stages: int) -> None:
        """Refuse a schedule under which this rule cannot be right.

        Raises:
            ValueError: with the reason and what to write instead.
        """

    @property
    def kind(self) -> str:
        """What it is, in a word: rules of one kind have the same state."""
        return type(self).__name__

    @property
    def copies(self) -> int:
        """Copies of the weights that it keeps."""
        return 0

    @property
    def figures(self) -> Figures:
        """What it tells of its own learning."""
        return Figures()

    def attach(self, stage: "Stage") -> None:
        """Look at the stage that this copy of the rule belongs to, once it is built."""

    def weights(self, stage: "Stage", index: int) -> Version | None:
        """The weights for the forward of micro-batch `index`; None: the stage's own, live."""
        return None

    def moves(self) -> bool:
        """Whether the micro-batch that was just run forward is to move the weights at all."""
        return True

    def guess(self, stage: "Stage", flight: "Flight") -> Sequence[Tensor | None]:
        """A gradient for each tensor of a micro-batch's output, to go back with at once."""
        raise NotImplementedError

    def arrive(self, stage: "Stage", flight: "Flight", gradients: Sequence[Tensor | None]) -> bool:
        """Learn from the gradients that came back for a micro-batch whose weights moved long ago.

        Args:
            flight: its output and target are there still.

        Returns:
            Whether all that it learned from was finite; what was not is left out.
        """
        return True

    @property
    def knows_inputs(self) -> bool:
        """Whether a real input has been seen, where inputs are guessed."""
        return True

    def see_input(self, stage: "Stage", source: Any, x: Any) -> None:
        """Look at the first real input `x`, and the network's own of that micro-batch."""

    def guess_input(self, stage: "Stage", source: Any) -> Any:
        """The stage's input, from the network's own; with `synthesizes_inputs`."""
        raise NotImplementedError

    def arrive_input(self, stage: "Stage", source: Any, x: Any) -> bool:
        """Learn from the input that the stage before really gave; as `arrive`."""
        return True

    def before_update(self, stage: "Stage") -> None:
        """Take a last look before the optimizer moves the weights."""
