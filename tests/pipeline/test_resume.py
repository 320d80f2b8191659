"""A run that is gone on with from a checkpoint is, bit for bit, the one that went on by itself."""

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, TensorDataset

from headrace.pipeline import Pipeline, Report
from headrace.pipeline.checkpoints import Checkpoint, Checkpoints, Position
from headrace.pipeline.corrections import BasisRotation
from headrace.pipeline.corrections.correction import Correction

from ..distributed.training import CASES, SIZES
from .helpers import assert_close, assert_same, batches_of, momentum, tanh_net
from .resuming import make_loader, run_all


@pytest.mark.parametrize("name", CASES)
def test_exactly(name: str, tmp_path: Path) -> None:
    count = 0
    for _, start, whole, again in run_all(tmp_path, SIZES[3], [name]):
        count += 1
        assert_same(again.weights, whole.weights)
        last = max(whole.reports)
        assert again.reports[last] == whole.reports[last], start.name
        assert again.statistics == whole.statistics
        assert again.evaluation == whole.evaluation
    assert count == 3, "after 4, 8 and 12 of 14 mini-batches"


@pytest.mark.parametrize("measures", (False, True), ids=("cut as told", "cut by time"))
def test_persistent_workers(tmp_path: Path, measures: bool) -> None:
    """They are started once, for measuring it may be, and draw a seed then."""
    data = TensorDataset(torch.randn(40, 4), torch.randn(40, 2))

    def run(seed: int, start: Path | None) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        loader = DataLoader(
            data,
            batch_size=4,
            shuffle=True,
            num_workers=1,
            persistent_workers=True,
            generator=torch.Generator().manual_seed(seed),
        )
        balance = "time" if measures else [2, 1]
        with Pipeline(model, nn.MSELoss(), momentum, stages=2, balance=balance) as pipe:
            if start is not None:
                pipe.load(start)
            while pipe.position.epochs < 2:
                pipe.train(loader, checkpoints=Checkpoints(tmp_path / str(seed), 7, keep=9))
            return pipe.state_dict()

    whole = run(1, None)
    starts = sorted((tmp_path / "1").iterdir())
    assert len(starts) == 2, "one in each of two passes"
    for k, start in enumerate(starts):
        assert_same(run(2 + k, start), whole)


def test_weights_that_lie_as_channels_last(tmp_path: Path) -> None:
    """They could not be written. What is computed with them depends on how they lie."""
    data = [(torch.randn(4, 3, 6, 6), torch.randn(4, 5)) for _ in range(6)]

    def run(seed: int, start: Path | None) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 5)
        ).to(memory_format=torch.channels_last)
        with Pipeline(net, nn.MSELoss(), momentum, stages=2, balance=[2, 3]) as pipe:
            if start is not None:
                pipe.load(start)
            pipe.train(data, checkpoints=Checkpoints(tmp_path / str(seed), 3, keep=9))
            weights = pipe.state_dict()
        assert not net[2].weight.is_contiguous(), "as it lay before"
        return weights

    whole = run(1, None)
    assert_same(run(2, tmp_path / "1/step-00000003"), whole)


LOADERS: dict[str, Callable[[], Iterable[Any]]] = {
    "loader": lambda: make_loader(3),
    "generator": lambda: (batch for batch in make_loader(3)),
}
FIRST_CALLS: dict[str, Callable[[Pipeline], Any]] = {
    "train": lambda pipe: None,
    "prepare": lambda pipe: pipe.prepare(make_loader(5)),
    "evaluate": lambda pipe: pipe.evaluate(make_loader(5)),
}


@pytest.mark.parametrize("every", (5, 7), ids=("in a pass", "at its end"))
@pytest.mark.parametrize("first", FIRST_CALLS)
@pytest.mark.parametrize("kind", LOADERS)
def test_with_a_cut_that_is_yet_to_be_measured(
    tmp_path: Path, kind: str, first: str, every: int
) -> None:
    """The place is known before the stages are; under a flush the cut changes no number."""

    def run(stages: int, start: Path | None, plan: Checkpoints) -> tuple[int, dict[str, Tensor]]:
        torch.manual_seed(8 if start else 3)
        net = tanh_net(8 if start else 3, torch.float32)
        with Pipeline(net, nn.MSELoss(), momentum, stages=stages, schedule="1f1b") as pipe:
            if start is not None:
                pipe.load(start)
                FIRST_CALLS[first](pipe)
            while pipe.position.epochs < 2:
                pipe.train(LOADERS[kind](), checkpoints=plan)
            return pipe.position.total, pipe.state_dict()

    total, weights = run(3, None, Checkpoints(tmp_path / "saved", every, keep=9))
    start, after = sorted((tmp_path / "saved").iterdir())
    assert total == 14 and start.name == f"step-{every:08d}"
    total, again = run(2, start, Checkpoints(tmp_path / "again", every, keep=9))
    assert total == 14
    assert_close(again, weights, 1e-6)
    assert [path.name for path in (tmp_path / "again").iterdir()] == [after.name]


class Drawing(Sampler[int]):
    """Draws each next one when it is asked for it: what is left hangs on all that was drawn."""

    def __len__(self) -> int:
        return 32

    def __iter__(self) -> Iterator[int]:
        left = list(range(32))
        while left:
            yield left.pop(int(torch.randint(len(left), ())))


