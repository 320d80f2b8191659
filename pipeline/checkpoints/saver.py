"""Write a checkpoint behind the back of training: each process its part, the first one the rest.

All parts go into a folder of another name. Once the first process has heard from all that theirs is
on the disk, it writes the manifest and gives the folder its name: whatever instant a process dies
at, what was there before is there still, whole.
"""

import json
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

from .checkpoint import MANIFEST, REPLACED, Checkpoint, candidates, is_remains, made_last, remains
from .files import Entry, fault_of, sync, write_json, write_tensors
from .plan import STEP
from .tree import pack

if TYPE_CHECKING:
    from ..watch import Watch

__all__ = ["Part", "Saver"]

PARTIAL = ".partial"


@dataclass(frozen=True)
class Part:
    """What one stage has to keep.

    Args:
        who: its label.
        weights: by the model's names, copied; None where another replica's are kept.
        state: as `pack` gave it.
    """

    who: str
    stage: int
    weights: Mapping[str, Tensor] | None
    state: tuple[Mapping[str, Tensor], Any]

    @classmethod
    def of(cls, who: str, stage: int, weights: Mapping[str, Tensor] | None, state: Any) -> "Part":
        """Copy the state to the CPU, as the weights are already: training may go on."""
        return cls(who, stage, weights, pack(state))


