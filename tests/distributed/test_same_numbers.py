"""In one process and on as many ranks as stages: bitwise the same numbers, told to every rank."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from ..pipeline.helpers import assert_same
from .ranks import TRANSPORTS, Launcher
from .training import CASES, Account, run_cases

pytestmark = pytest.mark.timeout(120)

Accounts = tuple[dict[str, Account], list[dict[str, Account]]]

FEW = [
    "current",
    "replay, slack 1, every 3",
    "predict, slack 1, every 3, cut in 2",
    "stash, bfloat16, another seed",
    "last update predicted, spikes, gap-aware, slack 1",
    "pipemare",
    "synthetic, told, lag 0, every 3",
    "synthetic, full unlock, p_update",
    "stash, the variance test",
    "local, gpipe",
    "1f1b, every 3, skip",
]
"""A case of each kind, for a third stage and for another transport."""

KINDS: dict[str, tuple[int, str, list[str]]] = {
    "2 stages, one host": (2, "one host", [*CASES]),
    "3 stages, one host": (3, "one host", FEW),
    "4 stages, one host": (4, "one host", [*CASES]),
    "3 stages, hosts apart": (3, "hosts apart", FEW),
}


@pytest.fixture(scope="module")
def run(launcher: Launcher) -> Callable[[str], Accounts]:
    """Run a kind's cases, once: the accounts of one process alone, and of each rank."""

    @cache
    def run(kind: str) -> Accounts:
        stages, transport, names = KINDS[kind]
        how: dict[str, Any] = {"seconds": 100, "environment": TRANSPORTS[transport]}
        outcome = launcher.run(run_cases, stages, stages, False, None, names, **how)
        outcome.expect(*[0] * stages)
        return run_cases(stages, alone=True, names=names), outcome.results

    return run


each_case = pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, (*_, names) in KINDS.items() for name in names]
)


@each_case
def test_one_process_and_many(run: Callable[[str], Accounts], kind: str, name: str) -> None:
    accounts = run(kind)
    alone, ranks = accounts[0][name], [account[name] for account in accounts[1]]
    assert_same(ranks[0].halfway, alone.halfway)
    assert_same(ranks[0].weights, alone.weights)
    assert ranks[0].reports == alone.reports
    assert ranks[0].evaluations == alone.evaluations
    assert ranks[0].statistics == alone.statistics
    assert ranks[0].depths == alone.depths
    assert ranks[0].predictions.equal(alone.predictions)
    assert ranks[0].progress == alone.progress, "what the first stage logs"
    assert alone.progress, "nothing was logged"


@each_case
def test_every_rank_is_told_the_same(run: Callable[[str], Accounts], kind: str, name: str) -> None:
    accounts = run(kind)
    first, *others = [account[name] for account in accounts[1]]
    for other in others:
        assert_same(other.halfway, first.halfway)
        assert_same(other.weights, first.weights)
        assert other.reports == first.reports
        assert other.evaluations == first.evaluations
        assert other.statistics == first.statistics
        assert other.depths == first.depths
        assert other.predictions.equal(first.predictions)
        assert not other.progress, "only the first stage logs"


@each_case
def test_every_rank_has_its_own_parameters(
    run: Callable[[str], Accounts], kind: str, name: str
) -> None:
    accounts = run(kind)
    ranks = [account[name] for account in accounts[1]]
    names = [n for rank in ranks for n in rank.own]
    assert names == list(accounts[0][name].own), "each in one stage, in the model's order"
    for j, rank in enumerate(ranks):
        assert all(rank.own[n].equal(rank.weights[n]) for n in rank.own)
        assert rank.version == rank.statistics[j]["updates"]
