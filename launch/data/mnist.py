"""MNIST, and whatever comes in its files' format, such as Fashion-MNIST."""

import gzip
import math
import os
import zlib
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .checks import check_one_of, find_file
from .pixels import normalize

__all__ = ["MNIST", "read_idx"]

_UNSIGNED_BYTES = 0x08


class MNIST(Dataset[tuple[Tensor, Tensor]]):
    """Items: (float32 [1, H, W], int64 []); MNIST and Fashion-MNIST: 28x28, 60,000 and 10,000.

    Args:
        root: the folder of the four IDX files (train-images-idx3-ubyte, …), .gz or unpacked.
        split: "train" or "test".
        mean, std: of the pixels, scaled to [0, 1]: subtracted, then divided by. The defaults are
            those of MNIST's training images; Fashion-MNIST's are 0.2860 and 0.3530.

    Raises:
        FileNotFoundError: a file is missing; says where to get it.
        ValueError: another split, a damaged file, or images and labels that do not match.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: Literal["train", "test"] = "train",
        mean: float = 0.1307,
        std: float = 0.3081,
    ) -> None:
        check_one_of("split", split, ("train", "test"))
        folder = Path(root).expanduser()
        prefix = "train" if split == "train" else "t10k"
        self.images = read_idx(_find(folder, f"{prefix}-images-idx3-ubyte"))
        self.targets = read_idx(_find(folder, f"{prefix}-labels-idx1-ubyte")).long()
        if self.images.dim() != 3 or self.targets.shape != self.images.shape[:1]:
            raise ValueError(
                f"root={str(root)!r}: {prefix}'s images have shape {tuple(self.images.shape)}, its"
                f" labels {tuple(self.targets.shape)}; they are not of one data set"
            )
        self.mean = mean
        self.std = std

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = normalize(self.images[index].unsqueeze(0), [self.mean], [self.std])
        return image, self.targets[index]


def read_idx(path: Path) -> Tensor:
    """An IDX file of unsigned bytes, .gz or not -> uint8 of the shape it states.

    Format: two zero bytes, the type, the number of dimensions, each dimension as a big-endian
    32-bit number, the data (described on MNIST's page).

    Raises:
        ValueError: not such a file, or cut short.
    """
    data = path.read_bytes()
    if path.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} cannot be unpacked ({error}): get it again") from error
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] != _UNSIGNED_BYTES:
        raise ValueError(f"{path} is not an IDX file of unsigned bytes; was a web page saved?")
    start = 4 + 4 * data[3]
    shape = [int.from_bytes(data[at : at + 4], "big") for at in range(4, start, 4)]
    if len(data) != start + math.prod(shape):
        raise ValueError(
            f"{path} states the shape {shape} and has {len(data) - start} bytes of data instead of"
            f" {math.prod(shape)}: get it again"
        )
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)[start:].view(shape)


def _find(folder: Path, name: str) -> Path:
    return find_file(
        [folder / name, folder / f"{name}.gz"],
        "Get MNIST's four .gz files from http://yann.lecun.com/exdb/mnist (a copy:"
        " https://ossci-datasets.s3.amazonaws.com/mnist), or Fashion-MNIST's from"
        f" https://github.com/zalandoresearch/fashion-mnist, and put them into {folder.absolute()},"
        " unpacked or not.",
    )
