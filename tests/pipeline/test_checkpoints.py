"""Files of checkpoints: what is in them, who can read them, and what is said of damaged ones."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor, nn

from headrace.pipeline import Pipeline, Report
from headrace.pipeline.checkpoints import (
    Checkpoint,
    CheckpointError,
    Checkpoints,
    find_latest,
    load_weights,
    save_weights,
)
from headrace.pipeline.checkpoints.checkpoint import MANIFEST
from headrace.pipeline.checkpoints.files import fault_of, read_json
from headrace.pipeline.corrections import SpikeCompensation, WeightPrediction

from .helpers import adamw, assert_close, assert_same, batches_of, momentum, tanh_net

SIZES = {1: [16], 2: [9, 7], 3: [5, 6, 5], 4: [4, 4, 4, 4]}
BATCHES = batches_of(70, 10)


def pipeline(stages: int = 3, seed: int = 0, optimizer: Any = momentum, **options: Any) -> Pipeline:
    net = tanh_net(seed)
    return Pipeline(net, nn.MSELoss(), optimizer, stages=stages, balance=SIZES[stages], **options)


def saved(folder: Path, stages: int = 3, **options: Any) -> dict[str, Tensor]:
    """A checkpoint there, and the weights that are in it."""
    pipe = pipeline(stages, **options)
    pipe.train(BATCHES)
    pipe.save(folder)
    return pipe.state_dict()


def test_what_is_in_it(tmp_path: Path) -> None:
    weights = saved(tmp_path / "one")
    names = {str(file.relative_to(tmp_path / "one")) for file in (tmp_path / "one").rglob("*.*")}
    assert names == {"checkpoint.json"} | {
        f"{kind}/stage-{j}.{end}"
        for j in range(3)
        for kind, end in (("weights", "safetensors"), ("state", "safetensors"), ("state", "json"))
    }
    found = Checkpoint.open(tmp_path / "one")
    assert (found.position.epochs, found.position.samples, found.position.total) == (1, 70, 7)
    assert [len(stage) for stage in found.layers] == SIZES[3]
    assert found.depths == [2, 1, 0]
    assert_same(found.weights(), weights)
    state = found.state("stage-0")
    (sgd,) = state["optimizers"]
    assert sgd["kind"] == "SGD" and set(sgd["state"]) == {
        n for n in weights if int(n.split(".")[0]) < 5
    }


def test_a_plain_model_reads_it_in_two_lines(tmp_path: Path) -> None:
    weights = saved(tmp_path / "one")
    model = tanh_net(5)
    model.load_state_dict(load_weights(tmp_path / "one"))
    assert_same(model.state_dict(), weights)
    plain: dict[str, Tensor] = {}  # without any of ours
    for file in (tmp_path / "one/weights").iterdir():
        plain |= load_file(file)
    assert_same(plain, weights)


def test_torch_distributed_checkpoint_reads_it(tmp_path: Path) -> None:
    weights = saved(tmp_path / "one")
    into = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    reader = dcp.HuggingFaceStorageReader(str(tmp_path / "one/weights"))
    dcp.load(into, storage_reader=reader, no_dist=True)
    assert_same(into, weights)


def test_a_plain_models_weights_start_a_pipeline(tmp_path: Path) -> None:
    model = tanh_net(5)
    save_weights(model.state_dict(), tmp_path / "plain.safetensors")
    assert_same(load_file(tmp_path / "plain.safetensors"), model.state_dict())
    pipe = pipeline(2)
    pipe.load(tmp_path / "plain.safetensors")
    assert_same(pipe.state_dict(), model.state_dict())
    assert pipe.position.epochs == 0


def test_tied_weights_are_written_each(tmp_path: Path) -> None:
    def net() -> nn.Sequential:
        torch.manual_seed(0)
        first, last = nn.Linear(4, 4), nn.Linear(4, 4)
        last.weight = first.weight
        return nn.Sequential(first, nn.Tanh(), last, nn.Linear(4, 1))

    data = [(torch.randn(3, 4), torch.randn(3, 1))]
    pipe = Pipeline(net(), nn.MSELoss(), momentum, stages=2, balance=[3, 1])
    pipe.train(data)
    pipe.save(tmp_path / "one")
    again = Pipeline(net(), nn.MSELoss(), momentum, stages=2, balance=[3, 1])
    again.load(tmp_path / "one")
    pipe.train(data)
    again.train(data)
    assert_same(again.state_dict(), pipe.state_dict())
    save_weights(pipe.state_dict(), tmp_path / "file.safetensors")


# Other cuts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", (1, 2, 4))
@pytest.mark.parametrize("optimizer", (momentum, adamw))
def test_other_numbers_of_stages(
    tmp_path: Path, stages: int, optimizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under a flush the cut changes no number, so the run goes on as if nothing had happened."""
    options: dict[str, Any] = {
        "schedule": "1f1b",
        "micro_batches": 2,
        "update_every": 3,  # a third of an update is in the checkpoint
        "optimizer": optimizer,
        "scheduler": partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.5),
    }
    whole = pipeline(3, **options)
    whole.train(BATCHES)
    whole.save(tmp_path / "one")
    again = pipeline(stages, seed=9, **options)
    assert again.load(tmp_path / "one").epochs == 1
    assert f"has 3 stages, this pipeline {stages}: weights," in capsys.readouterr().out
    assert_same(again.state_dict(), whole.state_dict())
    again.save(tmp_path / "two")
    assert _optimizers(tmp_path / "two") == _optimizers(tmp_path / "one")
    for pipe in (whole, again):
        pipe.train(BATCHES)
    assert_close(again.state_dict(), whole.state_dict(), 1e-12)


