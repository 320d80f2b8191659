"""A synthesizer for sequences: the gradient at a position depends on those around it."""

import torch
from torch import Tensor, nn

from .condition import Condition
from .convolution import Convolution

__all__ = ["Sequence"]


class Sequence(Convolution):
    """A `Convolution` along a sequence, whose features come last.

    (N, T, features) and the target, one for a sample or for each position (next tokens), ->
    (N, T, wanted features); T may change from call to call. Integers (N, T) are taken as tokens.

    Args:
        kernel: positions that a layer looks at, odd: as many before as after.
        vocabulary: of tokens, where they are what is given.

    Raises:
        ValueError: shapes that are no sequences, tokens without a vocabulary, or such numbers.
    """

    def __init__(
        self,
        given: torch.Size,
        wanted: torch.Size,
        condition: Condition | None = None,
        width: int = 128,
        hidden: int = 1,
        kernel: int = 5,
        vocabulary: int | None = None,
    ) -> None:
        if len(wanted) != 2 or len(given) != (2 if vocabulary is None else 1):
            raise ValueError(
                f"a synthesizer of sequences from {tuple(given)} to {tuple(wanted)}: it takes "
                "(positions, features), or (positions,) of tokens with vocabulary=, and gives "
                "(positions, features); write linear, mlp or convolution"
            )
        embedding = None if vocabulary is None else nn.Embedding(vocabulary, width)
        features = given[-1] if vocabulary is None else width
        taken, made = torch.Size((features, given[0])), torch.Size((wanted[-1], given[0]))
        super().__init__(taken, made, condition, width, hidden, kernel)
        self.embedding = embedding

    def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        features = x if self.embedding is None else self.embedding(x)
        return super().forward(features.transpose(1, 2), target).transpose(1, 2)