def drawing_run(
    first: nn.Module, seed: int, start: Path | None, plan: Checkpoints | None
) -> tuple["DataLoader[Any]", dict[str, Tensor]]:
    x = torch.randn(32, 5, generator=torch.Generator().manual_seed(1))
    loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), 4, sampler=Drawing())
    torch.manual_seed(seed)
    model = nn.Sequential(first, nn.Linear(5, 1))
    with Pipeline(model, nn.MSELoss(), momentum, stages=1, balance="parameters") as pipe:
        if start is not None:
            pipe.load(start)
        while pipe.position.epochs < 2:
            pipe.train(loader, checkpoints=plan)
        return loader, pipe.state_dict()


def test_a_loader_that_draws_between_the_draws_of_layers(tmp_path: Path) -> None:
    """Dropped mini-batches go without those of the layers, and yet its order is to be the same."""
    plan = Checkpoints(tmp_path / "saved", 5, keep=9)
    whole = drawing_run(nn.Dropout(0.3), 1, None, plan)[1]
    starts = sorted((tmp_path / "saved").iterdir())
    assert len(starts) == 3
    for start in starts:
        plan = Checkpoints(tmp_path / "again", 5, keep=9)
        assert_same(drawing_run(nn.Dropout(0.3), 2, start, plan)[1], whole)


def test_a_loader_that_alone_draws_does_so_as_in_a_plain_loop() -> None:
    loader, piped = drawing_run(nn.Identity(), 1, None, None)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Identity(), nn.Linear(5, 1))
    optimizer = momentum(model.named_parameters())
    for _ in range(2):
        for x, target in loader:
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), target).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    assert_same(piped, model.state_dict())


@pytest.mark.parametrize("at", (3, 6), ids=("amid the pass", "at its last mini-batch"))
def test_after_a_sigterm_the_report_is_of_the_whole_call(at: int, tmp_path: Path) -> None:
    """Else what was trained on before it is in no report, and the counts of a run fall behind."""
    batches = batches_of(70, 10)

    def pipeline() -> Pipeline:
        net = tanh_net(0)
        return Pipeline(net, nn.MSELoss(), momentum, stages=2, balance=[9, 7], schedule="1f1b")

    def stopping() -> Iterator[tuple[Tensor, Tensor]]:
        for number, batch in enumerate(batches):
            if number == at:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    with pipeline() as whole:
        expected = [whole.train(batches), whole.train(batches)]
    stopped = pipeline()
    with pytest.raises(SystemExit) as ended:
        stopped.train(stopping(), checkpoints=Checkpoints(tmp_path))
    assert ended.value.code == 0
    with pipeline() as again:
        assert again.load(tmp_path).mini_batches == at + 1
        reports = [again.train(batches), again.train(batches)]
    assert [replace(report, seconds=0.0) for report in reports] == [
        replace(report, seconds=0.0) for report in expected
    ]
    assert reports[0].samples == reports[1].samples == 70


@pytest.mark.parametrize("every", (None, 9))
def test_a_sigterm_after_the_last_mini_batch(every: int | None, tmp_path: Path) -> None:
    """Another pass begins by saving; anything else ends as it would have without checkpoints."""

    def stop(report: Report) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def leave(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    data, plan, codes = batches_of(70, 10), Checkpoints(tmp_path, every), []
    calls: tuple[Callable[[Pipeline], Any], ...] = (
        lambda pipe: pipe.train(data, checkpoints=plan),
        lambda pipe: pipe.evaluate(data),
        lambda pipe: pipe.train(data),
    )
    before = signal.signal(signal.SIGTERM, leave)
    try:
        for call in calls:
            pipe = Pipeline(tanh_net(0), nn.MSELoss(), momentum, stages=2, balance=[9, 7])
            pipe.train(data, checkpoints=plan, at_end=stop)
            with pytest.raises(SystemExit) as ended:
                call(pipe)
            codes.append(ended.value.code)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert codes == [0, 128 + signal.SIGTERM, 128 + signal.SIGTERM]
    assert Checkpoint.open(tmp_path).position == Position(1, 0, 7, 7, 70)


@pytest.mark.parametrize("again", ((1, [BasisRotation()]), (3, [BasisRotation()]), (2, [])))
def test_moments_that_a_correction_turned(
    again: tuple[int, list[Correction]], tmp_path: Path
) -> None:
    """On another cut, or without it, the first ones are Adam's own: averages of gradients, which
    here are of weights that stand still.
    """
    data = batches_of(70, 10)

    def built(stages: int, corrections: list[Correction]) -> Pipeline:
        standing = partial(torch.optim.AdamW, lr=0.0)
        return Pipeline(
            tanh_net(0), nn.MSELoss(), standing, stages=stages,
            balance="parameters", corrections=corrections,
        )  # fmt: skip

    def moments(pipe: Pipeline) -> dict[str, tuple[Tensor, Tensor]]:
        pipe.save(tmp_path / "seen")
        seen = Checkpoint.open(tmp_path / "seen")
        states = [seen.state(f"stage-{j}")["optimizers"][0]["state"] for j in range(pipe.stages)]
        return {n: (a["exp_avg"], a["exp_avg_sq"]) for each in states for n, a in each.items()}

    with built(2, []) as plain, built(2, [BasisRotation()]) as turning:
        for pipe in (plain, turning):
            pipe.train(data)
        turned, straight = moments(turning), moments(plain)
        turning.save(tmp_path / "turned")
    assert any(not torch.allclose(turned[n][0], straight[n][0]) for n in straight)
    with built(*again) as pipe:
        pipe.prepare(data)
        pipe.load(tmp_path / "turned")
        found = moments(pipe)
    for name, (first, second) in straight.items():
        torch.testing.assert_close(found[name][0], first, rtol=1e-9, atol=1e-12)
        assert found[name][1].min() >= 0 and second.shape == found[name][1].shape