def _optimizers(folder: Path) -> dict[str, Any]:
    """The optimizers' state by name, over all stages."""
    found = Checkpoint.open(folder)
    stages = [found.state(f"stage-{j}")["optimizers"] for j in range(found.stages)]
    state = {n: each for stage in stages for one in stage for n, each in one["state"].items()}
    return {n: {k: torch.as_tensor(v).tolist() for k, v in s.items()} for n, s in state.items()}


def test_the_cut_of_a_checkpoint_is_kept(tmp_path: Path) -> None:
    saved(tmp_path / "one")
    pipe = Pipeline(tanh_net(), nn.MSELoss(), momentum, stages=3)  # balance='time'
    pipe.load(tmp_path / "one")
    assert pipe.partition is not None and [*pipe.partition.sizes] == SIZES[3]


def test_a_cut_that_is_yet_to_be_measured(tmp_path: Path) -> None:
    weights = saved(tmp_path / "one")
    pipe = Pipeline(tanh_net(3), nn.MSELoss(), momentum, stages=2)
    assert pipe.load(tmp_path / "one").epochs == 1
    pipe.prepare(BATCHES)
    assert_same(pipe.state_dict(), weights)
    assert pipe.position.epochs == 1


# What is refused -----------------------------------------------------------------------------


def test_another_model(tmp_path: Path) -> None:
    saved(tmp_path / "one")
    other = Pipeline(tanh_net()[:8], nn.MSELoss(), momentum, stages=1)
    with pytest.raises(
        CheckpointError, match=r"the layers 0 to 15 \(16\), and this one has 0 to 7"
    ):
        other.load(tmp_path / "one")


def test_other_widths(tmp_path: Path) -> None:
    saved(tmp_path / "one")
    net = tanh_net()
    net[2] = nn.Linear(9, 5)
    for stages in (2, 3):  # of the same cut, and of another
        other = Pipeline(net, nn.MSELoss(), momentum, stages=stages, balance=SIZES[stages])
        with pytest.raises(
            CheckpointError,
            match=r"one has 2\.weight of the shape \[7, 9\], and this model has it of \[5, 9\]: "
            "its weights do not fit either; build the model that it was saved of",
        ):
            other.load(tmp_path / "one")


