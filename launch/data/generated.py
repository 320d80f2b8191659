"""Generated tensors of a given shape, for measuring speed without any files."""

from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .checks import check_positive

__all__ = ["Generated", "GeneratedTokens"]


class Generated(Dataset[tuple[Tensor, Tensor]]):
    """Items: (N(0, 1) numbers [*shape], int64 [] from 0 to classes - 1), nothing to learn in them.

    An item depends on `seed` and its index alone.

    Args:
        shape: of one sample, such as [3, 224, 224].
        classes: how many there are.
        samples: how many items there are.
        dtype: of the input, a floating-point one, or its name: "float32", "bfloat16".
        seed: for another set of items.

    Raises:
        ValueError: a size below 1, or a dtype that is not floating point.
    """

    def __init__(
        self,
        shape: Sequence[int],
        classes: int,
        samples: int = 1024,
        dtype: torch.dtype | str = torch.float32,
        seed: int = 0,
    ) -> None:
        check_positive(classes=classes, samples=samples)
        for position, size in enumerate(shape):
            check_positive(**{f"shape[{position}]": size})
        self.shape = tuple(shape)
        self.classes = classes
        self.samples = samples
        self.dtype = _floating(dtype)
        self.seed = seed

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        generator = _generator(self.seed, index, self.samples)
        numbers = torch.randn(self.shape, generator=generator).to(self.dtype)
        return numbers, torch.randint(self.classes, (), generator=generator)


class GeneratedTokens(Dataset[tuple[Tensor, Tensor]]):
    """Items: (int64 [context] from 0 to vocabulary - 1, the same one token later).

    An item depends on `seed` and its index alone.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, context: int, vocabulary: int, samples: int = 1024, seed: int = 0) -> None:
        check_positive(context=context, vocabulary=vocabulary, samples=samples)
        self.context = context
        self.vocabulary = vocabulary
        self.samples = samples
        self.seed = seed

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        generator = _generator(self.seed, index, self.samples)
        tokens = torch.randint(self.vocabulary, (self.context + 1,), generator=generator)
        return tokens[:-1], tokens[1:]


def _generator(seed: int, index: int, samples: int) -> torch.Generator:
    if not 0 <= index < samples:
        raise IndexError(f"item {index} of {samples}")
    # A hash, since torch's generator looks at 32 bits of a seed only: seed + index would repeat.
    digest = blake2b(f"{seed},{index}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def _floating(dtype: torch.dtype | str) -> torch.dtype:
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(
            f"dtype={dtype!r}: give a floating-point one, such as float32 or bfloat16; for whole"
            " numbers use GeneratedTokens"
        )
    return found
