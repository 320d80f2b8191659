"""Weights alone: out of a checkpoint, and to and from one safetensors file."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from .checkpoint import Checkpoint, CheckpointError
from .files import read_tensors, save_tensors

__all__ = ["load_weights", "save_weights"]


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """A model's weights and buffers, by its own names, on the CPU: for its `load_state_dict`.

    Args:
        path: a checkpoint, a folder of checkpoints (the newest one), or a .safetensors file.

    Raises:
        CheckpointError: it is none of these, or damaged.
    """
    path = Path(path)
    if path.is_file():
        try:
            return read_tensors(path)
        except ValueError as error:
            raise CheckpointError(
                f"{error}; load_state_dict(torch.load({str(path)!r})) takes one of torch.save's"
            ) from error
    return Checkpoint.open(path).weights()


def save_weights(state: Mapping[str, Tensor], file: str | Path) -> None:
    """Write a model's `state_dict` as a safetensors file; tied weights are written each.

    Raises:
        TypeError: something in it is no tensor.
        OSError: the file cannot be written.
    """
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{name!r} is a {type(value).__name__}, and weights are tensors: give a model's "
                "state_dict()"
            )
    copies = {name: t.detach().cpu().contiguous().clone() for name, t in state.items()}
    save_tensors(Path(file), copies)
