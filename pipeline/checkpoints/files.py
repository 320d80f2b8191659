"""Files that are on the disk before they are said to be, and what tells if they still are."""

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = [
    "Entry",
    "fault_of",
    "read_json",
    "read_tensors",
    "save_tensors",
    "sync",
    "write_json",
    "write_tensors",
]

Entry = dict[str, Any]
"""Of one file: its size in bytes, and its SHA-256."""

CHUNK = 1 << 20
"""Bytes that are read at once."""


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> Entry:
    """Write tensors as safetensors.

    Raises:
        OSError: it cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(file, tensors)
    return _finish(file)


def save_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file into a folder that is there.

    Raises:
        OSError: it cannot be written.
    """
    try:
        # A weight may lie as channels_last does: what it is read into keeps its own order.
        rows = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(rows, file, metadata={"format": "pt"})
    except SafetensorError as error:  # speaks of a file that goes by another name until it is whole
        if number := re.search(r"\(os error (\d+)\)", str(error)):
            code = int(number[1])
            raise OSError(code, os.strerror(code), str(file)) from error
        raise OSError(f"{file}: {error}") from error


def write_json(file: Path, value: Any) -> Entry:
    """Write plain data as JSON.

    Raises:
        OSError: it cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, allow_nan=False), encoding="utf-8")
    return _finish(file)


def _finish(file: Path) -> Entry:
    sync(file)
    with file.open("rb") as opened:
        return {
            "bytes": file.stat().st_size,
            "sha256": hashlib.file_digest(opened, "sha256").hexdigest(),
        }


def sync(path: Path) -> None:
    """See to it that a file, or a folder's entries, are on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def fault_of(file: Path, entry: Entry, thoroughly: bool = True) -> str:
    """What is wrong with a file; nothing, if it is what was written.

    Args:
        thoroughly: read all of it.
    """
    try:
        with _opened(file) as opened:
            size = os.fstat(opened.fileno()).st_size
            if size != entry["bytes"]:
                return f"{file} has {size} bytes, and {entry['bytes']} were written"
            if thoroughly and _sha256(opened, size) != entry["sha256"]:
                return f"{file} is not what was written: its SHA-256 differs"
    except OSError as error:
        return f"{file} cannot be read: {error.strerror or error}"
    return ""


@contextmanager
def _opened(file: Path) -> Iterator[BinaryIO]:
    """A file to read, which has an end: a pipe or a device may have none, or never begin.

    Raises:
        OSError: it cannot be opened, or is no plain file.
    """

    def open_at_once(path: str, flags: int) -> int:
        return os.open(path, flags | os.O_NONBLOCK)

    with open(file, "rb", opener=open_at_once) as opened:
        if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is no plain file")
        yield opened


def _sha256(opened: BinaryIO, size: int) -> str:
    """Of so many bytes, and of one more if there is one."""
    digest, left = hashlib.sha256(), size + 1
    while chunk := opened.read(min(left, CHUNK)):
        digest.update(chunk)
        left -= len(chunk)
    return digest.hexdigest()


def read_tensors(file: Path, names: Container[str] | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file, in memory of their own: the file may go, and where a
    tensor begins in it would show in the last bits of what is computed with it.

    Raises:
        ValueError: it is none.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            wanted = [name for name in opened.keys() if names is None or name in names]  # noqa: SIM118
            return {name: opened.get_tensor(name).clone() for name in wanted}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a safetensors file: {error}") from error


def read_json(file: Path, most: int) -> Any:
    """The plain data of a JSON file.

    Args:
        most: bytes that it may have.

    Raises:
        ValueError: it is none.
    """
    try:
        with _opened(file) as opened:
            text = opened.read(most + 1)
        if len(text) > most:
            raise ValueError(f"it has more than {most} bytes")
        return json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not a JSON file: {error}") from error
