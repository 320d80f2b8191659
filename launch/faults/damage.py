"""Damage to the newest checkpoint while the job is down: it goes on from the one before."""

import re
import shutil
from abc import abstractmethod
from pathlib import Path

from headrace.pipeline.checkpoints import find_latest

from .job import Job, LostError
from .orphan import Orphan

__all__ = ["Cut", "Damage", "Delete", "Flip", "NoManifest", "Partial"]


class Damage(Orphan):
    """Kill torchrun, damage the newest checkpoint, and start again."""

    while_starting = False

    def meanwhile(self, job: Job) -> None:
        number, newest = job.saved()[-1]
        self._before = job.saved()[-2][1]
        self.whose = self.harm(newest)
        self._damaged, self._number = newest, number
        found, _ = find_latest(job.checkpoints)
        if found is None or found.folder != self._before:
            raise LostError(f"the newest whole one is not {self._before} but {found}")

    def afterwards(self, job: Job, since: int) -> None:
        job.wait(lambda: "goes on in epoch" in job.said(since) or None, "line of where it goes on")
        job.expect(re.escape(self._damaged.name), since)

    @abstractmethod
    def harm(self, checkpoint: Path) -> str:
        """Do it; say to what."""

    def file(self, checkpoint: Path) -> Path:
        """One of its files."""
        return self.draws.choice(sorted(p for p in checkpoint.rglob("*") if p.is_file()))


class Cut(Damage):
    """Cut a file short."""

    name = "cut a file short"

    def harm(self, checkpoint: Path) -> str:
        file = self.file(checkpoint)
        content = file.read_bytes()
        file.write_bytes(content[: self.draws.randrange(len(content))])
        return _name(file, checkpoint)


class Flip(Damage):
    """Flip a bit; of the manifest there are bits that nobody minds."""

    name = "flip a bit"

    def harm(self, checkpoint: Path) -> str:
        file = self.draws.choice(sorted(checkpoint.glob("*/*")))
        content = bytearray(file.read_bytes())
        content[self.draws.randrange(len(content))] ^= 1 << self.draws.randrange(8)
        file.write_bytes(content)
        return _name(file, checkpoint)


class Delete(Damage):
    """Delete a file."""

    name = "delete a file"

    def harm(self, checkpoint: Path) -> str:
        file = self.draws.choice(sorted(checkpoint.glob("*/*")))
        file.unlink()
        return _name(file, checkpoint)


class NoManifest(Damage):
    """Delete the manifest."""

    name = "delete the manifest"

    def harm(self, checkpoint: Path) -> str:
        (checkpoint / "checkpoint.json").unlink()
        return checkpoint.name


class Partial(Orphan):
    """Leave half a checkpoint behind, as one who dies while writing does."""

    name = "leave half a checkpoint"
    while_starting = False

    def meanwhile(self, job: Job) -> None:
        newest = job.saved()[-1][1]
        half = newest.with_name(f".{newest.name}.{self.draws.randrange(16**8):08x}.partial")
        shutil.copytree(newest, half)
        (half / "checkpoint.json").unlink()
        file = self.draws.choice(sorted(half.glob("*/*")))
        file.write_bytes(file.read_bytes()[: self.draws.randrange(file.stat().st_size)])
        self.whose = half.name


def _name(file: Path, checkpoint: Path) -> str:
    return f"{checkpoint.name}/{file.relative_to(checkpoint)}"
