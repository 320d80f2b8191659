"""A folder of images, one subfolder a class."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .checks import check_positive, import_extra
from .pixels import normalize

__all__ = ["ImageFolder"]

_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


class ImageFolder(Dataset[tuple[Tensor, Tensor]]):
    """Items: (float32 [3, size, size], int64 []): root/CLASS/…/image.jpg, classes in name order.

    The shorter side is resized to `size` (bilinear), the middle cut out, each channel normalised.

    Args:
        root: the folder of the classes' folders, one split's: "imagenet/train".
        size: pixels a side.
        mean, std: of the red, green and blue pixels, scaled to [0, 1]; the defaults are
            ImageNet's.

    Raises:
        FileNotFoundError: no such folder, no folders in it, or one without an image.
        ValueError: `size` below 1; for an item, a file that is no image or is damaged.
        ModuleNotFoundError: Pillow is missing.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        size: int = 224,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
    ) -> None:
        check_positive(size=size)
        import_extra("PIL.Image", extra="pillow", user="ImageFolder")
        folder = Path(root).expanduser()
        found = folder.iterdir() if folder.is_dir() else ()
        folders = sorted(path for path in found if path.is_dir() and path.name[0] != ".")
        if not folders:
            raise FileNotFoundError(
                f"root={str(root)!r}: {folder.absolute()} is not a folder with one subfolder for"
                " each class; put the images at ROOT/CLASS/NAME.jpg"
            )
        self.classes = [path.name for path in folders]
        self.files = [
            (path, number) for number, each in enumerate(folders) for path in _images(each)
        ]
        self.size = size
        self.mean = mean
        self.std = std

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        path, number = self.files[index]
        return normalize(_pixels(path, self.size), self.mean, self.std), torch.tensor(number)


def _images(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
    if not found:
        raise FileNotFoundError(
            f"{folder.absolute()} has no images ({', '.join(sorted(_SUFFIXES))}): remove this"
            " folder, or put the images of its class there"
        )
    return found


def _pixels(path: Path, size: int) -> Tensor:
    """The middle of an image: uint8 [3, size, size]."""
    from PIL import Image

    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except OSError as error:  # Pillow's own errors derive from it, and not all name the file
        raise ValueError(f"{path} cannot be read as an image: {error}") from error
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    image = image.crop((left, top, left + size, top + size))
    return (
        torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        .view(size, size, 3)
        .permute(2, 0, 1)
    )
