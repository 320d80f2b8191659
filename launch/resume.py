"""Where a run begins: anew, or from a checkpoint of its own, of a run's that was stopped, or given.

What torchrun restarts finds the run's folder in the store, where the first start has left it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.pipeline.checkpoints import Checkpoint, CheckpointError, Checkpoints, find_latest
from headrace.pipeline.checkpoints.checkpoint import MANIFEST
from headrace.pipeline.errors import first_line

from .assemble import uses_total
from .config import Config, to_yaml
from .ranks import hear, rank, recall, remember, tell
from .run_files import new_folder
from .strict_yaml import load, load_file

__all__ = [
    "PLACE",
    "Beginning",
    "check_notes",
    "differences",
    "find_beginning",
    "past_the_end",
    "plan_checkpoints",
    "run_folder",
]

RUNS = Path("runs")
PLACE = "checkpoints"
"""Where in a run's folder they are."""


@dataclass(frozen=True)
class Beginning:
    """Of a run.

    Args:
        folder: runs/NAME of an earlier start, to go on in; None: a new one.
        checkpoint: to go on from; None: from the first weights.
    """

    folder: Path | None = None
    checkpoint: Path | None = None


def find_beginning(config: Config) -> Beginning:
    """The first rank looks; the others hear what it has found.

    Raises:
        ValueError: there is no checkpoint where one was asked for, or none is whole.
    """
    if rank():
        checkpoint = hear("checkpoint")
        return Beginning(None, Path(checkpoint) if checkpoint else None)
    found = _look(config)
    tell("checkpoint", str(found.checkpoint or ""))
    return found


def _look(config: Config) -> Beginning:
    resume = config.checkpoint.resume
    known = recall("folder")
    if known is not None:  # what it began from stays what it goes on from, until it has saved
        return Beginning(Path(known), _newest(Path(known)) or _given(resume))
    return _stopped(config.name) if resume == "auto" else Beginning(None, _given(resume))


def _given(resume: str | None) -> Path | None:
    """The checkpoint that `resume` names, if it names one."""
    if resume is None or resume == "auto":
        return None
    own = Path(resume) / PLACE
    return Checkpoint.open(own if own.is_dir() else resume).folder


def _stopped(name: str) -> Beginning:
    """The newest run of this name, if it did not come to its end."""
    folders = RUNS.iterdir() if RUNS.is_dir() else ()
    numbers = {path: number for path in folders if (number := _number(path, name))}
    newest_first = sorted(numbers, key=numbers.__getitem__, reverse=True)
    newest = next((path for path in newest_first if _name(path) == name), None)
    if newest is None or (newest / "summary.json").exists():
        return Beginning()
    return Beginning(newest, _newest(newest))


def _newest(folder: Path) -> Path | None:
    """The newest checkpoint of a run that is whole; it says what is wrong with newer ones."""
    found, faults = find_latest(folder / PLACE)
    for fault in faults:
        print(f"headrace: {fault}", flush=True)
    if found is None and faults:
        raise ValueError(
            f"no checkpoint in {folder / PLACE} is whole: give checkpoint.resume another one, or "
            "remove them to begin anew"
        )
    return found.folder if found else None


def _number(folder: Path, name: str) -> int:
    """Of the start of this name that such a folder was made for; 0 if it is no such folder."""
    found = re.fullmatch(re.escape(name) + r"(?:-(\d+))?", folder.name)
    return int(found[1] or 1) if found else 0


def _name(folder: Path) -> Any:
    """What the run in a folder is called: lr-10 may be a run lr-10, or the tenth of lr. None: it
    ended before it had said so, or saved anything.

    Raises:
        ValueError: there are checkpoints, and nothing says whose.
    """
    file = folder / "config.yaml"
    try:
        config = load_file(file)
    except ValueError:
        config = None
    if isinstance(config, dict) and "name" in config:
        return config["name"]
    if (folder / PLACE).exists():
        raise ValueError(
            f"{file} does not say which run the checkpoints beside it are of: give "
            f"checkpoint.resume {folder} to go on from them, or move {folder} away"
        )
    return None


def plan_checkpoints(config: Config, folder: Path | None) -> Checkpoints | None:
    """Where and when this run saves, the same on every rank.

    Args:
        folder: the run's, on the first rank; None on the others, which hear of it.
    """
    if config.checkpoint.every is None:
        return None
    if folder is not None:
        remember("folder", str(folder))
        tell("folder", str(folder))
    else:
        folder = Path(hear("folder"))
    every = config.checkpoint.every
    return Checkpoints(folder / PLACE, None if every == "epoch" else every, config.checkpoint.keep)


def run_folder(config: Config, beginning: Beginning) -> Path:
    """The folder of a run, made now if it is new."""
    return beginning.folder or new_folder(RUNS, config.name)


GOES_ON = ("optimizer", "scheduler", "data", "loss", "seed")
"""What a run that goes on has of its checkpoint, or is at its place by."""


def check_notes(checkpoint: Path, notes: Mapping[str, Any]) -> None:
    """Refuse what no run has noted in its checkpoint.

    Raises:
        CheckpointError: with the file and the note.
    """
    file = checkpoint / MANIFEST
    account = notes.get("journal", {})
    if not isinstance(account, dict) or not all(_is_amount(each) for each in account.values()):
        raise CheckpointError(
            f"{file}: notes.journal is {account!r}, and is to be numbers by name: the checkpoint "
            "is damaged, or its notes are another program's"
        )
    try:
        _configuration(notes)
    except ValueError as error:
        raise CheckpointError(
            f"{file}: notes.config is no configuration ({first_line(error)}): the checkpoint is "
            "damaged, or its notes are another program's"
        ) from error


def _is_amount(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _configuration(notes: Mapping[str, Any]) -> Any:
    saved = notes.get("config")
    return load(saved) if isinstance(saved, str) and saved else None


def past_the_end(config: Config, done: int, total: int | None) -> str:
    """What is to be said where a scheduler is told of fewer updates than were made; or nothing."""
    if total is None or done < total or not uses_total(config.scheduler):
        return ""
    return (
        f"the checkpoint has {done} updates, and by epochs, data.batch_size and pipeline this run "
        f"would have {total} in all: the scheduler is at its end, and its last learning rate stays"
    )


def differences(config: Config, notes: Mapping[str, Any]) -> str:
    """Which of those keys a configuration has otherwise than a checkpoint's; nothing if none."""
    then = _configuration(notes)
    now = load(to_yaml(config))
    if not isinstance(then, dict):
        return ""
    keys = [key for key in GOES_ON if then.get(key) != now.get(key)]
    if not keys:
        return ""
    return (
        f"{', '.join(keys)} {'differs' if len(keys) == 1 else 'differ'} from what the checkpoint "
        "was saved with; its optimizers, learning rates and place in the data are gone on with all "
        "the same"
    )
