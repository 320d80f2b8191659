"""A synthesizer for sequences: the gradient at a position depends on those around it."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from .condition import Condition, Conditioned, check_numbers

__all__ = ["Sequence"]


class Sequence(nn.Module):
    """Like `Convolution`, along a sequence whose features come last.

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
        super().__init__()
        if len(wanted) != 2 or len(given) != (2 if vocabulary is None else 1):
            raise ValueError(
                f"a synthesizer of sequences from {tuple(given)} to {tuple(wanted)}: it takes "
                "(positions, features), or (positions,) of tokens with vocabulary=, and gives "
                "(positions, features); write linear, mlp or convolution"
            )
        least = {"width": 1, "hidden": 0, "kernel": 1}
        check_numbers(least, width=width, hidden=hidden, kernel=kernel)
        if kernel % 2 == 0:
            raise ValueError(
                f"kernel={kernel!r}: give an odd one, which keeps the sequence's length"
            )
        self.embedding = None if vocabulary is None else nn.Embedding(vocabulary, width)
        features = given[-1] if vocabulary is None else width
        sizes = [features, *[width] * hidden, wanted[-1]]
        layers = [nn.Conv1d(a, b, kernel, padding=kernel // 2) for a, b in pairwise(sizes)]
        self.middle = nn.ModuleList(layers[:-1])
        self.last = nn.ModuleList(layers[-1:])
        self.conditioned = None
        if condition is not None:
            self.conditioned = Conditioned(condition, features * kernel, sizes[1])
            if not hidden:
                self.last.append(self.conditioned)

    def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        y = (x if self.embedding is None else self.embedding(x)).transpose(1, 2)
        for k, layer in enumerate((*self.middle, self.last[0])):
            y = layer(y)
            if k == 0 and self.conditioned is not None and target is not None:
                told = self.conditioned(target)
                y = y + (told.unsqueeze(2) if told.dim() == 2 else told.transpose(1, 2))
            if k < len(self.middle):
                y = y.relu()
        return y.transpose(1, 2)
