"""One run of a simulation: train, test, and what there is to tell of it."""

import hashlib
import math
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from headrace.pipeline import Progress
from headrace.pipeline.simulation import Simulation
from headrace.pipeline.stability import StabilityWarning

from ..assemble import make_loader, make_metrics, make_model, make_pipeline, updates
from ..config import Config

__all__ = ["Outcome", "fingerprint", "simulate"]


@dataclass(frozen=True)
class Outcome:
    """What became of one run.

    Args:
        diverged: why it ended before its time; None where it did not.
        scores: of the test data, "loss" and metrics, or the loss of the last epoch without any.
        staleness: the mean of each stage's gradients, in updates.
        updates: of the first stage.
        seconds: of training, what is in flight at the end included.
        curve: samples trained on so far, and the mean loss since the point before; it ends before
            those that were in flight at the end.
        weights: `fingerprint` of the last ones.
    """

    diverged: str | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    staleness: tuple[float, ...] = ()
    updates: int = 0
    seconds: float = 0.0
    curve: tuple[tuple[int, float], ...] = ()
    weights: str = ""


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """A digest that two models share if their weights are the same, bit for bit."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + data)
    return digest.hexdigest()


def simulate(config: Config) -> Outcome:
    """Train and test in this process, as `launch.train` would under torchrun.

    Raises:
        ValueError, TypeError: something in the configuration cannot be.
        InputError: the data cannot be read, or does not fit the model.
    """
    torch.set_num_threads(config.threads or 1)  # sums would differ from machine to machine
    train = make_loader(config, "data.train", config.data.train)
    test = make_loader(config, "data.test", config.data.test) if config.data.test else None
    total = updates(config, train)
    curve: list[tuple[int, float]] = []
    seconds, before = 0.0, 0
    pipe = make_pipeline(config, make_model(config), total, kind=Simulation)

    def log(progress: Progress) -> None:
        curve.append((before + progress.samples, progress.loss))

    try:
        with pipe, warnings.catch_warnings():
            # What a delay does is what is asked here.
            warnings.simplefilter("ignore", StabilityWarning)
            for _ in range(config.epochs):
                report = pipe.train(train, log=log, log_every=config.log_every)
                before, seconds = before + report.samples, seconds + report.seconds
            start = time.perf_counter()
            pipe.drain()  # of a short run that is most of the work
            seconds += time.perf_counter() - start
            scores = {"loss": report.loss}
            if test is not None:
                scores = pipe.evaluate(test, make_metrics(config))
            stages = pipe.statistics()
            weights = fingerprint(pipe.state_dict())
    except FloatingPointError as error:
        return Outcome(str(error), curve=tuple(curve), updates=pipe.version, seconds=seconds)
    return Outcome(
        None if math.isfinite(scores["loss"]) else "the loss at the end is not finite",
        scores,
        tuple(stage.staleness_mean for stage in stages),
        stages[0].updates,
        seconds,
        tuple(curve),
        weights,
    )
