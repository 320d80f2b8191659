"""Two buffered versions: updates so seldom that no gradient is more than one late (PipeDream-2BW,
Narayanan et al. 2021).
"""

from collections.abc import Sequence

from .correction import Correction

__all__ = ["TwoVersions"]


class TwoVersions(Correction):
    """See to it that the staleness is 1 at most.

    That is so where an update takes in as many micro-batches as are in flight at the first stage:
    their gradients are averaged, clipped and applied once. The weights are kept twice then, and
    what a prediction makes of them for micro-batches of another staleness once more.
    """

    at_servers = False
    changes_law = False

    def check(self, depths: Sequence[int], update_every: int | None) -> None:
        if update_every is None and depths[0] > 1:
            raise ValueError(
                "corrections= has two_versions, which must know how many micro-batches an update "
                "has, and batch_size= is in samples: leave two_versions out (without it, too, "
                f"nothing is more than 1 update late while an update has {depths[0]} micro-batches "
                f"or more), or write update_every={depths[0]} in place of batch_size="
            )
        if update_every is not None and update_every < depths[0]:
            raise ValueError(
                f"corrections= has two_versions, which needs as many micro-batches to an update as "
                f"are in flight at the first stage: write update_every={depths[0]} or more, not "
                f"{update_every}"
            )