class Saver:
    """Makes one checkpoint at a time.

    Args:
        rank: this process, of `ranks`; 0 puts a checkpoint together.
        watch: by which they hear of each other; None for one process alone.
    """

    def __init__(self, rank: int, ranks: int, watch: "Watch | None") -> None:
        self._rank, self._ranks, self._watch = rank, ranks, watch
        self._number = 0
        self._told: dict[str, str] = {}
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._is_writing = False

    @property
    def is_writing(self) -> bool:
        """Whether this process's part is being written: a disk may take its time."""
        return self._is_writing

    @property
    def is_busy(self) -> bool:
        """Whether one is being made; in one process alone it is waited for.

        Raises:
            OSError: the last one could not be written.
        """
        if self._thread is not None and self._watch is None:
            self._thread.join()
        busy = self._thread is not None and self._thread.is_alive()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return busy

    def start(
        self, final: Path, parts: Sequence[Part], head: Checkpoint | None, keep: int | None
    ) -> None:
        """Begin to make one, all processes in the same order; the one before must be done.

        Args:
            final: where it is to be; of the other processes the folder it is in counts.
            head: on the first process, what the manifest says but for the files.
            keep: how many of its name, but for numbers, are to be kept in that folder; None: all.
        """
        self._number += 1
        self._thread = threading.Thread(
            target=self._guarded,
            args=[f"saves/{self._number}", final, parts, head, keep],
            name="headrace-saver",
            daemon=True,
        )
        self._thread.start()

    def _guarded(self, key: str, final: Path, *rest: Any) -> None:
        try:
            self._make(key, final, *rest)
        except (_JobEndedError, dist.DistError):
            return  # the job ends, and says why
        except OSError as error:
            text = f"the checkpoint {final} could not be written: {error.strerror or error}"
            if self._watch is None:
                self._error = OSError(error.errno, f"{text}; those before it are whole")
            else:
                self._watch.fail(f"{text}; those before it are whole", code=1)
        except Exception as error:
            self._error = error
            if self._watch is not None:
                self._watch.fail_by(error, f"writing the checkpoint {final}")

    def _make(
        self,
        key: str,
        final: Path,
        parts: Sequence[Part],
        head: Checkpoint | None,
        keep: int | None,
    ) -> None:
        if head is not None:
            _refuse_other(final)
            self._share(key, f".{final.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
        partial = final.with_name(self._learn(key))
        told = False
        try:
            with self._writing():
                entries = _write(partial, parts)
            self._share(f"{key}/{self._rank}", json.dumps(entries))
            told = True
            if head is not None:
                for rank in range(1, self._ranks):
                    entries |= json.loads(self._learn(f"{key}/{rank}"))
                self._forget(self._number - 1)  # with which all must be done
                with self._writing():
                    made = max(time.time(), made_last(final.parent) + 1e-3)  # clocks may go back
                    _finish(partial, replace(head, made=made, files=entries))
                    if keep is not None:
                        _prune(final, keep)
                self._share(f"{key}/done", "")
            self._learn(f"{key}/done")
        except Exception:
            if head is not None or not told:  # or else the first one may just give it its name
                shutil.rmtree(partial, ignore_errors=True)  # a full disk has room again
            raise

    @contextmanager
    def _writing(self) -> Iterator[None]:
        self._is_writing = True
        try:
            yield
        finally:
            self._is_writing = False

    # Between processes -------------------------------------------------------------------------

    def _share(self, key: str, text: str) -> None:
        if self._watch is None:
            self._told[key] = text
        else:
            self._watch.share(key, text)

    def _forget(self, number: int) -> None:
        """Nobody needs to know any more what was told of an earlier checkpoint: there are many."""
        if number:
            key = f"saves/{number}"
            for each in (key, f"{key}/done", *(f"{key}/{rank}" for rank in range(self._ranks))):
                if self._watch is None:
                    self._told.pop(each, None)  # the disk may have been full
                else:
                    self._watch.forget(each)

    def _learn(self, key: str) -> str:
        if self._watch is None:
            return self._told[key]
        while (text := self._watch.peek(key)) is None:
            if self._watch.failure is not None:
                raise _JobEndedError
            time.sleep(0.01)
        return text


class _JobEndedError(Exception):
    """The job has failed meanwhile."""


def _refuse_other(final: Path) -> None:
    final.parent.mkdir(parents=True, exist_ok=True)
    if final.exists() and not (final / MANIFEST).exists() and not is_remains(final):
        raise FileExistsError(
            17, f"there is something else of this name that is no checkpoint: {final}"
        )


def _write(partial: Path, parts: Sequence[Part]) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for part in parts:
        tensors, tree = part.state
        if part.weights is not None:
            name = f"weights/stage-{part.stage}.safetensors"
            entries[name] = write_tensors(partial / name, part.weights)
        name = f"state/{part.who}"
        entries[f"{name}.safetensors"] = write_tensors(partial / f"{name}.safetensors", tensors)
        entries[f"{name}.json"] = write_json(partial / f"{name}.json", tree)
    for folder in {(partial / name).parent for name in entries}:
        sync(folder)
    return entries


def _finish(partial: Path, checkpoint: Checkpoint) -> None:
    """Write the manifest of what is all there, and give the folder its name."""
    final = checkpoint.folder
    for name, entry in checkpoint.files.items():
        if fault := fault_of(partial / name, entry, thoroughly=False):
            raise OSError(f"{fault}; all hosts must share the folder {final.parent}")
    write_json(partial / MANIFEST, checkpoint.manifest())
    sync(partial)
    replaced = final.with_name(final.name + REPLACED)
    if os.path.lexists(final):
        _remove(replaced)
        os.rename(final, replaced)
    os.rename(partial, final)
    sync(final.parent)
    _remove(replaced)


def _remove(path: Path) -> None:
    """Of a link the link alone: what it leads to is the user's."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _prune(final: Path, keep: int) -> None:
    """Remove all but the newest checkpoints beside one, and what processes that died have left.

    Those that have another name, but for numbers, are somebody's own, and so are links.
    """
    folder = final.parent
    own = [path for path in candidates(folder) if _form(path) == _form(final)]
    left = [path for path in remains(folder) if path.name.startswith(STEP)]
    own, left = ([path for path in found if not path.is_symlink()] for found in (own, left))
    for path in [*own[keep:], *left]:
        gone = path.with_name(f".{path.name}{PARTIAL}")
        os.rename(path, gone)  # never half a checkpoint under its name
        shutil.rmtree(gone, ignore_errors=True)
    for path in folder.glob(f".*{PARTIAL}"):
        shutil.rmtree(path, ignore_errors=True)


def _form(path: Path) -> str:
    """A name without its numbers."""
    return re.sub("[0-9]+", "0", path.name.removesuffix(REPLACED))
