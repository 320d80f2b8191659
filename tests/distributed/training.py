"""A program that trains, evaluates and predicts, in many configurations, and tells all it saw."""

import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from headrace.pipeline import Pipeline, Progress
from headrace.pipeline.batch_size import Steps, VarianceTest
from headrace.pipeline.corrections import (
    AsynchronousNesterov,
    BasisRotation,
    GapAware,
    LearningRate,
    PipeMareT1,
    PipeMareT2,
    SpikeCompensation,
    SynchronousWarmUp,
    TwoVersions,
    WeightPrediction,
)
from headrace.pipeline.rules import Delayed, Local, Synthetic
from headrace.pipeline.synthesizers import Condition

from ..pipeline.helpers import adamw, halve_slowly, momentum

__all__ = ["CASES", "Account", "Case", "run_case", "run_cases", "run_one"]

SIZES = {2: [9, 7], 3: [5, 6, 5], 4: [4, 4, 4, 4]}
"""Layers per stage: not all cuts fall between the blocks of four."""


@dataclass(frozen=True)
class Case:
    """A configuration; options are the Pipeline's, made anew for each use, for so many stages."""

    options: Callable[[int], dict[str, Any]]
    optimizer: Callable[[Iterable[tuple[str, nn.Parameter]]], Optimizer] = momentum


class Noisy(nn.Module):
    """A synthesizer of one's own, with dropout."""

    def __init__(self, given: torch.Size, wanted: torch.Size, condition: Condition | None) -> None:
        super().__init__()
        self.drop, self.last = nn.Dropout(0.3), nn.Linear(given[-1], wanted[-1])

    def forward(self, h: Tensor, target: Tensor) -> Tensor:
        result: Tensor = self.last(self.drop(h))
        return result


def noisy_head(shape: torch.Size, outputs: int) -> nn.Module:
    """A head with dropout."""
    return nn.Sequential(nn.Dropout(0.3), nn.Linear(shape[-1], outputs))


def nadam(params: Iterable[tuple[str, nn.Parameter]]) -> Optimizer:
    """With weight decay, decoupled."""
    return torch.optim.NAdam(params, lr=3e-3, weight_decay=0.01, decoupled_weight_decay=True)


def _stream(weights: str, **options: Any) -> Case:
    return Case(lambda stages: {"rule": Delayed(weights=weights), **options})


CASES = {
    "current": _stream("current"),
    "stash": _stream("stash"),
    "replay": _stream("replay"),
    "predict": _stream("predict"),
    "current, slack 1": _stream("current", slack=1, scheduler=halve_slowly),
    "stash, slack 1, every 3, clip": _stream("stash", slack=1, update_every=3, clip_grad_norm=0.1),
    "replay, slack 1, every 3": _stream("replay", slack=1, update_every=3),
    "predict, slack 1, every 3, cut in 2": _stream(
        "predict", slack=1, update_every=3, micro_batches=2
    ),
    "stash, bfloat16, another seed": _stream("stash", autocast=torch.bfloat16, seed=17),
    "stash, adamw": Case(lambda stages: {"clip_grad_norm": 1.0}, adamw),
    "momentum predicted, nadam": Case(
        lambda stages: {
            "corrections": [WeightPrediction("momentum"), LearningRate("inverse_sqrt")],
            "scheduler": halve_slowly,
        },
        nadam,
    ),
    "last update predicted, nadam, basis rotation": Case(
        lambda stages: {"corrections": [WeightPrediction(), BasisRotation(refresh=2)]}, nadam
    ),
    "last update predicted, spikes, gap-aware, slack 1": Case(
        lambda stages: {
            "corrections": [WeightPrediction(), SpikeCompensation(), GapAware()],
            "slack": 1,
            "clip_grad_norm": 0.1,
        },
    ),
    "pipemare": Case(
        lambda stages: {
            "rule": Delayed("current"),
            "corrections": [SynchronousWarmUp(2), PipeMareT1(over=5), PipeMareT2()],
        },
    ),
    "two versions, nesterov": Case(
        lambda stages: {
            "corrections": [TwoVersions(), AsynchronousNesterov()],
            "update_every": 4,
        },
    ),
    "synthetic": Case(lambda stages: {"rule": Synthetic(), "clip_grad_norm": 0.1}),
    "synthetic, told, lag 0, every 3": Case(
        lambda stages: {"rule": Synthetic(conditional=True, lag=0), "update_every": 3}, adamw
    ),
    "synthetic, full unlock, p_update": Case(
        lambda stages: {
            "rule": Synthetic(inputs="synthetic", p_update=0.6),
            "autocast": torch.bfloat16,
        }
    ),
    "synthetic, own that draws": Case(
        lambda stages: {"rule": Synthetic(Noisy, conditional=True), "on_nonfinite": "skip"}
    ),
    "local, head that draws": Case(lambda stages: {"rule": Local(3, head=noisy_head)}, adamw),
    "synthetic before delayed": Case(
        lambda stages: {"rule": [Synthetic(lag=1), *[Delayed("stash")] * (stages - 1)]}
    ),
    "local": Case(lambda stages: {"rule": Local(3), "update_every": 2}),
    "local, gpipe": Case(
        lambda stages: {
            "rule": Local(3),
            "schedule": "gpipe",
            "micro_batches": 2,
            "clip_grad_norm": 0.1,
        }
    ),
    "predict, a batch that grows in steps": _stream(
        "predict", slack=1, batch_size=Steps([9, 20, 31], at=[1, 2], rate="sqrt")
    ),
    "stash, the variance test": _stream(
        "stash", micro_batches=3, batch_size=VarianceTest(9, most=40, theta=1.0)
    ),
    "full unlock, the variance test": Case(
        lambda stages: {
            "rule": Synthetic(inputs="synthetic"),
            "micro_batches": 2,
            "batch_size": VarianceTest(9, most=30),
        }
    ),
    "1f1b, a batch that grows": Case(
        lambda stages: {
            "schedule": "1f1b",
            "micro_batches": 3,
            "clip_grad_norm": 0.1,
            "batch_size": VarianceTest(9, most=30, theta=0.5),
        }
    ),
    "gpipe": Case(lambda stages: {"schedule": "gpipe", "micro_batches": 3}),
    "gpipe, clip": Case(
        lambda stages: {"schedule": "gpipe", "micro_batches": 3, "clip_grad_norm": 0.1}, adamw
    ),
    "1f1b, clip": Case(
        lambda stages: {"schedule": "1f1b", "micro_batches": 3, "clip_grad_norm": 0.1},
    ),
    "1f1b, every 3, skip": Case(
        lambda stages: {
            "schedule": "1f1b",
            "micro_batches": 2,
            "update_every": 3,
            "on_nonfinite": "skip",
            "scheduler": halve_slowly,
        },
        adamw,
    ),
}


