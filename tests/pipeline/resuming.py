"""A run that saves and goes on, and the same one gone on with from each of its checkpoints."""

import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from headrace.pipeline import Pipeline
from headrace.pipeline.checkpoints import Checkpoints

from ..distributed.training import CASES, network

__all__ = ["Ending", "Jittered", "go_on", "make_loader", "run_all"]

EPOCHS = 2
BATCH = 9


class Jittered(Dataset[tuple[Tensor, Tensor]]):
    """Regression data that draws from torch's and Python's random states for every sample."""

    def __init__(self, samples: int = 60) -> None:
        generator = torch.Generator().manual_seed(11)
        self.x = torch.randn(samples, 5, generator=generator)
        self.y = torch.randn(samples, 3, generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, k: int) -> tuple[Tensor, Tensor]:
        return self.x[k] + 0.1 * torch.randn(5) + 0.1 * random.gauss(0, 1), self.y[k]


@dataclass(frozen=True)
class Ending:
    """What became of a run."""

    weights: dict[str, Tensor]
    reports: dict[int, dict[str, Any]]
    statistics: list[dict[str, Any]]
    evaluation: dict[str, float]


def make_loader(seed: int, samples: int = 60) -> "DataLoader[Any]":
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(Jittered(samples), batch_size=BATCH, shuffle=True, generator=generator)


def go_on(
    name: str,
    sizes: list[int],
    plan: Checkpoints | None,
    start: Path | None = None,
    seed: int = 3,
    device: str | None = None,
) -> Ending:
    """Train to the end, from the beginning or from a checkpoint.

    Args:
        sizes: layers of each stage; all in one process, unless under torchrun.
        seed: of the first weights, and of all else that is drawn.
    """
    torch.manual_seed(seed)
    random.seed(seed)
    case, loader, reports = CASES[name], make_loader(seed), {}
    alone = None if torch.distributed.is_torchelastic_launched() else len(sizes)
    options = case.options(len(sizes))
    # The first weights of synthesizers and heads are drawn from a seed that is the user's choice.
    options.setdefault("seed", 29)
    with Pipeline(
        network(),
        nn.MSELoss(),
        case.optimizer,
        balance=sizes,
        stages=alone,
        device=device,
        **options,
    ) as pipe:
        if start is not None:
            pipe.load(start)
        while (epoch := pipe.position.epochs) < EPOCHS:
            report = asdict(pipe.train(loader, checkpoints=plan))
            reports[epoch] = {k: v for k, v in report.items() if k != "seconds"}
        statistics = [
            {k: v for k, v in asdict(row).items() if k not in ("busy", "waiting", "data", "copies")}
            for row in pipe.statistics()
        ]
        evaluation = pipe.evaluate(DataLoader(Jittered(), batch_size=20))
        return Ending(pipe.state_dict(), reports, statistics, evaluation)


def run_all(
    folder: Path,
    sizes: list[int],
    names: list[str],
    every: int | None = 4,
    device: str | None = None,
) -> Iterator[tuple[str, Path, Ending, Ending]]:
    """Each case's run, and what becomes of it gone on with from each checkpoint of its."""
    for name in names:
        place = folder / name.replace(" ", "-").replace(",", "")
        whole = go_on(name, sizes, Checkpoints(place / "saved", every, keep=99), device=device)
        for start in sorted((place / "saved").iterdir()):
            plan = Checkpoints(place / "again", every, keep=99)
            yield name, start, whole, go_on(name, sizes, plan, start, 8, device)
