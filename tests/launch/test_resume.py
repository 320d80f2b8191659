"""Which run the training command goes on with, and from which checkpoint."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from headrace.launch.config import Config, parse, to_yaml
from headrace.launch.resume import Beginning, find_beginning
from headrace.launch.run_files import RunFiles, new_folder
from headrace.pipeline import Pipeline

from ..pipeline.helpers import batches_of, momentum, tanh_net


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has a folder runs of its own."""
    monkeypatch.chdir(tmp_path)


def configure(name: str, resume: str = "auto") -> Config:
    return parse(["--config", "digits", f"--name={name}", f"--checkpoint.resume={resume}"])


def start(name: str) -> Path:
    """A run of this name, in the folder that the command would make for it."""
    folder = new_folder(Path("runs"), name)
    RunFiles(folder, to_yaml(configure(name))).close()
    return folder


def stop(name: str) -> Beginning:
    """A run of this name that was stopped; how to go on with it."""
    folder = start(name)
    return Beginning(folder, save(folder))


def finish(name: str) -> Path:
    """A run of this name that came to its end."""
    folder = start(name)
    save(folder)
    (folder / "summary.json").write_text("{}")
    return folder


def save(folder: Path) -> Path:
    path = folder / "checkpoints/step-00000003"
    with Pipeline(tanh_net(), nn.MSELoss(), momentum, stages=1) as pipe:
        pipe.train(batches_of(15, 5))
        pipe.save(path)
    return path


# auto ---------------------------------------------------------------------------------------


def test_the_newest_run_of_the_name_if_it_was_stopped() -> None:
    assert find_beginning(configure("it")) == Beginning(), "there is no folder runs"
    finish("it")
    assert find_beginning(configure("it")) == Beginning()
    for _ in range(8):
        start("it")
    tenth = stop("it")
    assert tenth.folder == Path("runs/it-10")
    assert find_beginning(configure("it")) == tenth, "9 is the larger digit"
    finish("it")
    assert find_beginning(configure("it")) == Beginning()


@pytest.mark.parametrize("first", (finish, stop), ids=("finished", "stopped"))
def test_a_name_that_ends_in_a_number(first: Callable[[str], object]) -> None:
    """The 10 of lr-10 does not make it newer than lr-10-2."""
    first("lr-10")
    second = stop("lr-10")
    assert second.folder == Path("runs/lr-10-2")
    assert find_beginning(configure("lr-10")) == second


def test_a_run_of_another_name_is_let_be() -> None:
    """Its folder is called as a tenth start of lr would be."""
    tenth = stop("lr-10")
    assert find_beginning(configure("lr")) == Beginning()
    own = stop("lr")
    assert find_beginning(configure("lr")) == own
    assert find_beginning(configure("lr-10")) == tenth


@pytest.mark.parametrize("name", ("net[1]", "a*", "x+y"))
def test_a_name_with_characters_of_a_pattern(name: str) -> None:
    stop(name)
    second = stop(name)
    assert find_beginning(configure(name)) == second


def test_a_run_that_ended_before_its_first_file() -> None:
    """Nothing in its folder can be gone on with; whose it was, nobody knows."""
    first = stop("it")
    new_folder(Path("runs"), "it")
    assert find_beginning(configure("it")) == first
    Path("runs/it-3").touch()
    assert find_beginning(configure("it")) == first


@pytest.mark.parametrize("text", (None, "", "{", "seed: 0"))
def test_checkpoints_of_nobody_knows_whom_are_not_passed_over(text: str | None) -> None:
    """To begin anew would lose them without a word."""
    stop("it")
    config = Path("runs/it/config.yaml")
    config.unlink() if text is None else config.write_text(text)
    with pytest.raises(ValueError, match=r"runs/it/config.yaml does not say which run .* runs/it "):
        find_beginning(configure("it"))
    assert find_beginning(configure("it", "runs/it")).checkpoint is not None, "as it advises"


def test_a_configuration_that_is_written_again_is_whole_at_any_time() -> None:
    """A run that goes on may be killed right then, and is to be found by its name."""
    folder = start("it")
    os.link(folder / "config.yaml", "kept")
    RunFiles(folder, "name: it").close()
    assert (folder / "config.yaml").read_text() == "name: it"
    assert Path("kept").read_text() == to_yaml(configure("it")), "replaced, not written over"


# A checkpoint that was given ------------------------------------------------------------------


@pytest.mark.parametrize("place", ("runs/old", "runs/old/checkpoints/step-00000003"))
def test_what_was_given_is_there_after_a_restart(
    monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Until the run has a checkpoint of its own."""
    given = stop("old").checkpoint
    config = configure("new", place)
    assert find_beginning(config) == Beginning(None, given)
    folder = start("new")
    monkeypatch.setattr("headrace.launch.resume.recall", {"folder": str(folder)}.get)
    assert find_beginning(config) == Beginning(folder, given)
    own = save(folder)
    assert find_beginning(config) == Beginning(folder, own)


@pytest.mark.parametrize("first", (finish, stop), ids=("finished", "stopped"))
def test_a_run_that_began_anew_does_so_after_a_restart(
    monkeypatch: pytest.MonkeyPatch, first: Callable[[str], object]
) -> None:
    """Whatever has become of the others of its name."""
    first("it")
    folder = start("it")
    stop("it")
    monkeypatch.setattr("headrace.launch.resume.recall", {"folder": str(folder)}.get)
    assert find_beginning(configure("it")) == Beginning(folder, None)
