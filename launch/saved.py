"""What a run has left: a configuration and weights, in its folder or in a checkpoint."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from headrace.pipeline.checkpoints import Checkpoint, CheckpointError, find_latest, load_weights
from headrace.pipeline.checkpoints.checkpoint import MANIFEST

from .config import Config, parse, parse_text
from .ranks import hear, rank, tell
from .resume import PLACE

__all__ = ["Saved", "find_saved"]


@dataclass(frozen=True)
class Saved:
    """Of a run that has ended, or a checkpoint.

    Args:
        folder: of the run or the checkpoint.
        checkpoint: None where the run has ended.
        out: where files about it go: a checkpoint stays as it was written.
    """

    folder: Path
    checkpoint: Checkpoint | None
    out: Path

    def config(self, overrides: Sequence[str] = ()) -> Config:
        """What it was trained by.

        Args:
            overrides: changes of it: "--KEY", "VALUE", …

        Raises:
            ValueError: there is none, or something in it cannot be.
        """
        if self.checkpoint is None:
            return parse(["--config", str(self.folder / "config.yaml"), *overrides])
        text = self.checkpoint.notes.get("config")
        if not isinstance(text, str):
            raise ValueError(
                f"--checkpoint {self.folder}: no configuration is in its notes, where "
                "headrace.launch.train keeps it: give a folder with a config.yaml, and a "
                f"weights.pt by torch.save(load_weights('{self.folder}'), 'weights.pt')"
            )
        return parse_text(text, f"{self.folder}, its configuration", overrides)

    def weights(self) -> Mapping[str, Tensor]:
        """And buffers of the whole model, by its own names, on the CPU.

        Raises:
            ValueError: they cannot be read, or are none.
        """
        if self.checkpoint is not None:
            try:
                return load_weights(self.folder)
            except CheckpointError as error:
                raise ValueError(f"--checkpoint {self.folder}: {error}") from error
        return _load(self.folder)


def find_saved(folder: Path) -> Saved:
    """What is in a folder: of a run that has ended, or else the newest whole checkpoint.

    The first rank looks; the others hear what it has found.

    Args:
        folder: of a run, of a checkpoint, or of several.

    Raises:
        ValueError: there is nothing; says what to give.
    """
    if rank():
        found = Path(hear(f"saved {folder}"))
        ended = found == folder and (found / "weights.pt").is_file()
        return Saved(found, None if ended else Checkpoint.open(found), folder)
    saved = _look(folder)
    tell(f"saved {folder}", str(saved.folder))
    return saved


def _look(folder: Path) -> Saved:
    is_run = (folder / "config.yaml").is_file()
    if is_run and (folder / "weights.pt").is_file():
        return Saved(folder, None, folder)
    if (folder / MANIFEST).is_file():
        try:
            return Saved(folder, Checkpoint.open(folder), _beside(folder))
        except CheckpointError as error:
            raise ValueError(f"--checkpoint {folder}: {error}") from error
    place = folder / PLACE if is_run else folder
    newest, faults = find_latest(place)
    for fault in faults:
        print(f"headrace: {fault}", flush=True)
    if newest is not None:
        why = f"{folder} has not ended" if is_run else f"{folder} has several"
        print(f"headrace: {why}: its newest whole checkpoint is {newest.folder}", flush=True)
        return Saved(newest.folder, newest, folder if is_run else _beside(newest.folder))
    if faults:
        raise ValueError(f"--checkpoint {folder}: no checkpoint in {place} is whole")
    if is_run:
        raise ValueError(
            f"--checkpoint {folder}: no weights.pt and no checkpoint there; the run has not ended"
        )
    raise ValueError(
        f"--checkpoint {folder}: neither a run nor a checkpoint is there; give a run's folder, as "
        f"runs/digits, or one with a {MANIFEST}"
    )


def _beside(checkpoint: Path) -> Path:
    return checkpoint.with_name(f"{checkpoint.name}-sharpness")


def _load(folder: Path) -> Mapping[str, Tensor]:
    """A run's weights.pt."""
    try:
        state = torch.load(folder / "weights.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # torch's, zip's and pickle's own; nothing of the file has run
        raise ValueError(
            f"--checkpoint {folder}: weights.pt cannot be read; give a run that has ended whole"
        ) from error
    wrong = "" if isinstance(state, Mapping) else f"it is a {type(state).__name__}"
    for name, value in state.items() if not wrong else ():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            wrong = f"{name!r} is a {type(value).__name__}"
            break
    if wrong:
        raise ValueError(
            f"--checkpoint {folder}: weights.pt does not hold tensors by their names ({wrong}); "
            "write torch.save(model.state_dict(), 'weights.pt')"
        )
    return dict(state)
