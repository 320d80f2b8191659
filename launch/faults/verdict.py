"""What must be true of a job that has come to its end, whatever befell it."""

import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .job import Job, LostError
from .workload import BATCH, EPOCHS, EVERY, KEEP, MINI_BATCHES

__all__ = ["check", "final_weights"]

OWN = r"config\.yaml|metrics\.jsonl|summary\.json|weights\.pt|checkpoints|events\.out\.tfevents\..*"


def final_weights(job: Job) -> dict[str, Tensor]:
    """What a run has come to."""
    found: dict[str, Tensor] = torch.load(job.run / "weights.pt", weights_only=True)
    return found


def check(job: Job, undisturbed: Mapping[str, Tensor] | None) -> None:
    """See that a job that ended is whole, and what it would have been.

    Args:
        undisturbed: the weights that it would have; None where no two runs have the same.

    Raises:
        LostError: it is not; with what differs.
    """
    job.check_checkpoints()
    _check_files(job)
    _check_metrics(job)
    _check_counts(job)
    weights = final_weights(job)
    if bad := [name for name, w in weights.items() if not w.isfinite().all()]:
        raise LostError(f"the weights {', '.join(bad)} are not finite")
    if undisturbed is not None:
        _compare(weights, undisturbed)


def _compare(weights: Mapping[str, Tensor], undisturbed: Mapping[str, Tensor]) -> None:
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
    if last[-1:] != [MINI_BATCHES] or len(last) != KEEP:
        raise LostError(
            f"the checkpoints are of mini-batches {last}: there should be {KEEP}, every {EVERY}, "
            f"and the last of {MINI_BATCHES}"
        )


def _check_metrics(job: Job) -> None:
    """Each epoch is told once."""
    lines = (job.run / "metrics.jsonl").read_text().splitlines()
    epochs = [m[1] for line in lines if (m := re.match(r'{"event": "epoch".*"epoch": (\d+)', line))]
    if epochs != [str(1 + k) for k in range(EPOCHS)]:
        raise LostError(f"metrics.jsonl tells of epochs {', '.join(epochs)}")


def _check_counts(job: Job) -> None:
    """Every sample was trained on once, and every update made once, by stages and by servers."""
    summary, workload, grid = _summary(job), job.workload, job.grid
    many = MINI_BATCHES
    late = 0 if workload.pipeline["schedule"] == "1f1b" else grid.stages - 1  # for the last report
    wanted: dict[str, Any] = {
        "samples": (many - late) * BATCH,
        "updates": [many] * grid.stages * grid.replicas,
        "skipped": workload.skips(grid.stages) * grid.replicas,
        "pushed": [{str(r): many for r in range(grid.replicas)}] * grid.servers,
        "applied": [many * grid.replicas] * grid.servers,
    }
    found = {
        "samples": summary["samples"],
        "updates": [stage["updates"] for stage in summary["stages"]],
        "skipped": [stage["skipped"] for stage in summary["stages"]],
        "pushed": [server["pushed"] for server in summary.get("servers", [])],
        "applied": [server["updates"] for server in summary.get("servers", [])],
    }
    for name, value in wanted.items():
        if found[name] != value:
            raise LostError(f"summary.json counts {name}: {found[name]}, not {value}")


def _summary(job: Job) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((job.run / "summary.json").read_text())
    return found
