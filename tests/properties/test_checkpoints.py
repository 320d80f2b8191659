"""Whatever lies on the disk, a checkpoint is read as it was written or refused in words."""

import contextlib
import copy
import hashlib
import io
import json
import math
from collections import Counter, deque
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from headrace.pipeline import Pipeline
from headrace.pipeline.checkpoints import Checkpoint, CheckpointError
from headrace.pipeline.checkpoints.tree import pack, unpack
from headrace.pipeline.corrections import WeightPrediction

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
DTYPES += (torch.complex64,)
shapes = st.lists(st.integers(0, 3), max_size=3)
tensors = st.builds(
    lambda dtype, shape: torch.ones(shape).to(dtype), st.sampled_from(DTYPES), shapes
)
names = st.text(max_size=6)
plain = st.none() | st.booleans() | st.integers() | st.floats() | names | st.sampled_from(DTYPES)
states = st.recursive(
    plain | tensors | tensors.map(lambda t: t.mT if t.dim() >= 2 else t),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.lists(inner, max_size=3).map(lambda items: deque(items, 5))
        | st.dictionaries(names | st.integers(), inner, max_size=3)
    ),
    max_leaves=12,
)


def same(one: Any, two: Any) -> bool:
    """Of the same types, to the last bit and stride."""
    if isinstance(one, torch.Tensor):
        long = [k for k in range(one.dim()) if one.shape[k] > 1]
        laid = one.numel() == 0 or all(one.stride(k) == two.stride(k) for k in long)
        return bool(one.dtype is two.dtype and torch.equal(one, two) and laid)
    if isinstance(one, float) and math.isnan(one):
        return math.isnan(two)
    if type(one) is not type(two):
        return False
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[k], two[k]) for k in one)
    if isinstance(one, list | tuple | deque):
        return len(one) == len(two) and all(map(same, one, two))
    return bool(one == two)


@given(states)
def test_a_state_comes_back(state: Any) -> None:
    flat, tree = pack(state)
    assert all(t.device.type == "cpu" for t in flat.values())
    assert same(unpack(json.loads(json.dumps(tree, allow_nan=False)), flat), state)


def test_counts_and_sparse_tensors_come_back() -> None:
    sparse = torch.sparse_coo_tensor([[2, 2, 0]], [1.0, 2.0, 3.0], (4,), check_invariants=True)
    flat, tree = pack({"counts": Counter({3: 2, 0: 1}), "rows": sparse})
    again = unpack(json.loads(json.dumps(tree)), flat)
    assert again["counts"] == Counter({3: 2, 0: 1}) and type(again["counts"]) is Counter
    assert again["rows"]._values().equal(sparse._values()), "a row that is there twice stays so"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | names,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
)
marks = ("tensor", "float", "dtype", "tuple", "deque", "counter", "dict", "complex", "sparse", "x")
marked = st.dictionaries(st.sampled_from([f"${mark}" for mark in marks]), json_values, min_size=1)


@given(marked | json_values)
def test_a_strangers_tree_is_data_or_refused(tree: Any) -> None:
    try:
        unpack(tree, {"0": torch.ones(1)})
    except ValueError as error:
        assert "is not what was written there" in str(error)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    pipe = Pipeline(model, nn.MSELoss(), lambda p: torch.optim.SGD(p, lr=0.1), stages=1)
    pipe.train([(torch.ones(1, 2), torch.ones(1, 1))])
    pipe.save(tmp_path_factory.mktemp("saved") / "one")
    return pipe._keeper.target


@given(st.data())
def test_a_strangers_manifest_is_read_or_refused(folder: Path, data: st.DataObject) -> None:
    file = folder / "checkpoint.json"
    whole = file.read_bytes()
    manifest = copy.deepcopy(json.loads(whole))
    key = data.draw(st.sampled_from(sorted(manifest)))
    manifest[key] = data.draw(json_values)
    try:
        file.write_text(json.dumps(manifest))
        found = Checkpoint.open(folder)
        found.fault()
    except CheckpointError as error:
        assert str(folder) in str(error)
    finally:
        file.write_bytes(whole)


@given(st.sampled_from(["weights/stage-0.safetensors", "state/stage-0.json"]), st.binary())
def test_files_of_other_bytes_are_refused(folder: Path, name: str, content: bytes) -> None:
    file = folder / name
    whole = file.read_bytes()
    try:
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match="the checkpoint is damaged"):
            Checkpoint.open(folder).state("stage-0"), Checkpoint.open(folder).weights()
    finally:
        file.write_bytes(whole)


@given(st.binary(max_size=200))
def test_a_file_that_fits_its_sum_and_is_none(folder: Path, content: bytes) -> None:
    """Whoever writes the files can write the sums: what is in them still runs no code."""
    manifest, file = folder / "checkpoint.json", folder / "weights/stage-0.safetensors"
    kept, whole = manifest.read_bytes(), file.read_bytes()
    tree = json.loads(kept)
    digest = hashlib.sha256(content).hexdigest()
    tree["files"]["weights/stage-0.safetensors"] = {"bytes": len(content), "sha256": digest}
    try:
        file.write_bytes(content)
        manifest.write_text(json.dumps(tree))
        with pytest.raises(CheckpointError, match="is not a safetensors file"):
            Checkpoint.open(folder).weights()
    finally:
        file.write_bytes(whole)
        manifest.write_bytes(kept)


def _pipeline() -> Pipeline:
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))
    return Pipeline(
        model,
        nn.MSELoss(),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5),
        scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=3),
        stages=2,
        balance=[2, 1],
        corrections=[WeightPrediction("momentum")],
        update_every=2,
    )


DATA = [(torch.ones(1, 2), torch.ones(1, 1))] * 3
OTHERS: tuple[Any, ...] = (
    "abc",
    None,
    -1,
    1.5,
    True,
    [],
    {},
    {"$float": "nan"},
    {"$tensor": "random/cpu"},
    1 << 70,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "two"
    pipe = _pipeline()
    pipe.train(DATA)
    pipe.save(folder)
    return folder


@given(st.data())
@settings(max_examples=80)
def test_a_state_that_fits_its_sum_and_is_another(saved: Path, data: st.DataObject) -> None:
    """Any part of it put in another's place: it is gone on from, or refused in words."""
    name = data.draw(st.sampled_from(["state/stage-0.json", "state/stage-1.json"]))
    manifest, file = saved / "checkpoint.json", saved / name
    kept, whole = manifest.read_bytes(), file.read_bytes()
    state, sums = json.loads(whole), json.loads(kept)
    place, key = state, data.draw(st.sampled_from(sorted(state)))
    while isinstance(place[key], dict | list) and place[key] and data.draw(st.integers(0, 9)):
        place = place[key]
        key = data.draw(st.sampled_from([*place] if isinstance(place, dict) else range(len(place))))
    place[key] = data.draw(st.sampled_from(OTHERS))
    written = json.dumps(state).encode()
    sums["files"][name] = {"bytes": len(written), "sha256": hashlib.sha256(written).hexdigest()}
    pipe = _pipeline()
    try:
        file.write_bytes(written)
        manifest.write_text(json.dumps(sums))
        with contextlib.redirect_stdout(io.StringIO()):
            pipe.load(saved)
    except CheckpointError as error:
        assert str(saved) in str(error) or "the checkpoint has " in str(error)
    else:
        with contextlib.suppress(FloatingPointError):  # a rate that is NaN is a number
            pipe.train(DATA)
    finally:
        file.write_bytes(whole)
        manifest.write_bytes(kept)
