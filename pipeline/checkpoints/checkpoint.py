"""A checkpoint on disk: a folder whose manifest, written last, says what is in it.

step-00001000/
    checkpoint.json               the manifest: position, cut, and each file's size and SHA-256
    weights/stage-0.safetensors   weights and buffers, by the model's own names
    state/stage-0.safetensors     the tensors of all else that the stage needs to go on …
    state/stage-0.json            … and the rest of it
"""

import math
import re
import warnings
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import InputError
from .files import Entry, fault_of, read_json, read_tensors
from .position import Position
from .schema import whole
from .tree import unpack

__all__ = [
    "MANIFEST",
    "Checkpoint",
    "CheckpointError",
    "candidates",
    "find_latest",
    "fitting",
    "is_remains",
    "label",
    "made_last",
    "remains",
]

MANIFEST = "checkpoint.json"
FORMAT = 1
REPLACED = ".replaced"
"""Ends the name of one that is being written anew."""
LARGEST = 1 << 26
"""Bytes of a manifest: a stage's files are a few hundred."""
NAME = re.compile(
    r"(weights/stage-[0-9]+\.safetensors)"
    r"|(state/((replica-[0-9]+-)?stage|server)-[0-9]+\.(safetensors|json))"
)
"""Of a file that a manifest may speak of: no other is ever opened."""
PART = re.compile(r"(weights|state)(/[^/]+\.(safetensors|json))?")
"""What is in one beside the manifest."""


class CheckpointError(InputError):
    """What there is cannot be gone on from; the message says what to do."""


NO_FIT = (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError, OverflowError)
"""What taking on a state may raise that is of something else."""


@contextmanager
def fitting(what: str | Path, whom: str) -> Iterator[None]:
    """Take on a state in the block.

    Args:
        what: the file or folder. whom: who is to be what it is of.

    Raises:
        CheckpointError: it is of something else.
    """
    try:
        yield
    except InputError:
        raise
    except NO_FIT as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise CheckpointError(
            f"{what} does not fit {whom} ({kind}{' '.join(str(error).split())}): it is damaged, or "
            "was written for other layers, or by another version; load_state_dict(load_weights(…)) "
            "takes what it has of weights"
        ) from error


@dataclass(frozen=True)
class Checkpoint:
    """A whole one.

    Args:
        layers: the names of each stage's layers.
        depths: micro-batches in flight behind a forward of each stage.
        kinds: the rule of each stage, the corrections, the way of sharing weights.
        notes: the user's own (`Pipeline.notes`).
        made: when, in seconds since 1970.
        files: by name in the folder.
    """

    folder: Path
    position: Position
    layers: list[list[str]]
    replicas: int
    depths: list[int]
    kinds: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    made: float = 0.0
    files: dict[str, Entry] = field(default_factory=dict)

    @classmethod
    def open(cls, path: str | Path) -> "Checkpoint":
        """Read a manifest, and see that the files it speaks of are there.

        Args:
            path: a checkpoint's folder; or that of several, or …/latest, for the newest.

        Raises:
            CheckpointError: there is none, or it is not whole.
        """
        folder = Path(path)
        if folder.name == "latest" and not folder.exists():
            folder = folder.parent
        if not (folder / MANIFEST).exists():
            found, faults = find_latest(folder)
            if found is not None:
                for fault in faults:
                    warnings.warn(f"{fault}; an older checkpoint is taken", stacklevel=3)
                return found
            raise CheckpointError(_nothing(Path(path), folder, faults))
        opened = cls._read(folder)
        for name, entry in opened.files.items():
            if fault := fault_of(folder / name, entry, thoroughly=False):
                raise CheckpointError(f"{fault}: {REMEDY}")
        return opened

    @classmethod
    def _read(cls, folder: Path) -> "Checkpoint":
        try:
            manifest = read_json(folder / MANIFEST, LARGEST)
            if manifest["format"] != FORMAT:
                raise CheckpointError(
                    f"{folder} is of format {manifest['format']!r}, and this reads {FORMAT}: take "
                    "the version of headrace that wrote it"
                )
            position = Position.of(manifest["position"])
            layers = [[str(name) for name in stage] for stage in manifest["layers"]]
            files = {_name(name): _entry(each) for name, each in manifest["files"].items()}
            depths = _depths(manifest["depths"], len(layers))
            kinds, notes = dict(manifest["kinds"]), dict(manifest["notes"])
            replicas = whole("replicas", manifest["replicas"], least=1)
            made = float(manifest["made"])
            return cls(folder, position, layers, replicas, depths, kinds, notes, made, files)
        except CheckpointError:
            raise
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise CheckpointError(
                f"{folder / MANIFEST} is no manifest of a checkpoint ({error}): {REMEDY}"
            ) from error

    def manifest(self) -> dict[str, Any]:
        """What `open` reads."""
        told = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "folder"}
        return {"format": FORMAT, **told, "position": asdict(self.position)}

    def fault(self) -> str:
        """What is wrong with a file, all of which are read; nothing, if all are as written."""
        faults = (fault_of(self.folder / name, entry) for name, entry in self.files.items())
        return next(filter(None, faults), "")

    @property
    def stages(self) -> int:
        """How many there were."""
        return len(self.layers)

    def weights(
        self, names: Container[str] | None = None, stages: Iterable[int] | None = None
    ) -> dict[str, Tensor]:
        """The model's weights and buffers, by its own names, on the CPU.

        Args:
            names: which; None: all.
            stages: whose files to read; None: all.

        Raises:
            CheckpointError: a file is not what was written.
        """
        found: dict[str, Tensor] = {}
        for j in range(self.stages) if stages is None else stages:
            found |= self._tensors(f"weights/stage-{j}.safetensors", names)
        return found

    def state(self, who: str) -> Any:
        """All else of one process's part, as `label` calls it.

        Raises:
            CheckpointError: it is not there, or not what was written.
        """
        tensors = self._tensors(f"state/{who}.safetensors")
        file = self._intact(f"state/{who}.json")
        try:
            return unpack(read_json(file, self.files[f"state/{who}.json"]["bytes"]), tensors)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{file}: {error}") from error

    def has(self, who: str) -> bool:
        """Whether there is such a part."""
        return f"state/{who}.json" in self.files

    def _tensors(self, name: str, names: Container[str] | None = None) -> dict[str, Tensor]:
        file = self._intact(name)
        try:
            return read_tensors(file, names)
        except ValueError as error:
            raise CheckpointError(str(error)) from error

    def _intact(self, name: str) -> Path:
        file = self.folder / name
        if name not in self.files:
            raise CheckpointError(f"{self.folder} has no {name}: it is another pipeline's")
        if fault := fault_of(file, self.files[name]):
            raise CheckpointError(f"{fault}: {REMEDY}")
        return file


