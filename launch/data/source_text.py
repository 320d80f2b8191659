"""The Python standard library's own source text, for character language models."""

import os
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .checks import check_one_of, check_positive

__all__ = ["SourceText"]

# Tests, and what differs between two installations of one Python version.
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_SKIPPED_PREFIXES = ("_sysconfigdata", "config-")


class SourceText(Dataset[tuple[Tensor, Tensor]]):
    """Windows of the text: (int64 [context], int64 [context] one character later).

    The text is the first `characters` of the .py files of the standard library in the order of
    their paths, without its tests: the same for everyone with the same Python version. The last
    10% of it is the validation split. There are 97 symbols, whatever the text: newline, the 95
    printable ASCII characters, and one (number 0) for every other character.

    Args:
        split: "train" or "validation".
        context: characters in a window.
        characters: how much of the standard library to take, both splits together.
        stride: characters from one window's start to the next one's; None: `context`, so that
            windows do not overlap.

    Raises:
        ValueError: another split, a number below 1, a text too short for one window or for
            `characters`.
        FileNotFoundError: this Python has no source files of its standard library.
    """

    vocabulary: ClassVar[str] = "\N{REPLACEMENT CHARACTER}\n" + "".join(map(chr, range(32, 127)))

    def __init__(
        self,
        split: Literal["train", "validation"] = "train",
        context: int = 128,
        characters: int = 1_000_000,
        stride: int | None = None,
    ) -> None:
        check_one_of("split", split, ("train", "validation"))
        stride = context if stride is None else stride
        check_positive(context=context, characters=characters, stride=stride)
        text = _read(characters)
        cut = characters * 9 // 10
        self.text = self.encode(text[:cut] if split == "train" else text[cut:])
        if len(self.text) <= context:
            raise ValueError(
                f"context={context}: the {split} split has {len(self.text)} characters, and a"
                " window needs one more than context; raise characters or lower context"
            )
        self.context = context
        self.stride = stride

    def __len__(self) -> int:
        return (len(self.text) - self.context - 1) // self.stride + 1

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = index * self.stride
        window = self.text[start : start + self.context + 1].long()
        return window[:-1], window[1:]

    @classmethod
    def encode(cls, text: str) -> Tensor:
        """The symbols' numbers: uint8 [len(text)]."""
        numbers = {ord(symbol): number for number, symbol in enumerate(cls.vocabulary)}
        return torch.tensor(bytearray(numbers.get(ord(c), 0) for c in text), dtype=torch.uint8)

    @classmethod
    def decode(cls, numbers: Tensor) -> str:
        """The text of symbols' numbers, of any integer type, [length]."""
        return "".join(cls.vocabulary[number] for number in numbers.tolist())


def _read(characters: int) -> str:
    root = Path(sysconfig.get_path("stdlib"))
    pieces = []
    missing = characters
    for path in sorted(_source_files(root), key=lambda path: path.relative_to(root).as_posix()):
        with tokenize.open(path) as file:  # decodes as the file's own coding line says
            pieces.append(file.read(missing))
        missing -= len(pieces[-1])
        if missing == 0:
            return "".join(pieces)
    if not pieces:
        raise FileNotFoundError(
            f"there are no .py files of the standard library in {root}: use a Python that has them"
            " (python.org's, pyenv's and the distributions' do)"
        )
    raise ValueError(
        f"characters={characters}: the standard library has {characters - missing} of them"
    )


def _source_files(root: Path) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [
            name
            for name in subfolders
            if name not in _SKIPPED_FOLDERS and not name.startswith(_SKIPPED_PREFIXES)
        ]
        for name in files:
            if name.endswith(".py") and not name.startswith(_SKIPPED_PREFIXES):
                yield Path(folder, name)
