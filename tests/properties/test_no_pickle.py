"""Nothing that is read runs: nothing is unpickled, of a neighbour or of a file."""

import ast
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from headrace import launch, models, pipeline
from headrace.launch.saved import find_saved
from headrace.pipeline.replicas.server import Checkpoint

from ..pipeline.test_server import make_shard

FOLDERS = [Path(str(each.__file__)).parent for each in (pipeline, launch, models)]
FILES = sorted(file for folder in FOLDERS for file in folder.rglob("*.py"))

PICKLERS = {"pickle", "cPickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}

# torch's own pickling would do as well: of objects between ranks, and of files.
CALLS = {
    "all_gather_object", "broadcast_object_list", "gather_object", "recv_object_list",
    "scatter_object_list", "send_object_list",
}  # fmt: skip

ALLOWED: set[tuple[str, str]] = set()
"""File and what it may: none, but for what `ProcessPoolExecutor` does inside of one command, which
starts its own processes and reads from nobody else (`launch.simulate --processes`)."""


def faults(text: str) -> Iterator[str]:
    """What in a program could unpickle."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Attribute):
            names = [node.attr]
        else:
            names = []
        yield from (name for name in names if name.partition(".")[0] in PICKLERS)
        yield from (name for name in names if name in CALLS)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            safe = [k for k in node.keywords if k.arg == "weights_only"]
            if not (
                safe and isinstance(safe[0].value, ast.Constant) and safe[0].value.value is True
            ):
                yield ast.unparse(node)
        if isinstance(node, ast.Call) and any(k.arg == "allow_pickle" for k in node.keywords):
            yield ast.unparse(node)


def test_no_module_unpickles() -> None:
    assert len(FILES) > 100
    found = {(file.name, fault) for file in FILES for fault in faults(file.read_text())}
    assert found == ALLOWED


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "import torch.distributed as dist\ndist.all_gather_object(a, b)",
        "from torch.distributed import broadcast_object_list",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "torch.load(file, weights_only=some)",
        "np.load(file, allow_pickle=True)",
        "import torch\ntorch.serialization.pickle.load(f)",
    ],
)
def test_what_would_be_found(text: str) -> None:
    assert [*faults(text)]


@pytest.mark.parametrize("text", ["torch.load(f, weights_only=True)", "import json", "np.load(f)"])
def test_what_would_not(text: str) -> None:
    assert not [*faults(text)]


class Bomb:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return open, (str(self.path), "w")  # type: ignore[return-value]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("how", ["torch", "pickle", "text", "cut"])
def test_files_that_are_no_weights(tmp_path: Path, how: str) -> None:
    """Of a run, and of a parameter server."""
    ran = tmp_path / "RAN"
    whole = tmp_path / "whole.pt"
    torch.save({"a": Bomb(ran)}, whole)
    data = {
        "torch": whole.read_bytes(),
        "pickle": pickle.dumps(Bomb(ran)),
        "text": b"no weights",
        "cut": whole.read_bytes()[:-100],
    }[how]
    (tmp_path / "weights.pt").write_bytes(data)
    (tmp_path / "config.yaml").write_text(
        "model: {class_path: mlp, init_args: {widths: [2, 2]}}\nloss: MSELoss\n"
        "optimizer: {class_path: SGD, init_args: {lr: 0.1}}\ndata: {train: Digits}\n"
    )
    with pytest.raises(ValueError, match=r"weights.pt cannot be read; give a run that has ended"):
        find_saved(tmp_path).weights()
    with pytest.raises(ValueError, match=r"weights.pt is not of these weights and optimizer"):
        Checkpoint(tmp_path / "weights.pt", 1).resume(make_shard())
    assert not ran.exists()