REMEDY = "the checkpoint is damaged; go on from an older one, or remove it"


DEEPEST = 1 << 20
"""No stage has so many micro-batches in flight."""


def _depths(written: Any, stages: int) -> list[int]:
    depths = [whole("depths", depth) for depth in written]
    if len(depths) != stages or not stages:
        raise ValueError(f"depths={depths} of {stages} stages: there is to be one for each")
    if max(depths) >= DEEPEST:
        raise ValueError(f"depths={depths}: no stage has so many micro-batches in flight")
    return depths


def _name(written: str) -> str:
    if not NAME.fullmatch(written):
        raise ValueError(f"files has {written!r}, which none is called")
    return written


def _entry(value: Mapping[str, Any]) -> Entry:
    return {"bytes": whole("bytes", value["bytes"]), "sha256": str(value["sha256"])}


def _nothing(path: Path, folder: Path, faults: list[str]) -> str:
    if faults:
        return f"no checkpoint in {folder} is whole: {'; '.join(faults)}"
    if not folder.is_dir():
        return f"there is no {path}: write a checkpoint's folder, or that of several"
    if candidates(inner := folder / "checkpoints"):
        return f"no checkpoint is in {folder}, which is a run's: give {inner}"
    names = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "nothing"
    return f"no checkpoint is in {folder} (there is {names}): one is a folder with {MANIFEST}"


def candidates(folder: Path) -> list[Path]:
    """The checkpoints in a folder that have their manifest, the one made last first: it may be
    of fewer steps than those of another run, or of one that was gone back in.
    """
    found = [file.parent for file in folder.glob(f"*/{MANIFEST}") if file.parent.name[0] != "."]
    return sorted(found, key=_age, reverse=True)


def made_last(folder: Path) -> float:
    """When the newest checkpoint in a folder was made, in seconds since 1970; 0 without one."""
    return max((_age(path)[0] for path in candidates(folder)), default=0.0)


def _age(path: Path) -> tuple[float, bool, str]:
    try:
        made = float(read_json(path / MANIFEST, LARGEST)["made"])
    except (ValueError, OverflowError, KeyError, TypeError):
        made = -1.0
    return (made if math.isfinite(made) else -1.0, not path.name.endswith(REPLACED), path.name)


def remains(folder: Path) -> list[Path]:
    """What are checkpoints but for the manifest, which somebody must have removed."""
    found = [path for path in folder.glob("*") if path.is_dir() and path.name[0] != "."]
    return sorted(path for path in found if is_remains(path))


def is_remains(path: Path) -> bool:
    """Whether nothing is in a folder but what a checkpoint has beside its manifest."""
    names = [each.relative_to(path).as_posix() for each in path.glob("*")]
    if not names or not all(PART.fullmatch(name) for name in names):
        return False
    inner = [each.relative_to(path).as_posix() for each in path.glob("*/*")]
    return all(PART.fullmatch(name) for name in inner)


def find_latest(folder: str | Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint in a folder that is as it was written, and what is wrong with those
    that are newer; by their names, where they have no manifest that says so.
    """
    found, faults = _find_latest(Path(folder))
    unsaid = {path: f"{path / MANIFEST} is missing" for path in remains(Path(folder))}
    if found is not None:
        lost = [path for path in candidates(Path(folder)) if _age(path)[0] < 0]
        unsaid |= {path: f"{path / MANIFEST} is not a checkpoint's manifest" for path in lost}
    newer = [p for p in sorted(unsaid) if found is None or p.name > found.folder.name]
    return found, [*faults, *(unsaid[path] for path in newer)]


def _find_latest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    faults: list[str] = []
    for path in candidates(folder):
        try:
            found = Checkpoint.open(path)
        except CheckpointError as error:
            faults.append(str(error))
            continue
        if fault := found.fault():
            faults.append(fault)
            continue
        return found, faults
    return None, faults


def label(replica: int, replicas: int, stage: int) -> str:
    """What a part is called."""
    return f"replica-{replica}-stage-{stage}" if replicas > 1 else f"stage-{stage}"
