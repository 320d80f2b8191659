"""Properties are tried on the same examples every time, and leave nothing behind."""

import tempfile

from hypothesis import HealthCheck, settings
from hypothesis.configuration import set_hypothesis_home_dir

from ..pipeline.test_server import open_server

__all__ = ["open_server"]

_home = tempfile.TemporaryDirectory(prefix="hypothesis-")  # gone with the process
set_hypothesis_home_dir(_home.name)

settings.register_profile(
    "headrace",
    derandomize=True,
    max_examples=100,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("headrace")
