"""What a stage has to keep beside its weights, and how it takes that on again.

Nothing is in flight when it is asked: a checkpoint is made of a pipeline that has drained.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..batch_size.sampled import Sampled
from ..corrections.basis_rotation import straighten
from ..gradient import Gradient
from ..random_state import RandomState
from ..stateful import get, put
from .optimizers import load_optimizers, optimizer_states
from .schedulers import load_schedulers, scheduler_states
from .schema import check_alike, check_sums

if TYPE_CHECKING:
    from ..engine import Engine
    from ..stage import Stage

__all__ = ["collect", "recut", "restore"]

COUNTS = ("version", "skipped", "closed", "latest_samples", "latest_staleness")
"""What all stages have alike."""

OWN = ("staleness", "lag", "latest_lag", "most_in_flight", "gradient", "kit", "rule", "peers")


def collect(engine: "Engine") -> dict[str, Any]:
    """All that a stage needs to go on, but its weights; tensors are its own, not copies."""
    stage = engine.stage
    assert not stage.flights, "nothing may be in flight"
    return {
        "optimizers": optimizer_states(stage.optimizers, stage.owned),
        "schedulers": scheduler_states(stage.schedulers),
        "counts": {name: getattr(stage, name) for name in COUNTS},
        "own": {name: get(getattr(stage, name)) for name in OWN},
        "turned": [k for k, each in enumerate(stage.kit.corrections) if each.turns_moments],
        "sampled": tuple(stage.sampled),
        "random": (stage.random or RandomState.capture(stage.device)).state_dict(),
        "trained": engine.trained,
        "within": engine.within,
        "gathering": engine.gathering.state_dict(),
        "books": engine.books.state_dict(),
    }


def restore(engine: "Engine", saved: Mapping[str, Any], depths: Sequence[int]) -> None:
    """Be the same stage of the same cut, with its weights loaded already.

    Args:
        depths: of each stage, as they are to be.

    Raises:
        ValueError, KeyError, …: the state is of other optimizers, rules or corrections, or damaged.
    """
    stage = engine.stage
    for name in OWN:
        check_alike(name, get(getattr(stage, name)), saved["own"][name])
    if len(saved["books"]["_numbers"]) != len(engine.books.state_dict()["_numbers"]):
        raise ValueError(f"books/_numbers has {len(saved['books']['_numbers'])} numbers")
    check_alike("sampled", tuple(stage.sampled), saved["sampled"])
    _check_gradient(stage, saved["own"]["gradient"])
    _restore_optimizers(stage, [saved])
    for name in OWN:
        setattr(stage, name, put(getattr(stage, name), saved["own"][name], stage.device))
    stage.sampled = Sampled(*saved["sampled"])
    if stage.random is not None:
        stage.random.load_state_dict(saved["random"])
    else:
        state = RandomState.capture(stage.device)
        state.load_state_dict(saved["random"])
        state.restore()
    _restore_counts(engine, saved, tuple(depths))
    engine.books.load_state_dict(saved["books"], torch.device("cpu"))


def recut(engine: "Engine", saved: Sequence[Mapping[str, Any]]) -> None:
    """Be a stage of another cut: what its layers' names lead to, and what all stages have alike.

    Args:
        saved: of each stage that there was.
    """
    stage, saved = engine.stage, [_straightened(each) for each in saved]
    _restore_optimizers(stage, saved)
    _check_gradient(stage, saved[0]["own"]["gradient"])
    gradient = Gradient(measures=stage.gradient.measures)
    gradient.load_state_dict(saved[0]["own"]["gradient"], stage.device)
    sums = {n: g for each in saved for n, g in each["own"]["gradient"]["sums"].items()}
    check_sums("gradient/sums", stage.trainable, sums)
    gradient.sums = {n: sums[n].to(stage.device) for n in stage.trainable if n in sums}
    stage.gradient = gradient
    for correction in stage.kit.corrections:
        correction.catch_up(saved[0]["counts"]["version"])
    stage.staleness, stage.lag = Counter(), Counter()
    _restore_counts(engine, saved[0], engine.depths)
    engine.books.load_state_dict(
        {**saved[0]["books"], "_numbers": engine.books.state_dict()["_numbers"]},
        torch.device("cpu"),
    )


def _straightened(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same with optimizers as they are without what turns their moments."""
    optimizers = saved["optimizers"]
    for k in saved.get("turned", ()):
        bases = saved["own"]["kit"]["corrections"][k]
        optimizers = [{**each, "state": straighten(each["state"], bases)} for each in optimizers]
    return {**saved, "optimizers": optimizers}


def _restore_optimizers(stage: "Stage", saved: Sequence[Mapping[str, Any]]) -> None:
    load_optimizers(stage.optimizers, stage.owned, [each["optimizers"] for each in saved])
    load_schedulers(stage.schedulers, stage.optimizers, stage.owned, saved)


def _check_gradient(stage: "Stage", saved: Mapping[str, Any]) -> None:
    check_alike("gradient", stage.gradient.state_dict(), saved)
    check_alike("gradient/versions", [0] * len(saved["versions"]), saved["versions"], counts=True)
    check_sums("gradient/sums", stage.trainable, saved["sums"])


def _check_books(now: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    check_alike("books", now, saved)
    for name in ("_fed", "_sums", "_version"):
        check_alike(f"books/{name}", now[name], saved[name], counts=True)
    if not math.isfinite(saved["_skipped"]):
        raise ValueError(f"books/_skipped is {saved['_skipped']}, and is to be a finite number")


def _restore_counts(engine: "Engine", saved: Mapping[str, Any], depths: tuple[int, ...]) -> None:
    now = {name: getattr(engine.stage, name) for name in COUNTS}
    check_alike("counts", now, saved["counts"], counts=True)
    check_alike("gathering", engine.gathering.state_dict(), saved["gathering"], counts=True)
    _check_books(engine.books.state_dict(), saved["books"])
    check_alike("within", engine.within, saved["within"])
    check_alike("trained", engine.trained, saved["trained"], counts=True)
    for name in COUNTS:
        setattr(engine.stage, name, saved["counts"][name])
    engine.gathering.load_state_dict(saved["gathering"], torch.device("cpu"))
    engine.within = saved["within"]
    engine.go_on(saved["trained"], depths)
