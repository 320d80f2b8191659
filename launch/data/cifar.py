"""CIFAR-10 and CIFAR-100, from the files of their binary version."""

import os
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .checks import check_one_of, find_file
from .pixels import normalize

__all__ = ["CIFAR10", "CIFAR100"]

_PIXELS = 3 * 32 * 32


class _CIFAR(Dataset[tuple[Tensor, Tensor]]):
    """What the two share: records of a few label bytes, the last the class, and an image."""

    archive: ClassVar[str]
    folder: ClassVar[str]
    files: ClassVar[dict[str, list[str]]]
    label_bytes: ClassVar[int]
    mean: ClassVar[tuple[float, float, float]]
    std: ClassVar[tuple[float, float, float]]

    def __init__(
        self, root: str | os.PathLike[str], split: Literal["train", "test"] = "train"
    ) -> None:
        check_one_of("split", split, ("train", "test"))
        records = torch.cat([self._records(Path(root), name) for name in self.files[split]])
        self.images = records[:, self.label_bytes :].reshape(-1, 3, 32, 32)
        self.targets = records[:, self.label_bytes - 1].long()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return normalize(self.images[index], self.mean, self.std), self.targets[index]

    def _records(self, root: Path, name: str) -> Tensor:
        root = root.expanduser()
        path = find_file(
            [root / self.folder / name, root / name],
            f"Get {self.archive} (the binary version, not the Python one) from"
            f" https://www.cs.toronto.edu/~kriz/cifar.html and unpack it in {root.absolute()}.",
        )
        data = path.read_bytes()
        record = self.label_bytes + _PIXELS
        if not data or len(data) % record != 0:
            raise ValueError(
                f"{path} has {len(data)} bytes, not a multiple of a record's {record}: unpack"
                f" {self.archive} again"
            )
        return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(-1, record)


class CIFAR10(_CIFAR):
    """Items: (float32 [3, 32, 32], int64 [] from 0 to 9); 50,000 to train on, 10,000 to test.

    Per channel, the training images' mean is subtracted and their standard deviation divided by.

    Args:
        root: where cifar-10-binary.tar.gz was unpacked, or the folder of the .bin files.
        split: "train" or "test".

    Raises:
        FileNotFoundError: a file is missing; says where to get it.
        ValueError: another split, or a damaged file.
    """

    archive = "cifar-10-binary.tar.gz"
    folder = "cifar-10-batches-bin"
    files: ClassVar[dict[str, list[str]]] = {
        "train": [f"data_batch_{number}.bin" for number in range(1, 6)],
        "test": ["test_batch.bin"],
    }
    label_bytes = 1
    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2470, 0.2435, 0.2616)


class CIFAR100(_CIFAR):
    """Items: (float32 [3, 32, 32], int64 [] from 0 to 99, the fine label); counts as `CIFAR10`.

    Arguments, normalisation and errors are those of `CIFAR10`, the archive is
    cifar-100-binary.tar.gz.
    """

    archive = "cifar-100-binary.tar.gz"
    folder = "cifar-100-binary"
    files: ClassVar[dict[str, list[str]]] = {"train": ["train.bin"], "test": ["test.bin"]}
    label_bytes = 2
    mean = (0.5071, 0.4865, 0.4409)
    std = (0.2673, 0.2564, 0.2762)
