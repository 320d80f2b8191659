"""What goes wrong in one process is said as plainly as under torchrun, by plain exceptions."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from headrace.pipeline import InputError, Pipeline

from ..distributed import failing
from ..distributed.failing import Plan, batches
from ..distributed.nonfinite import (
    COUNT,
    EPOCHS,
    FLUSH,
    FOUND,
    SKIPPED,
    train_plainly,
    train_poisoned,
)
from ..distributed.refused import REFUSED, refuse
from .helpers import assert_close, momentum


@pytest.fixture
def three_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the programs that are written for ranks ask of their surroundings."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("moment", ["forward", "backward", "evaluation"])
@pytest.mark.parametrize("stage", range(3))
def test_a_layer_that_raises(three_stages: None, stage: int, moment: str) -> None:
    """The exception itself comes through, with a note of where it was."""
    pipe = failing.build(Plan("raise", stage, moment, 5), stages=3)
    with pytest.raises(ArithmeticError, match=r"^a fuse blew") as caught:
        pipe.train(batches(9))
        pipe.evaluate(batches(2))
    trap = f"layer '{3 * stage + 1}' (Trap), "
    where = {
        "forward": f"{trap}forward of micro-batch 5",
        "backward": "backward of micro-batch 5",
        "evaluation": f"{trap}forward of micro-batch 0 without gradient",
    }[moment]
    assert caught.value.__notes__ == [f"headrace: in stage {stage} of 3, {where}"]
    with pytest.raises(RuntimeError, match=r"^this pipeline has ended"):
        pipe.train(batches(1))


@pytest.mark.parametrize("what", FOUND)
def test_what_is_not_finite_is_found(what: str) -> None:
    poison, stage, micro_batch, says = FOUND[what]
    head = rf"^stage {stage} of 3, micro-batch {micro_batch}: .*{re.escape(says)}"
    with pytest.raises(FloatingPointError, match=head) as caught:
        train_poisoned(poison, alone=True)
    staleness = 0 if poison.options == FLUSH else min(2 - stage, micro_batch)
    assert f". Staleness {staleness} updates, effective learning rate" in str(caught.value)
    assert "on_nonfinite='skip'" in str(caught.value), "what to try"


@pytest.mark.parametrize("what", SKIPPED)
def test_what_is_not_finite_is_skipped(what: str) -> None:
    poison, skipped = SKIPPED[what]
    result = train_poisoned(poison, alone=True)
    assert [row.skipped for row in result.statistics] == skipped
    updates = EPOCHS * COUNT // (3 if what.endswith("of three") else 1)
    assert [row.updates for row in result.statistics] == [updates] * 3, "a skip is an update"
    assert all(weight.isfinite().all() for weight in result.weights.values())


def test_a_skip_under_a_flush_leaves_the_mini_batch_out() -> None:
    """On all stages: the weights are those of a plain loop that never saw it."""
    poison, _ = SKIPPED["a gradient, under a flush"]
    assert_close(train_poisoned(poison, alone=True).weights, train_plainly(poison), 1e-6)


@pytest.mark.parametrize("name", [n for n in REFUSED if not n.endswith("stages than ranks")])
def test_refused(name: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{REFUSED[name][1]}"):
        refuse(name)


@pytest.mark.parametrize("what", ["optimizer", "scheduler", "metric", "log"])
def test_other_functions_that_raise(what: str) -> None:
    """What makes a stage's parts is refused by name; the rest comes through as it is."""

    def fail(*args: Any) -> Any:
        raise ArithmeticError(f"in the {what}")

    options: dict[str, Any] = {"scheduler": fail} if what == "scheduler" else {}
    optimizer = fail if what == "optimizer" else momentum
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    built = what in ("optimizer", "scheduler")
    says = f"^{what}= raised ArithmeticError: in the {what}" if built else f"^in the {what}"
    with pytest.raises(InputError if built else ArithmeticError, match=says):
        pipe = Pipeline(model, nn.MSELoss(), optimizer, balance=[2, 1], stages=2, **options)
        pipe.train(batches(4), log=fail if what == "log" else None, log_every=1)
        pipe.evaluate(batches(4), {"it": fail} if what == "metric" else None)


def test_too_few_samples_for_a_stage() -> None:
    """A layer's own complaint is not taken for anything else."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    pipe = Pipeline(model, nn.MSELoss(), momentum, balance=[1, 2], stages=2)
    with pytest.raises(ValueError, match=r"^Expected more than 1 value per channel") as caught:
        pipe.train([(torch.randn(1, 4), torch.randn(1, 4))])
    (note,) = caught.value.__notes__
    assert note == "headrace: in stage 1 of 2, layer '1' (BatchNorm1d), forward of micro-batch 0"
