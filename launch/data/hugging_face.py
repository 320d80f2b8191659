"""Any data set that Hugging Face's `datasets` reads, from its hub or from local files."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .checks import import_extra

__all__ = ["HuggingFace"]


class HuggingFace(Dataset[tuple[Tensor, Tensor]]):
    """Items: the `input` and `target` columns of a row, as tensors.

    Whole numbers come as int64, others as float32, images as float32 [C, H, W] scaled to [0, 1],
    lists as tensors of their shape. Text has to be turned into numbers first.

    Args:
        path: as for `datasets.load_dataset`: a name on the hub, a local folder, or a kind of file
            ("csv", "json", "parquet", …) with `data_files`; or a folder that `save_to_disk` wrote.
        input: a column's name; or several names, of columns of single numbers, which are put
            together into a float32 [columns].
        target: the same.
        split: which one, such as "train" or "train[:10%]".
        data_files: one file or several, relative to the current folder, or addresses.
        options: more keywords for `load_dataset`: name, revision, cache_dir, …

    Raises:
        FileNotFoundError: no such files or data set; says where they were looked for.
        ValueError: no such split or column, or an empty split.
        TypeError: a column that is not numbers.
        ModuleNotFoundError: `datasets` is missing.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        input: str | Sequence[str],
        target: str | Sequence[str],
        split: str = "train",
        data_files: str | Sequence[str] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        rows = _load(os.fspath(path), split, data_files, dict(options or {}))
        columns = [*_names(input), *_names(target)]
        for name in columns:
            if name not in rows.column_names:
                raise ValueError(
                    f"there is no column {name!r} in {os.fspath(path)}; it has"
                    f" {', '.join(rows.column_names)}"
                )
        self.rows = rows.with_format("torch", columns=list(dict.fromkeys(columns)))
        self.input = input
        self.target = target
        self[0]  # a column that cannot become a tensor is refused here, not in the first epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        row = self.rows[index]
        return _tensor(row, self.input), _tensor(row, self.target)


def _load(path: str, split: str, data_files: str | Sequence[str] | None, options: Any) -> Any:
    datasets = import_extra("datasets", extra="datasets", user="HuggingFace")
    saved = Path(path).expanduser()
    if (saved / "dataset_dict.json").is_file() or (saved / "state.json").is_file():
        return _saved_split(datasets.load_from_disk(str(saved)), saved, split)
    try:
        return datasets.load_dataset(path, data_files=data_files, split=split, **options)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}. Local files are looked for from {Path.cwd()}; a name has to be one of"
            " https://huggingface.co/datasets"
        ) from error


def _saved_split(saved: Any, folder: Path, split: str) -> Any:
    if isinstance(saved, dict):
        if split not in saved:
            raise ValueError(f"split={split!r}: {folder} has {', '.join(saved)}")
        return saved[split]
    if split not in ("train", str(saved.split)):
        raise ValueError(
            f"split={split!r}: {folder} was saved from one split; leave split out to use it whole"
        )
    return saved


def _names(columns: str | Sequence[str]) -> list[str]:
    return [columns] if isinstance(columns, str) else list(columns)


def _tensor(row: Mapping[str, Any], columns: str | Sequence[str]) -> Tensor:
    for name in _names(columns):
        value = row[name]
        if not isinstance(value, Tensor):
            raise TypeError(
                f"column {name!r} holds {type(value).__name__}, not numbers: turn it into numbers"
                " first (datasets' map), then save_to_disk and give that folder as path"
            )
        if not isinstance(columns, str) and value.dim() != 0:
            raise TypeError(
                f"column {name!r} holds {tuple(value.shape)} tensors: several columns are put"
                " together of single numbers only; name one column"
            )
    if not isinstance(columns, str):
        return torch.stack([row[name].float() for name in columns])
    column: Tensor = row[columns]
    # The torch format makes int64 of every whole number; only images stay bytes.
    return column / 255 if column.dtype == torch.uint8 else column
