"""What is not finite is found where it arose, said with all that helps, or skipped."""

import re

import pytest

from ..pipeline.helpers import assert_same
from .nonfinite import COUNT, FLUSH, FOUND, SKIPPED, train_poisoned
from .ranks import Launcher, Outcome

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def outcomes(launcher: Launcher) -> dict[str, Outcome]:
    cases = {f"{what}, skipped": case[0] for what, case in SKIPPED.items()}
    cases |= {what: case[0] for what, case in FOUND.items()}
    return launcher.run_many(train_poisoned, 3, cases)


@pytest.mark.parametrize("what", FOUND)
def test_found(outcomes: dict[str, Outcome], what: str) -> None:
    """In the stage where it arose, though the last stage's loss is what shows it first."""
    poison, stage, micro_batch, says = FOUND[what]
    outcome = outcomes[what]
    outcome.expect(1, 1, 1)
    head = f"headrace: stage {stage} of 3, micro-batch "
    assert outcome.report.startswith(f"{head}{micro_batch}: "), f"{outcome}"
    assert says in outcome.report
    staleness = 0 if poison.options == FLUSH else min(2 - stage, micro_batch)
    assert f". Staleness {staleness} updates, effective learning rate" in outcome.report
    rate = re.search(r"η/\(1.m\) = ([\d.]+|nan)\. Try a lower", outcome.report)
    assert rate and rate[1] == ("nan" if poison.frozen else "0.004")


@pytest.mark.parametrize("what", SKIPPED)
def test_skipped(outcomes: dict[str, Outcome], what: str) -> None:
    """Each stage skips what is not finite there; under a flush, all do together."""
    poison, skipped = SKIPPED[what]
    outcome = outcomes[f"{what}, skipped"]
    outcome.expect(0, 0, 0)
    alone = train_poisoned(poison, alone=True)
    for result in outcome.results:
        assert [row.skipped for row in result.statistics] == skipped
        updates = 3 * COUNT // (3 if what.endswith("of three") else 1)
        assert [row.updates for row in result.statistics] == [updates] * 3, "skips are counted"
        assert all(weight.isfinite().all() for weight in result.weights.values())
        assert_same(result.weights, alone.weights)
