"""The launch files of the docs: what they start is what torchrun and headrace.launch.train take."""

import argparse
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser

from headrace.launch.config import Config, parse

from .test_replicas import CONFIG

FILES = Path(__file__).parents[2] / "docs" / "launch"

SHOW = """python3 -c 'import json, sys; print("torchrun", json.dumps(sys.argv[1:]))' "$@" """

COMMANDS = {
    "torchrun": SHOW + "&& exit ${TORCHRUN_ENDS_WITH:-0}",
    "srun": 'SLURM_NODEID=0 "$@" && SLURM_NODEID=1 "$@"',
    "scontrol": 'if [ "$1" = show ]; then printf "node7\\nnode8\\n"; else echo scontrol "$@"; fi',
}
"""What stands in for the commands of a cluster of two machines."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a job starts: its configuration, and the commands."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.yaml").write_text(CONFIG)
    for name, text in COMMANDS.items():
        command = tmp_path / name
        command.write_text(f"#!/bin/bash\n{text}\n")
        command.chmod(0o755)
    return tmp_path


def run_slurm(folder: Path, **variables: str) -> "subprocess.CompletedProcess[str]":
    job = {"SLURM_JOB_ID": "31234", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[7-8]"}
    path = {"PATH": f"{folder}:{os.environ['PATH']}"}
    return subprocess.run(
        ["bash", str(FILES / "slurm.sh")],
        env={**os.environ, **job, **path, **variables},
        capture_output=True, text=True, timeout=30,
    )  # fmt: skip


def read(arguments: list[str]) -> tuple[argparse.Namespace, Config]:
    """What torchrun understands, and what the training command does of the rest."""
    options = get_args_parser().parse_args(arguments)
    assert options.module and options.training_script == "headrace.launch.train"
    assert options.max_restarts == 3
    return options, parse(options.training_script_args)


def test_slurm(folder: Path) -> None:
    done = run_slurm(folder)
    assert done.returncode == 0, done.stderr
    lines = [line.removeprefix("torchrun ") for line in done.stdout.splitlines()]
    assert len(lines) == 2
    for node, line in enumerate(lines):
        options, config = read(json.loads(line))
        assert (options.nnodes, options.node_rank, options.nproc_per_node) == ("2", node, "2")
        assert (options.master_addr, options.master_port) == ("node7", 21234)
        assert (config.name, config.stages) == ("train", 4)


@pytest.mark.parametrize(("starts", "requeued"), [("0", True), ("2", True), ("3", False)])
def test_slurm_starts_again(folder: Path, starts: str, requeued: bool) -> None:
    done = run_slurm(folder, TORCHRUN_ENDS_WITH="1", SLURM_RESTART_COUNT=starts)
    assert done.returncode == 1
    assert ("scontrol requeue 31234" in done.stdout) == requeued


def test_kubeflow(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = yaml.safe_load((FILES / "pytorchjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    replicas: dict[str, Any] = job["spec"]["pytorchReplicaSpecs"]
    pods = sum(each["replicas"] for each in replicas.values())
    operator = {"NNODES": pods, "NPROC_PER_NODE": job["spec"]["nprocPerNode"], "NODE_RANK": 1}
    for name, value in {**operator, "MASTER_ADDR": "headrace-master-0", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(f"PET_{name}", str(value))
    for each in replicas.values():
        (container,) = each["template"]["spec"]["containers"]
        program, *arguments = [*container["command"], *container["args"]]
        assert (program, container["name"]) == ("torchrun", "pytorch")
        options, config = read(arguments)
        assert (options.nnodes, options.node_rank, options.nproc_per_node) == ("2", 1, "2")
        assert (options.master_addr, options.master_port) == ("headrace-master-0", 1)
        assert config.stages == pods * int(options.nproc_per_node)
        mounts = {mount["name"] for mount in container["volumeMounts"]}
        assert mounts == {volume["name"] for volume in each["template"]["spec"]["volumes"]}
