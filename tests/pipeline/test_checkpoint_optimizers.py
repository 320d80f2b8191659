"""What optimizers of a user's own keep beside the state of weights and groups."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headrace.pipeline import Pipeline
from headrace.pipeline.checkpoints import Checkpoint, CheckpointError

from .helpers import assert_close, assert_same, batches_of, tanh_net

SIZES = {1: [16], 2: [9, 7], 3: [5, 6, 5]}
BATCHES = batches_of(20, 5)


class Common(torch.optim.SGD):
    """Counts its steps in a state of no weight's, and slows down with them."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr=lr)
        self.state["step"] = 0  # type: ignore[index]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.state["step"] += 1  # type: ignore
        for group in self.param_groups:
            group["lr"] = 0.1 / self.state["step"]  # type: ignore
        super().step()


class Adding(torch.optim.SGD):
    """Does so in a state_dict of its own."""

    def __init__(self, params: Any, counted: Any = 0) -> None:
        super().__init__(params, lr=0.1)
        self.counted = counted

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.counted += 1
        for group in self.param_groups:
            group["lr"] = float(0.1 / self.counted)
        super().step()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"counted": self.counted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counted = state["counted"]
        super().load_state_dict({k: v for k, v in state.items() if k != "counted"})


class Listing(Adding):
    """Has one of the counts of its weights."""

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"counts": [self.counted]}


def adding_a_tensor(params: Any) -> Adding:
    return Adding(params, torch.zeros(1, dtype=torch.float64))


def built(optimizer: Callable[[Any], Any], stages: int, net: int = 0) -> Pipeline:
    return Pipeline(
        tanh_net(net), nn.MSELoss(), optimizer, stages=stages, balance=SIZES[stages],
        schedule="1f1b", micro_batches=2,
    )  # fmt: skip


def on(stages: int, optimizer: Any, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights of a run of two stages, and of one that goes on from its checkpoint."""
    whole, again = built(optimizer, 2), built(optimizer, stages, net=9)
    whole.train(BATCHES)
    whole.save(folder)
    again.load(folder)
    for pipe in (whole, again):
        pipe.train(BATCHES)
    return whole.state_dict(), again.state_dict()


@pytest.mark.parametrize("optimizer", (Common, Adding, adding_a_tensor))
def test_it_is_kept(optimizer: Any, tmp_path: Path) -> None:
    """One ended training at the first save, and the other was lost without a word."""
    assert_same(*on(2, optimizer, tmp_path / "one"))
    for stages in (1, 3):
        weights, again = on(stages, optimizer, tmp_path / str(stages))
        assert_close(again, weights, 1e-12)


def test_what_no_other_cut_can_have(tmp_path: Path) -> None:
    assert_same(*on(2, Listing, tmp_path / "one"))
    text = (
        "the checkpoint's Listing keeps 'counts', which is of no one weight, and no number that all"
    )
    with pytest.raises(CheckpointError, match=text):
        built(Listing, 1).load(tmp_path / "one")


def test_what_stages_have_unlike(tmp_path: Path) -> None:
    made: list[Adding] = []

    def make(params: Any) -> Adding:
        made.append(Adding(params, counted=len(made)))
        return made[-1]

    pipe = built(make, 2)
    pipe.train(BATCHES)
    pipe.save(tmp_path / "one")
    assert Checkpoint.open(tmp_path / "one").state("stage-1")["optimizers"][0]["added"] == {
        "counted": 5
    }
    with pytest.raises(CheckpointError, match="keeps 'counted', which is of no one weight"):
        built(make, 1).load(tmp_path / "one")
