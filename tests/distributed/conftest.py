"""Fixtures of the tests that start processes."""

from collections.abc import Iterator

import pytest

from .ranks import Launcher


@pytest.fixture(autouse=True)
def no_rank_is_left(launcher: Launcher) -> Iterator[None]:
    """Whatever became of a test, the ranks it started do not outlive it."""
    yield
    launcher.end_jobs()


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    launcher = Launcher(tmp_path_factory.mktemp("jobs"))
    yield launcher
    launcher.close()
