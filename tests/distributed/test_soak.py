"""Nothing grows in a short soak, and what does is named."""

import re
import sys

import pytest

from .commands import UNDER_TORCHRUN
from .ranks import Launcher
from .soaking import LEAKS, run_leaking_soak, run_soak

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc"),
]


def test_nothing_grows(launcher: Launcher) -> None:
    """2,000 micro-batches, 20 checkpoints, 40 samples; time may quadruple, as others work, too."""
    pytest.importorskip("sklearn")
    arguments = ["--micro-batches", "2000", "--every", "50", "--slowdown", "4"]
    arguments += ["--checkpoint-every", "100"]
    outcome = launcher.run(run_soak, 3, arguments, seconds=100, environment=UNDER_TORCHRUN)
    outcome.expect(0, 0, 0)
    said = outcome.out[0].splitlines()
    assert said[-1] == "nothing grew"
    assert len([line for line in said if re.match(r"\| [\d,]+ \| \d+\.\d \d+\.\d", line)]) == 40
    (score,) = (line for line in said if "accuracy" in line)
    accuracy = re.search(r"accuracy (\d\.\d+)", score)
    assert accuracy and float(accuracy[1]) > 0.85, "it learns meanwhile"
    assert outcome.out[1:] == ["", ""]


def test_each_leak_is_named(launcher: Launcher) -> None:
    """Of bytes on the first stage, objects on the second, files on the third; and nothing else."""
    pytest.importorskip("sklearn")
    arguments = ["--micro-batches", "600", "--every", "30", "--slowdown", "100"]
    outcome = launcher.run(run_leaking_soak, 3, arguments, seconds=100, environment=UNDER_TORCHRUN)
    outcome.expect(1, 1, 1)
    grew = re.findall(r"^stage (\d): ([a-z ]+):", outcome.out[0], re.M)
    assert grew == [(str(stage), what) for stage, what in enumerate(LEAKS)], f"{outcome}"
