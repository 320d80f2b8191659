"""The same stage of the other replicas, as one stage knows it."""

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from ..channel import Inbox
from ..gradient import Gradient
from ..stateful import Stateful

if TYPE_CHECKING:
    from ..engine import Engine
    from ..stage import Stage
    from .server import Serves

__all__ = ["Peers", "Steps"]

Steps = Generator[Inbox, None, Any]
"""What an engine does, and yields the inbox while it waits."""


class Peers(Stateful):
    """Nobody: the stage is alone with its weights. The others override what they do otherwise."""

    @property
    def shard(self) -> "Serves | None":
        """What is served in this process, where its server lives here."""
        return None

    def timestamp(self, stage: "Stage") -> int:
        """The version of the weights that the stage holds, counted in everybody's updates."""
        return stage.version

    def ready(self, engine: "Engine") -> Steps:
        """A call of `train` begins."""
        yield from ()

    def combine(self, engine: "Engine") -> Steps:
        """Before an update: make the stage's gradient everybody's."""
        yield from ()

    def move(self, stage: "Stage", gradient: Gradient) -> None:
        """Move the weights on the gradient that was loaded into them."""
        stage.step(gradient.rate * stage.batch_factor(gradient.samples))

    def refresh(self, engine: "Engine") -> Steps:
        """After an update: take in what others did to the weights."""
        yield from ()

    def stops(self, asked: bool) -> bool:
        """Before a mini-batch of a first stage: whether training is to end here, as a SIGTERM has
        asked this replica for, or another that goes in step with it.
        """
        return asked

    def rest(self, engine: "Engine") -> Steps:
        """A call of `train` has come to its end on this stage, with micro-batches in flight."""
        yield from ()

    def settle(self, engine: "Engine") -> Steps:
        """Nothing is in flight: wait until that is so for all, and hold the weights they hold."""
        yield from ()

    def release(self, engine: "Engine") -> Steps:
        """What `settle` was for is done."""
        yield from ()

    def publish(self, engine: "Engine") -> Steps:
        """The weights were loaded anew, in all replicas alike: let whoever else has them know."""
        yield from ()

    def statistics(self, engine: "Engine") -> Steps:
        """Give the shard's figures as numbers, where one serves this stage; else none."""
        yield from ()
        return []

    def close(self) -> None:
        """Part for good."""
