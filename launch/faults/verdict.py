"""What must be true of a job that has come to its end, whatever befell it."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .job import Job, LostError
from .workload import EVERY, KEEP, MINI_BATCHES

__all__ = ["check", "final_weights"]

OWN = r"config\.yaml|metrics\.jsonl|summary\.json|weights\.pt|checkpoints|events\.out\.tfevents\..*"


def final_weights(job: Job) -> dict[str, Tensor]:
    """What a run has come to."""
    found: dict[str, Tensor] = torch.load(job.run / "weights.pt", weights_only=True)
    return found


def check(job: Job, undisturbed: Mapping[str, Tensor]) -> None:
    """See that a job that ended is whole, and what it would have been.

    Raises:
        LostError: it is not; with what differs.
    """
    job.check_checkpoints()
    _check_files(job)
    _check_metrics(job.run / "metrics.jsonl")
    weights = final_weights(job)
    if weights.keys() != undisturbed.keys():
        raise LostError(f"the weights are {sorted(weights)}, not {sorted(undisturbed)}")
    differs = [name for name, w in weights.items() if not torch.equal(w, undisturbed[name])]
    if differs:
        most = max(float((weights[n] - undisturbed[n]).abs().max()) for n in differs)
        raise LostError(
            f"{len(differs)} of {len(weights)} weights are not those of an undisturbed run "
            f"({', '.join(differs[:4])} …; by {most:.3g} at most)"
        )


def _check_files(job: Job) -> None:
    """No more than an undisturbed run leaves, and the last checkpoint among it."""
    strange = [p.name for p in job.run.iterdir() if not re.fullmatch(OWN, p.name)]
    strange += [p.name for p in job.run.parent.iterdir() if p != job.run]
    folders = [path.name for _, path in job.saved()]
    strange += [p.name for p in job.checkpoints.iterdir() if p.name not in folders]
    if strange:
        raise LostError(f"files are left: {', '.join(sorted(strange))}")
    last = [number for number, _ in job.saved()]
    if last[-1] != MINI_BATCHES or len(last) != KEEP:
        raise LostError(
            f"the checkpoints are of mini-batches {last}: there should be {KEEP}, every {EVERY}, "
            f"and the last of {MINI_BATCHES}"
        )


def _check_metrics(file: Path) -> None:
    """Each epoch is told once."""
    lines = file.read_text().splitlines()
    epochs = [m[1] for line in lines if (m := re.match(r'{"event": "epoch".*"epoch": (\d+)', line))]
    if epochs != sorted(set(epochs), key=int):
        raise LostError(f"metrics.jsonl tells of epochs {', '.join(epochs)}")
