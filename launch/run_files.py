"""The files of a run: runs/NAME with its configuration, metrics, summary and weights."""

import importlib.util
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from headrace.pipeline.errors import InputError

__all__ = ["RunFiles", "check_folder", "for_json", "new_folder"]


class RunFiles:
    """The files in a run's folder.

    Args:
        folder: of `new_folder`, or of a run that is gone on with.
        config: its resolved configuration, as YAML.
        samples, epochs: trained on, and over, before this start; what metrics.jsonl says of later
            ones is dropped.
    """

    def __init__(self, folder: Path, config: str, samples: int = 0, epochs: int = 0) -> None:
        self.folder = folder
        _replace(folder / "config.yaml", lambda path: path.write_text(config, encoding="utf-8"))
        _drop_later(folder / "metrics.jsonl", samples, epochs)
        self._metrics = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._board = _tensorboard(folder, samples)

    def log(self, event: str, step: int, values: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl, and the numbers in it to TensorBoard.

        Args:
            event: what the line is about: "progress", "epoch", "test" or "servers".
            step: how many samples had been trained on.
        """
        self._write(event, step, values)
        if self._board is not None:
            for name, value in values.items():
                numbers = value if isinstance(value, list | tuple) else [value]
                for j, number in enumerate(numbers):
                    tag = f"{event}/{name}" + (f"/stage {j}" if numbers is value else "")
                    if number is not None:
                        self._board.add_scalar(tag, number, step)

    def _write(self, event: str, step: int, values: Mapping[str, Any]) -> None:
        line = {"event": event, "step": step, **values}
        self._metrics.write(json.dumps(for_json(line)) + "\n")
        self._metrics.flush()

    def histogram(self, tag: str, step: int, counts: Mapping[int, int]) -> None:
        """Write how often each value came, as a line of metrics.jsonl and for TensorBoard."""
        self._write("histogram", step, {"name": tag, "counts": counts})
        if self._board is None or not counts:
            return
        values, many = zip(*sorted(counts.items()), strict=True)
        self._board.add_histogram_raw(
            f"servers/{tag}",
            min=values[0],
            max=values[-1],
            num=sum(many),
            sum=sum(v * n for v, n in counts.items()),
            sum_squares=sum(v * v * n for v, n in counts.items()),
            bucket_limits=[v + 0.5 for v in values],
            bucket_counts=list(many),
            global_step=step,
        )

    def finish(self, summary: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
        """Write summary.json and weights.pt, each whole or not at all, and close the others."""
        _replace(self.folder / "weights.pt", lambda path: torch.save(dict(weights), path))
        text = json.dumps(for_json(summary), indent=2) + "\n"
        _replace(self.folder / "summary.json", lambda path: path.write_text(text, encoding="utf-8"))
        self.close()

    def close(self) -> None:
        """Close what is open; the files keep what was written so far."""
        self._metrics.close()
        if self._board is not None:
            self._board.close()


def new_folder(root: Path, name: str) -> Path:
    """Make root/NAME, or NAME-2, NAME-3 … if there are such folders.

    Raises:
        InputError: none can be made there.
    """
    number = 1
    while True:
        folder = root / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
        except OSError as error:
            raise _unwritable(folder, error.strerror or "") from error
        else:
            return folder


def check_folder(root: Path, option: str = "") -> None:
    """Refuse a folder in which nothing can be made, before there is anything to write.

    Args:
        option: that names it, as "--out"; "": none does.

    Raises:
        InputError: it is a file, belongs to somebody else, or is no place for files, as /proc.
    """
    try:
        there = next(p for p in (root.absolute(), *root.absolute().parents) if os.path.lexists(p))
        if not there.is_dir():
            raise _unwritable(root, f"{there.name} is a file", option)
        with TemporaryDirectory(prefix=".headrace-", dir=there):
            pass
    except OSError as error:
        raise _unwritable(root, error.strerror or "", option) from error


def _unwritable(folder: Path, why: str, option: str = "") -> InputError:
    if option:
        return InputError(f"{option} {folder}: it cannot be made: {why}; give another folder")
    return InputError(
        f"{folder} cannot be made: {why}; start in a folder that you may write to, or move away "
        "what is in the way"
    )


def _drop_later(metrics: Path, samples: int, epochs: int) -> None:
    """Keep of an earlier start's lines those up to the place that is gone on from."""
    if not metrics.exists():
        return
    lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if _is_before(line, samples, epochs)]
    _replace(metrics, lambda path: path.write_text("".join(kept), encoding="utf-8"))


def _is_before(line: str, samples: int, epochs: int) -> bool:
    """Whether a line will not be written again. A place after an epoch's last sample may be one
    before its end, and what tells of a run's end is told when it ends.
    """
    try:
        told = json.loads(line)
        if told["event"] == "epoch":
            return bool(told["epoch"] <= epochs)
        return bool(told["event"] == "progress" and told["step"] <= samples)
    except (ValueError, KeyError, TypeError):  # cut short when its writer died
        return False


def _tensorboard(folder: Path, samples: int) -> Any:
    """A writer of events, or None where tensorboard is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(log_dir=str(folder), purge_step=samples or None)


def for_json(value: Any) -> Any:
    """JSON has no NaN and no infinity: null. And a tuple is a list there."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: for_json(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [for_json(each) for each in value]
    return value


def _replace(path: Path, write: Any) -> None:
    unfinished = path.with_name(path.name + ".part")
    write(unfinished)
    os.replace(unfinished, path)
