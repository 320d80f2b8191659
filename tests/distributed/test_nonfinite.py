"""What is not finite is found where it arose, said with all that helps, or skipped."""

import math
import re

import pytest

from ..pipeline.helpers import assert_same
from .nonfinite import AT, COUNT, Poison, train_poisoned
from .ranks import Launcher

pytestmark = pytest.mark.timeout(120)

FLUSH = (("schedule", "1f1b"),)
SKIP = (("on_nonfinite", "skip"),)

FOUND = {
    "a weight of the first stage": (Poison("weight", 0), 0, 0, "output of layer '0' (Linear)"),
    "a weight of the second": (Poison("weight", 3), 1, 0, "output of layer '3' (Linear)"),
    "a weight of the last": (Poison("weight", 6), 2, 0, "output of layer '6' (Linear)"),
    "an input": (Poison("input"), 0, AT, "its input is not finite: look at the data"),
    "an infinite input": (Poison("input", value=math.inf), 0, AT, "its input is not finite"),
    "a target": (Poison("target"), 2, AT, "the loss is not finite, the model's output is"),
    "a loss": (Poison("loss"), 2, AT, "the loss is not finite, the model's output is"),
    "an output of the first stage": (Poison("output", 1), 0, AT, "output of layer '1' (Fragile)"),
    "an output of the second": (
        Poison("output", 4, math.inf), 1, AT, "output of layer '4' (Fragile)"
    ),
    "a gradient of the first stage": (
        Poison("gradient", 1), 0, AT, "gradient in layer '1' (Fragile)"
    ),
    "a gradient of the last": (
        Poison("gradient", 7, -math.inf), 2, AT, "gradient in layer '7' (Fragile)"
    ),
    "an input of a stage that does not learn": (
        Poison("input", frozen=3), 0, AT, "its input is not finite"
    ),
    "an output of a stage that does not learn": (
        Poison("output", 1, frozen=6), 0, AT, "output of layer '1' (Fragile)"
    ),
    "an output, under a flush": (
        Poison("output", 4, options=FLUSH), 1, AT, "output of layer '4' (Fragile)"
    ),
    "a gradient that leaves its stage": (
        Poison("gradient", 4, options=(("balance", [4, 3, 2]),)),
        1, AT, "gradient in layer '4' (Fragile)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", FOUND)
def test_found(launcher: Launcher, what: str) -> None:
    """In the stage where it arose, though the last stage's loss is what shows it first."""
    poison, stage, micro_batch, says = FOUND[what]
    outcome = launcher.run(train_poisoned, 3, poison)
    outcome.expect(1, 1, 1)
    head = f"headrace: stage {stage} of 3 (rank {stage}) failed: stage {stage} of 3, micro-batch "
    assert outcome.report.startswith(f"{head}{micro_batch}: "), f"{outcome}"
    assert says in outcome.report
    staleness = 0 if poison.options == FLUSH else min(2 - stage, micro_batch)
    assert f". Staleness {staleness} updates, effective learning rate" in outcome.report
    rate = re.search(r"η/\(1.m\) = ([\d.]+|nan)\. Try a lower", outcome.report)
    assert rate and rate[1] == ("nan" if poison.frozen else "0.004")


SKIPPED = {
    "an output": (Poison("output", 4, options=SKIP), [3, 3, 3]),
    "a gradient": (Poison("gradient", 4, options=SKIP), [3, 3, 0]),
    "a target": (Poison("target", options=SKIP), [3, 3, 3]),
    "a gradient, under a flush": (Poison("gradient", 4, options=(*SKIP, *FLUSH)), [3, 3, 3]),
    "a gradient, of three": (
        Poison("gradient", 4, options=(*SKIP, ("update_every", 3))), [3, 3, 0]
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", SKIPPED)
def test_skipped(launcher: Launcher, what: str) -> None:
    """Each stage skips what is not finite there; under a flush, all do together."""
    poison, skipped = SKIPPED[what]
    outcome = launcher.run(train_poisoned, 3, poison)
    outcome.expect(0, 0, 0)
    alone = train_poisoned(poison, alone=True)
    for result in outcome.results:
        assert [row.skipped for row in result.statistics] == skipped
        updates = 3 * COUNT // (3 if what.endswith("of three") else 1)
        assert [row.updates for row in result.statistics] == [updates] * 3, "skips are counted"
        assert all(weight.isfinite().all() for weight in result.weights.values())
        assert_same(result.weights, alone.weights)