@dataclass(frozen=True)
class Account:
    """What one process was told, all of it without clocks."""

    reports: list[dict[str, Any]]
    progress: list[dict[str, Any]]
    evaluations: list[dict[str, float]]
    predictions: Tensor
    statistics: list[dict[str, Any]]
    halfway: dict[str, Tensor]
    weights: dict[str, Tensor]
    own: dict[str, Tensor]
    depths: tuple[int, ...]
    version: int


def network() -> nn.Sequential:
    """16 layers: Linear, a norm, Dropout, Linear; four times."""
    layers: list[nn.Module] = []
    for j, (a, b) in enumerate(((5, 9), (9, 7), (7, 11), (11, 3))):
        norm = nn.BatchNorm1d(b) if j % 2 == 0 else nn.LayerNorm(b)
        layers += [nn.Linear(a, b), norm, nn.Dropout(0.2), nn.Linear(b, b)]
    return nn.Sequential(*layers)


def distance(output: Tensor, target: Tensor) -> Tensor:
    """A metric: the mean distance over the samples."""
    result: Tensor = (output - target).norm(dim=1).mean()
    return result


def run_case(
    case: Case, stages: int | None, sizes: list[int], device: str | None = None
) -> Account:
    """Train three times (twice without a drain), evaluate in the middle, look at everything."""
    torch.manual_seed(3)
    model = network()
    data = TensorDataset(torch.randn(60, 5), torch.randn(60, 3))
    shuffle = torch.Generator().manual_seed(5)
    loader = DataLoader(data, batch_size=9, shuffle=True, generator=shuffle)
    test = DataLoader(data, batch_size=16)
    reports, evaluations = [], []
    progress: list[Progress] = []
    with Pipeline(
        model,
        nn.MSELoss(),
        case.optimizer,
        balance=sizes,
        stages=stages,
        device=device,
        **case.options(len(sizes)),
    ) as pipe:
        for _ in range(2):
            reports.append(pipe.train(loader, log=progress.append, log_every=3))
        evaluations.append(pipe.evaluate(test, metrics={"distance": distance}))
        halfway = pipe.state_dict()
        reports.append(pipe.train(loader))
        evaluations.append(pipe.evaluate(loader))
        predictions = pipe.predict(test)
        assert isinstance(predictions, Tensor)
        return Account(
            reports=[_without(asdict(report), "seconds") for report in reports],
            progress=[_without(asdict(p), "samples_per_second", "busy") for p in progress],
            evaluations=evaluations,
            predictions=predictions,
            statistics=[
                _without(asdict(row), "busy", "waiting", "data") for row in pipe.statistics()
            ],
            halfway=halfway,
            weights=pipe.state_dict(),
            own={name: p.detach().cpu().clone() for name, p in pipe.named_parameters()},
            depths=pipe.depths,
            version=pipe.version,
        )


def run_cases(
    stages: int, alone: bool, device: str | None = None, names: Iterable[str] = tuple(CASES)
) -> dict[str, Account]:
    """All of them, or some, one after the other in one job."""
    many = stages if alone else None
    return {name: run_case(CASES[name], many, SIZES[stages], device) for name in names}


def run_one(name: str) -> Account:
    """One of them, as a job of its own."""
    stages = int(os.environ["WORLD_SIZE"])
    return run_case(CASES[name], None, SIZES[stages])


def _without(numbers: dict[str, Any], *clocks: str) -> dict[str, Any]:
    """Less what depends on clocks; None for a NaN, which would not equal itself."""
    return {
        name: None if value != value else value
        for name, value in numbers.items()
        if name not in clocks
    }