def test_another_slack_is_the_users(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It was the checkpoint's, and nothing said so."""
    saved(tmp_path / "one")
    pipe = pipeline(3, slack=2)
    pipe.load(tmp_path / "one")
    assert (
        "one had 2, 1, 0 micro-batches in flight behind its stages' forwards, and this pipeline "
        "has 6, 3, 0, by its own slack\n" in capsys.readouterr().out
    )
    assert pipe.depths == (6, 3, 0)
    pipe.train(BATCHES * 3)
    assert 6 in pipe.statistics()[0].staleness
    pipeline(3).load(tmp_path / "one")
    assert not capsys.readouterr().out


def test_another_optimizer(tmp_path: Path) -> None:
    saved(tmp_path / "one")
    for stages in (3, 4):
        with pytest.raises(
            CheckpointError, match=r"has no AdamW of '0\.weight', but SGD of others"
        ):
            pipeline(stages, optimizer=adamw).load(tmp_path / "one")


def test_other_corrections_begin_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = saved(tmp_path / "one")
    pipe = pipeline(3, corrections=[SpikeCompensation()])
    pipe.load(tmp_path / "one")
    assert (
        "has other corrections than this pipeline: weights, optimizers" in capsys.readouterr().out
    )
    assert_same(pipe.state_dict(), weights)
    assert _optimizers(tmp_path / "one")


FORMS = ("last_update", "linear", "momentum")


@pytest.mark.parametrize("form", FORMS)
def test_another_form_of_a_correction_begins_anew(
    tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """They keep other things: one had been read as the other, or could not be."""
    weights = saved(tmp_path / "one", corrections=[WeightPrediction(form)])
    for other in FORMS:
        pipe = pipeline(3, corrections=[WeightPrediction(other)])
        pipe.load(tmp_path / "one")
        told = "has other corrections than this pipeline" in capsys.readouterr().out
        assert told is (other != form)
        assert_same(pipe.state_dict(), weights)
        pipe.train(BATCHES[:1])


def test_nothing_there(tmp_path: Path) -> None:
    pipe = pipeline(2)
    with pytest.raises(CheckpointError, match=r"there is no .*/none: write a checkpoint's folder"):
        pipe.load(tmp_path / "none")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(CheckpointError, match=r"no checkpoint is in .* \(there is notes.txt\)"):
        pipe.load(tmp_path)


def test_a_state_that_is_no_data(tmp_path: Path) -> None:
    class Odd(torch.optim.SGD):
        def state_dict(self) -> dict[str, Any]:
            state = super().state_dict()
            state["param_groups"][0]["why"] = object()
            return state

    pipe = Pipeline(tanh_net(), nn.MSELoss(), lambda p: Odd(p, lr=0.1), stages=1)
    pipe.train(BATCHES[:1])
    with pytest.raises(
        TypeError, match="optimizers/0/groups/0/why is a object, which a checkpoint"
    ):
        pipe.save(tmp_path / "one")


def test_a_folder_that_is_something_else(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("")
    pipe = pipeline(2)
    with pytest.raises(OSError, match="could not be written"):
        pipe.save(tmp_path / "mine")
    assert (tmp_path / "mine/thesis.tex").exists()


# Damage --------------------------------------------------------------------------------------


def cut_short(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def remove(file: Path) -> None:
    file.unlink()


FILES = ("weights/stage-1.safetensors", "state/stage-0.safetensors", "state/stage-2.json")


@pytest.mark.parametrize("damage", (cut_short, flip_a_bit, remove))
def test_damage_is_found_and_the_one_before_taken(tmp_path: Path, damage: Any) -> None:
    pipe = pipeline(3)
    for _ in range(2):
        pipe.train(BATCHES, checkpoints=Checkpoints(tmp_path / "all"))
    older, newer = sorted((tmp_path / "all").iterdir())
    for name in FILES:
        shutil.copytree(newer, tmp_path / "kept")
        damage(newer / name)
        found, faults = find_latest(tmp_path / "all")
        assert found is not None and found.folder == older
        assert len(faults) == 1 and str(newer / name) in faults[0]
        with pytest.warns(UserWarning, match="an older checkpoint is taken"):
            assert pipeline(3).load(tmp_path / "all/latest").epochs == 1
        with pytest.raises(CheckpointError, match=f"{name}.*the checkpoint is damaged; go on from"):
            pipeline(3).load(newer)
        shutil.rmtree(newer)
        os.rename(tmp_path / "kept", newer)
    assert pipeline(3).load(tmp_path / "all").epochs == 2


def test_a_manifest_that_is_gone(tmp_path: Path) -> None:
    """It is said, the one before is taken, and the next of that name takes its place."""
    pipe, plan = pipeline(3), Checkpoints(tmp_path / "all", every=2, keep=2)
    pipe.train(BATCHES, checkpoints=plan)
    weights = pipe.state_dict()
    pipe.close()
    older, newer = sorted((tmp_path / "all").iterdir())
    for text in ("", "[]", "{}", '{"position'):
        (newer / "checkpoint.json").write_text(text)
        assert find_latest(tmp_path / "all")[1] == [
            f"{newer / 'checkpoint.json'} is not a checkpoint's manifest"
        ]
    (newer / "checkpoint.json").unlink()
    found, faults = find_latest(tmp_path / "all")
    assert found is not None and found.folder == older
    assert faults == [f"{newer / 'checkpoint.json'} is missing"]
    again = pipeline(3)
    again.load(found.folder)
    again.train(BATCHES, checkpoints=plan)
    assert_same(again.state_dict(), weights)
    again.close()
    assert find_latest(tmp_path / "all")[1] == []
    assert [path.name for path in sorted((tmp_path / "all").iterdir())] == [older.name, newer.name]
    for path in (older, newer):
        (path / "checkpoint.json").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole: .*json is missing"):
        Checkpoint.open(tmp_path / "all")


def test_a_manifest_that_is_none(tmp_path: Path) -> None:
    saved(tmp_path / "one")
    manifest = tmp_path / "one/checkpoint.json"
    whole = json.loads(manifest.read_text())
    for text in ("", "[]", "{}", '{"format": 1}', "\x00", "[" * 100_000, "null"):
        manifest.write_text(text)
        with pytest.raises(CheckpointError):
            Checkpoint.open(tmp_path / "one")
    position = whole["position"]
    for change, text in (
        ({"position": {**position, "epochs": -1}}, "epochs is -1, and is to be a whole number"),
        ({"position": {**position, "total": 1.5}}, r"total is 1\.5"),
        ({"depths": [1, 1, 0, 0]}, r"depths=\[1, 1, 0, 0\] of 3 stages: there is to be one for e"),
        ({"depths": [10**9, 0, 0]}, "no stage has so many micro-batches in flight"),
        ({"layers": [], "depths": []}, "of 0 stages"),
        ({"replicas": "1"}, "replicas is '1'"),
        ({"replicas": 0}, "replicas is 0, and is to be a whole number >= 1"),
    ):
        manifest.write_text(json.dumps(whole | change))
        with pytest.raises(CheckpointError, match=rf"{MANIFEST} is no manifest .*{text}"):
            Checkpoint.open(tmp_path / "one")
    manifest.write_text(json.dumps({**whole, "format": 2}))
    with pytest.raises(CheckpointError, match="is of format 2, and this reads 1"):
        Checkpoint.open(tmp_path / "one")


def test_a_strangers_files_that_have_no_end(tmp_path: Path) -> None:
    """None is opened but a checkpoint's own, nothing waits, and nothing is read for ever."""
    saved(tmp_path / "one")
    none = {"bytes": 0, "sha256": ""}
    weights, names = "weights/stage-0.safetensors", ("/dev/zero", "../x.json", "weights/../x.json")

    def copy(name: str, entries: dict[str, Any]) -> Path:
        folder = tmp_path / name / "one"
        shutil.copytree(tmp_path / "one", folder)
        manifest = json.loads((folder / MANIFEST).read_bytes())
        manifest["files"] |= entries
        (folder / MANIFEST).write_text(json.dumps(manifest))
        return folder

    for k, name in enumerate(names):
        folder = copy(f"name {k}", {name: none})
        with pytest.raises(CheckpointError, match=f"no manifest .*files has '{name}'"):
            Checkpoint.open(folder)
    pipes: dict[str, tuple[str, Callable[[Path], None]]] = {
        "device": (weights, lambda file: file.symlink_to("/dev/zero")),
        "pipe": (weights, os.mkfifo),
        "manifest": (MANIFEST, os.mkfifo),
        "linked manifest": (MANIFEST, lambda file: file.symlink_to("/dev/zero")),
    }
    for kind, (name, make) in pipes.items():
        folder = copy(kind, {weights: none})
        (folder / name).unlink()
        make(folder / name)
        with pytest.raises(CheckpointError, match=f"{folder / name} .*no plain file"):
            Checkpoint.open(folder)
        found, faults = find_latest(folder.parent)
        assert found is None and len(faults) == 1 and "no plain file" in faults[0]


def test_no_more_is_read_than_was_written(tmp_path: Path) -> None:
    """A file of /proc has no bytes by its size, and as many as one reads."""
    file = tmp_path / "stage-0.json"
    file.write_text("[1, 2]")
    assert read_json(file, 6) == [1, 2]
    with pytest.raises(ValueError, match="it has more than 5 bytes"):
        read_json(file, 5)
    (tmp_path / "link").symlink_to("/proc/self/maps")
    none = {"bytes": 0, "sha256": hashlib.sha256().hexdigest()}
    assert "its SHA-256 differs" in fault_of(tmp_path / "link", none)


def _with_state(folder: Path, to: Path, change: Any) -> Path:
    """A copy whose state of stage 0 is another, and whose sums say so."""
    shutil.copytree(folder, to)
    file = to / "state/stage-0.json"
    state, manifest = json.loads(file.read_bytes()), json.loads((to / MANIFEST).read_bytes())
    change(state)
    written = json.dumps(state).encode()
    file.write_bytes(written)
    sums = {"bytes": len(written), "sha256": hashlib.sha256(written).hexdigest()}
    manifest["files"]["state/stage-0.json"] = sums
    (to / MANIFEST).write_text(json.dumps(manifest))
    return to


def test_a_state_of_other_kinds_than_numbers(tmp_path: Path) -> None:
    """Its sum is right: it says so when it is read, and not amid the training that follows."""
    step = partial(torch.optim.lr_scheduler.StepLR, step_size=3)
    saved(tmp_path / "one", scheduler=step)

    def group(state: Any) -> Any:
        return state["optimizers"][0]["groups"][0]

    changes: dict[str, Any] = {
        r"optimizers/SGD/groups/0/lr is 'abc'.* a number": lambda s: group(s).update(lr="abc"),
        r"SGD/groups/0/momentum is None.* a number": lambda s: group(s).update(momentum=None),
        r"SGD/groups/0/lr is 1e\+300.* a finite": lambda s: group(s).update(lr=1e300),
        r"groups/0/initial_lr is nan": lambda s: group(s).update(initial_lr={"$float": "nan"}),
        r"groups/0/momentum is -3.* a finite number >= 0": lambda s: group(s).update(momentum=-3),
        r"schedulers/StepLR/last_epoch is 'x'": lambda s: s["schedulers"][0]["state"].update(
            last_epoch="x"
        ),
        r"counts/version is 'x'.* a whole number >= 0": lambda s: s["counts"].update(version="x"),
        r"counts/version is -1": lambda s: s["counts"].update(version=-1),
        r"most_in_flight is \[\]": lambda s: s["own"].update(most_in_flight=[]),
        r"KeyError: 'cpu'": lambda s: s.update(random={}),
        r"the way through the data \(total is 2.5": lambda s: s["course"]["position"].update(
            total=2.5
        ),
        r"the way through the data \(KeyError": lambda s: s["course"].update(now={}),
    }
    for k, (text, change) in enumerate(changes.items()):
        other = _with_state(tmp_path / "one", tmp_path / str(k), change)
        with pytest.raises(CheckpointError, match=f"^{other}/state/stage-0.json does.*{text}"):
            pipeline(3, scheduler=step).load(other)
        if "data" not in text and k < 8:  # of another cut, all of them are read
            with pytest.raises(CheckpointError, match=f"^{other}/state does not fit.*{text}"):
                pipeline(2, scheduler=step).load(other)


# Writing -------------------------------------------------------------------------------------


def test_the_newest_are_kept(tmp_path: Path) -> None:
    pipe = pipeline(2)
    for _ in range(4):
        pipe.train(BATCHES, checkpoints=Checkpoints(tmp_path, every=2, keep=3))
    pipe.drain()
    pipe.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-{n:08d}" for n in (24, 26, 28)], (
        "and nothing that is not whole"
    )


def test_a_crash_at_any_file_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every system call that makes something last is made to fail in turn."""
    from headrace.pipeline.checkpoints import files, saver

    pipe = pipeline(2)
    pipe.train(BATCHES, checkpoints=Checkpoints(tmp_path / "all"))
    before = pipe.state_dict()
    for call in range(40):
        left = [call]

        def fail(real: Any, left: list[int], *arguments: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(28, "No space left on device")
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(files.os, "fsync", partial(fail, os.fsync, left))
            patch.setattr(saver.os, "rename", partial(fail, os.rename, left))
            pipe = pipeline(2)
            pipe.load(tmp_path / "all")
            try:
                pipe.train(BATCHES, checkpoints=Checkpoints(tmp_path / "all", keep=1))
            except OSError as error:
                assert "No space left on device; those before it are whole" in str(error)
                there = {p.name for p in (tmp_path / "all").iterdir()}
                found, faults = find_latest(tmp_path / "all")
                assert found is not None and not faults
                if there == {"step-00000007"}:
                    assert_same(found.weights(), before)
                else:  # it failed when all was there; the next one begins from here
                    assert there == {"step-00000007", "step-00000014"} and call > 10
                    shutil.rmtree(tmp_path / "all/step-00000014")
                continue
        break
    assert call > 10, "so many calls were made to fail"
    assert [p.name for p in (tmp_path / "all").iterdir()] == ["step-00000014"]


def test_one_is_due_at_the_end_of_a_pass(tmp_path: Path) -> None:
    """After the last mini-batch there is none before which it could be made."""
    for every in (7, 14):
        with pipeline(2) as pipe:
            for _ in range(2):
                pipe.train(BATCHES, checkpoints=Checkpoints(tmp_path / str(every), every, keep=9))
            weights = pipe.state_dict()
        steps = sorted(p.name for p in (tmp_path / str(every)).iterdir())
        assert steps == [f"step-{n:08d}" for n in range(every, 15, every)]
        again = pipeline(2, seed=4)
        again.load(tmp_path / str(every) / steps[0])
        while again.position.epochs < 2:
            again.train(BATCHES, checkpoints=Checkpoints(tmp_path / "again", every, keep=9))
        assert_same(again.state_dict(), weights)


@pytest.mark.parametrize("value", (float("inf"), torch.ones(1), {1, 2}), ids=repr)
def test_notes_that_are_no_data(tmp_path: Path, value: Any) -> None:
    pipe = pipeline(2)
    pipe.train(BATCHES)
    pipe.notes["best"] = value
    with pytest.raises(ValueError, match=r"notes\['best'\]=.* cannot be kept in a checkpoint"):
        pipe.save(tmp_path / "one")


def test_what_a_report_leaves_in_the_notes_is_in_the_checkpoint_of_the_calls_end(
    tmp_path: Path,
) -> None:
    """Else an account that is gone on with lacks the last call."""
    pipe = pipeline(2)

    def add(report: Report) -> None:
        pipe.notes["samples"] = pipe.notes.get("samples", 0) + report.samples

    for _ in range(2):
        report = pipe.train(BATCHES, checkpoints=Checkpoints(tmp_path), at_end=add)
    again = pipeline(2)
    again.load(tmp_path)
    again.prepare(BATCHES)
    assert again.notes == pipe.notes and pipe.notes["samples"] > report.samples


def test_an_older_run_of_more_steps_does_not_push_out_a_new_one(tmp_path: Path) -> None:
    pipe = pipeline(2)
    for _ in range(3):
        pipe.train(BATCHES, checkpoints=Checkpoints(tmp_path))
    new = pipeline(2, seed=5)
    new.train(BATCHES, checkpoints=Checkpoints(tmp_path))
    assert_same(load_weights(tmp_path), new.state_dict())


def test_another_scheduler(tmp_path: Path) -> None:
    lr = torch.optim.lr_scheduler
    saved(tmp_path / "one", scheduler=partial(lr.StepLR, step_size=3))
    for other, name in ((partial(lr.LinearLR, total_iters=9), "LinearLR"), (None, "none")):
        text = f"has the learning-rate scheduler StepLR, and this pipeline {name}.*: go on as"
        with pytest.raises(ValueError, match=text):
            pipeline(3, scheduler=other).load(tmp_path / "one")


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    plan = Checkpoints(tmp_path / "file" / "in", every=1000)
    with pytest.raises(
        OSError, match=r"checkpoints cannot be written into .*Not a directory; give"
    ):
        pipeline(2).train(BATCHES, checkpoints=plan)


def test_a_call_within_a_call(tmp_path: Path) -> None:
    pipe = pipeline(2)
    said: list[str] = []

    def log(progress: Any) -> None:
        try:
            pipe.save(tmp_path / "x")
        except RuntimeError as error:
            said.append(str(error))

    assert pipe.train(BATCHES, log=log, log_every=3).samples == 60
    assert said[0].startswith("save() while train() is under way, from a log, a loader or a thread")


@pytest.mark.parametrize(
    ("act", "kind", "text"),
    (
        (lambda: Checkpoints(5), TypeError, "folder=5: give a folder's name"),  # type: ignore[arg-type]
        (lambda: pipeline(2).load(5), TypeError, "path=5: give the name"),  # type: ignore[arg-type]
        (
            lambda: pipeline(2).train(BATCHES, checkpoints="x"),  # type: ignore[arg-type]
            TypeError,
            r"checkpoints='x': give where and when, as in Checkpoints\('x', every=500\)",
        ),
    ),
)
def test_arguments_that_are_none(act: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        act()


@pytest.mark.parametrize("every", (2, 4, 5))
def test_a_manifest_says_where_its_first_stage_was(every: int, tmp_path: Path) -> None:
    """In one process that goes on while a checkpoint is on its way to the last one."""
    with pipeline(2) as pipe:
        pipe.train(batches_of(200, 10), checkpoints=Checkpoints(tmp_path, every, keep=99))
    folders = sorted(tmp_path.iterdir())
    assert len(folders) == 20 // every
    for k, folder in enumerate(folders, 1):
        assert Checkpoint.open(folder).position.total == k * every
        assert folder.name == f"step-{k * every:08d}"


@pytest.mark.parametrize("keep", (0, -1, "2", True, 1.5), ids=repr)
def test_a_save_that_would_keep_nothing_writes_nothing(tmp_path: Path, keep: Any) -> None:
    pipe = pipeline(2)
    with pytest.raises(ValueError, match=rf"^keep={keep!r}: give a whole number >= 1, or None: "):
        pipe.save(tmp_path / "one", keep)
    for path in (5, ""):
        with pytest.raises(TypeError, match=rf"^path={path!r}: give a folder's name$"):
            pipe.save(path)  # type: ignore[arg-type]
    assert not [*tmp_path.iterdir()]
    pipe.save(tmp_path / "one", keep=1)
    assert Checkpoint.open(tmp_path).folder == tmp_path / "one"
