"""scikit-learn's digits: 1797 images of 8x8, which come with the package."""

from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .checks import check_one_of, import_extra

__all__ = ["Digits"]


class Digits(Dataset[tuple[Tensor, Tensor]]):
    """Items: (float32 [64], int64 [] from 0 to 9); 1437 to train on, 360 to test.

    The split is scikit-learn's `train_test_split(test_size=360, random_state=0, stratify=labels)`.
    The training images' mean is subtracted from each pixel, and all are divided by one number,
    the standard deviation of the training images' centred pixels.

    Args:
        split: "train" or "test".
        noise: this share of the labels is drawn anew, uniformly, always the same ones.

    Raises:
        ValueError: another split, or a share that is not in [0, 1].
        ModuleNotFoundError: scikit-learn is missing.
    """

    def __init__(self, split: Literal["train", "test"] = "train", noise: float = 0.0) -> None:
        check_one_of("split", split, ("train", "test"))
        if not 0 <= noise <= 1:
            raise ValueError(f"noise={noise!r}: give a share in [0, 1]")
        datasets = import_extra("sklearn.datasets", extra="scikit-learn", user="Digits")
        selection = import_extra("sklearn.model_selection", extra="scikit-learn", user="Digits")
        images, labels = datasets.load_digits(return_X_y=True)  # float64 [1797, 64], int [1797]
        train, test, train_labels, test_labels = selection.train_test_split(
            images, labels, test_size=360, random_state=0, stratify=labels
        )
        mean = train.mean(axis=0)
        std = (train - mean).std()
        chosen, targets = (train, train_labels) if split == "train" else (test, test_labels)
        self.inputs = torch.tensor((chosen - mean) / std, dtype=torch.float32)
        self.targets = torch.tensor(targets, dtype=torch.int64)
        generator = torch.Generator().manual_seed(0)
        spoilt = torch.randperm(len(self), generator=generator)[: round(noise * len(self))]
        self.targets[spoilt] = torch.randint(0, 10, (len(spoilt),), generator=generator)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.targets[index]
