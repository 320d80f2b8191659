"""Fixtures of the tests that start processes."""

import pytest


@pytest.fixture(autouse=True)
def clean(no_rank_is_left: None) -> None:
    """For every test here."""
