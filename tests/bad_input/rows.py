"""What a user can get wrong, and what is said of it: the table of docs/bad-input.md, as data.

Each is provoked for real by test_bad_input.py; `python -m tests.bad_input.write` writes the table.
"""

import json
import os
import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from headrace.launch.resume import check_notes
from headrace.pipeline import Link, Pipeline
from headrace.pipeline.batch_size import Geometric, Steps
from headrace.pipeline.checkpoints import CheckpointError, Checkpoints, save_weights
from headrace.pipeline.corrections import (
    AsynchronousNesterov,
    LearningRate,
    PipeMareT2,
    WeightPrediction,
)
from headrace.pipeline.errors import InputError
from headrace.pipeline.replicas import Allreduce, Downpour, Elastic
from headrace.pipeline.replicas.rendezvous import Rendezvous
from headrace.pipeline.rules import Delayed, Exact, Local, Synthetic
from headrace.pipeline.world import meet

from .row import Row

__all__ = ["CONFIG", "ROWS"]

CONFIG = """\
stages: 2
threads: 1
model: {class_path: mlp, init_args: {widths: [6, 8, 8, 3]}}
loss: CrossEntropyLoss
optimizer: {class_path: SGD, init_args: {lr: 0.1, momentum: 0.5}}
data:
  train: {class_path: Generated, init_args: {shape: [6], classes: 3, samples: 32}}
  batch_size: 8
pipeline:
  balance: [4, 2]
"""

MANIFEST = """\
{"format": 1, "position": {"epochs": 1}, "layers": [["0"]], "replicas": 1, "depths": [0],
"kinds": {}, "notes": {}, "made": 0, "files": {}}
"""

# Files ------------------------------------------------------------------------------------------

MODELS = """\
from torch import nn


def linear():
    return nn.Linear(6, 3)


def seven():
    return 7


def tied():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 3))
    model[2].weight = model[0].weight
    return model


def lazy():
    return nn.Sequential(nn.LazyLinear(6), nn.Linear(6, 3))


def frozen():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))
    return model.requires_grad_(False)


def broken():
    raise KeyError("width")
"""
DATA = """\
import torch
from torch.utils.data import Dataset, IterableDataset


class Empty(Dataset):
    def __len__(self): return 0
    def __getitem__(self, k): raise IndexError(k)


class Burning(Dataset):
    def __len__(self): return 32
    def __getitem__(self, k): raise OSError("the disk is on fire")


class Alone(Dataset):
    def __len__(self): return 32
    def __getitem__(self, k): return torch.zeros(6)


class Infinite(Dataset):
    def __len__(self): return 32
    def __getitem__(self, k): return torch.full((6,), float("inf")), 0


class Stream(IterableDataset):
    def __iter__(self): yield torch.zeros(6), 0
"""
VARIANTS = """\
no delay: {stages: 1}
late:
  pipeline.corrections: [gap_aware]
  pipeline.rule: {class_path: delayed, init_args: {weights: current}}
"""
MINE = {"my_models.py": MODELS, "my_data.py": DATA}

# Python -----------------------------------------------------------------------------------------


def network(layers: int = 4) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(6, 6) for _ in range(layers)))


def pairs(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    return [(torch.ones(4, 6), torch.ones(4, 6)) for _ in range(count)]


def sgd(parameters: Any, lr: float = 0.1, **more: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=lr, **more)


def build(**options: Any) -> Pipeline:
    usual: dict[str, Any] = {"model": network(), "loss_fn": nn.MSELoss(), "optimizer": sgd}
    return Pipeline(**usual | {"stages": 2, "balance": "parameters"} | options)


def new(**options: Any) -> Any:
    return partial(build, **options)


def train(loader: Any, **options: Any) -> Any:
    def act() -> None:
        with build(**options) as pipe:
            pipe.train(loader() if callable(loader) else loader)

    return act


def burning() -> Iterator[tuple[Tensor, Tensor]]:
    yield from pairs(1)
    raise OSError("the disk is on fire")


def tied() -> nn.Sequential:
    model = network()
    model[3].weight = model[0].weight
    return model


def save(path: Any, keep: Any = None) -> Any:
    return lambda: build().save(path, keep)


def resume(change: Any = None, **options: Any) -> Any:
    """Go on from a checkpoint, whose manifest was changed, with other options."""

    def act() -> None:
        with build() as pipe:
            pipe.save("saved")
        file = Path("saved/checkpoint.json")
        file.write_text(json.dumps(json.loads(file.read_text()) | (change or {})))
        with build(**options) as pipe:
            pipe.load("saved")

    return act


def narrow() -> nn.Sequential:
    model = network()
    model[2] = nn.Linear(6, 5)
    return model


def meet_at_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        rank = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        with mock.patch.dict(os.environ, rank):
            meet()


def serve_at_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        Rendezvous(f"127.0.0.1:{other.getsockname()[1]}", lambda: None, keeps=True)


class Skips(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x


ROWS = (
    # The command line and the file
    Row(
        "a file that is not there",
        "--config none.yaml: no such file (Headrace brings …)",
        command="train",
        arguments="--config none.yaml",
        config=False,
    ),
    Row(
        "no file and no keys",
        "model is missing: write model: NAME, or its class_path and init_args",
        command="train",
        config=False,
    ),
    Row(
        "a folder for a file",
        ".: Is a directory",
        command="train",
        arguments="--config .",
        config=False,
    ),
    Row(
        "something that is no key",
        "'epochs' on the command line: write --config FILE or --key value",
        command="train",
        arguments="epochs 3",
    ),
    Row(
        "a key without a value",
        "--epochs has no value: write --epochs VALUE",
        command="train",
        arguments="--epochs",
    ),
    Row(
        "a key that is not known",
        "unknown key epoch (did you mean epochs?); a configuration has …",
        command="train",
        arguments="--epoch 3",
    ),
    Row(
        "a key of another place",
        ("unknown key data.epochs; data has train, test, batch_size, shuffle, drop_last, workers"),
        command="train",
        arguments="--data.epochs 3",
    ),
    Row(
        "a word for a number",
        "epochs must be a whole number, not 'many'",
        command="train",
        arguments="--epochs many",
    ),
    Row(
        "a fraction for a whole number",
        "epochs must be a whole number, not 1.5",
        command="train",
        arguments="--epochs 1.5",
    ),
    Row(
        "a number for a choice",
        "pipeline.schedule must be gpipe, or 1f1b, or stream, not 3",
        command="train",
        arguments="--pipeline.schedule 3",
    ),
    Row(
        "`epochs` out of range",
        "epochs must be at least 1, not 0",
        command="train",
        arguments="--epochs 0",
    ),
    Row(
        "`data.batch_size` out of range",
        "data.batch_size must be at least 1, not 0",
        command="train",
        arguments="--data.batch_size 0",
    ),
    Row(
        "`seed` out of range",
        "seed must be at least 0, not -1",
        command="train",
        arguments="--seed -1",
    ),
    Row(
        "a number too large",
        "--epochs: line 1: '99999999999999999999' is too large for a whole number",
        command="train",
        arguments="--epochs 99999999999999999999",
    ),
    Row(
        "a name that is a path",
        "name must be a plain folder name, not 'a/b'",
        command="train",
        arguments="--name a/b",
    ),
    # Classes and functions
    Row(
        "a typo in a model",
        (
            "model: no 'mpl' in headrace.models, which has …(did you mean mlp?); your own is "
            "written module.name"
        ),
        command="train",
        arguments="--model mpl",
    ),
    Row(
        "a typo in an optimizer",
        (
            "optimizer: no 'AdmaW' in headrace.launch.optimizers or torch.optim, which has "
            "…(did you mean AdamW or Adamax?); your own is written module.name"
        ),
        command="train",
        arguments="--optimizer.class_path AdmaW",
    ),
    Row(
        "a typo in a correction",
        (
            "pipeline.corrections[0]: no 'weight_predicton' in "
            "headrace.pipeline.corrections, which has …(did you mean weight_prediction?); "
            "your own is written module.name"
        ),
        command="train",
        arguments="--pipeline.corrections weight_predicton",
    ),
    Row(
        "a typo in a rule",
        (
            "pipeline.rule: no 'delay' in headrace.pipeline.rules, which has delayed, exact, "
            "local, synthetic (did you mean delayed?); your own is written module.name"
        ),
        command="train",
        arguments="--pipeline.rule delay",
    ),
    Row(
        "a module that is not there",
        "model: there is no module 'my_modles', neither installed nor in …",
        command="train",
        arguments="--model my_modles.linear",
    ),
    Row(
        "a function that is not there",
        "model: my_models has no 'linaer' (did you mean linear?)",
        command="train",
        arguments="--model my_models.linaer",
        files=MINE,
    ),
    Row(
        "a typo in an argument",
        (
            "optimizer.init_args: SGD has no argument 'momentun' (did you mean momentum?); "
            "it takes …"
        ),
        command="train",
        arguments="--optimizer.init_args.momentun 0.9",
    ),
    Row(
        "an argument that is missing",
        "data.train.init_args: ImageFolder needs root",
        command="train",
        arguments="--data.train.class_path ImageFolder",
    ),
    Row(
        "a shell for a model",
        "model: os.system is Python's own, and not an nn.Sequential: name one that is",
        command="train",
        arguments="--model os.system",
    ),
    Row(
        "an optimizer for a loss",
        (
            "loss: torch.optim.SGD is the class of something else than a loss (output, "
            "target) -> number"
        ),
        command="train",
        arguments="--loss torch.optim.SGD",
    ),
    Row(
        "a model function that raises",
        "model: KeyError: 'width' (my_models.py:…)",
        command="train",
        arguments="--model my_models.broken",
        files=MINE,
    ),
    # The model and the cut
    Row(
        "a model that is no `nn.Sequential`",
        (
            "model is a Linear: a pipeline cuts an nn.Sequential between its layers; write "
            "the model as nn.Sequential(first, second, …), each layer taking what the one "
            "before gives"
        ),
        command="train",
        arguments="--model my_models.linear",
        files=MINE,
    ),
    Row(
        "a model that is no module",
        "model gave 7, and must give an nn.Sequential",
        command="train",
        arguments="--model my_models.seven",
        files=MINE,
    ),
    Row(
        "weights shared across stages",
        (
            "'0.weight' (stage 0) and '2.weight' (stage 1) are one tensor: a stage owns its "
            "weights alone; put both layers into one stage with pipeline.balance: […], or "
            "give each its own tensor"
        ),
        command="train",
        arguments="--model my_models.tied --pipeline.balance [2,2]",
        files=MINE,
    ),
    Row(
        "a lazy layer",
        (
            "'0.weight' has no shape yet, its layer being lazy: run the model once on a "
            "sample, or give the layer its sizes"
        ),
        command="train",
        arguments="--model my_models.lazy --pipeline.balance [1,1]",
        files=MINE,
    ),
    Row(
        "more stages than layers",
        (
            "6 layers cannot make 9 stages, the layers being …: take fewer stages, or write "
            "a large layer as several"
        ),
        command="train",
        arguments="--stages 9 --pipeline.balance time",
    ),
    Row(
        "a balance that does not add up",
        (
            "pipeline.balance: [3, 4] has 7 layers, the model has 6: give numbers >= 1 "
            "that add up to it"
        ),
        command="train",
        arguments="--pipeline.balance [3,4]",
    ),
    Row(
        "a balance of another number of stages",
        (
            "pipeline.balance: [2, 2, 1] for 2 stages: write 'time', 'parameters', the "
            "number of layers of each of the 2 stages, or the name of each stage's first layer"
        ),
        command="train",
        arguments="--pipeline.balance [2,2,1]",
    ),
    Row(
        "a balance by a layer that is not there",
        "balance names the layer 'head'; the layers are ['0', '1', '2', '3', '4', '5']",
        command="train",
        arguments="--pipeline.balance '[\"0\",head]'",
    ),
    Row(
        "layers that do not fit each other",
        (
            "layer '1' (Linear) cannot take float32[8, 7]: RuntimeError: mat1 and mat2 "
            "shapes cannot be multiplied (8x7 and 6x8)"
        ),
        command="train",
        arguments="--data.train.init_args.shape [7] --pipeline.balance time",
    ),
    # The data
    Row(
        "a dataset without samples",
        "data.train: 0 samples make no mini-batch",
        command="train",
        arguments="--data.train my_data.Empty",
        files=MINE,
    ),
    Row(
        "fewer samples than a mini-batch, the rest dropped",
        "data.train: 32 samples make no mini-batch of 64, and drop_last drops smaller ones",
        command="train",
        arguments="--data.batch_size 64 --data.drop_last true",
    ),
    Row(
        "a dataset that raises",
        (
            "the loader raised OSError: the disk is on fire while making mini-batch 0 (… "
            "in __getitem__)"
        ),
        command="train",
        arguments="--data.train my_data.Burning",
        files=MINE,
    ),
    Row(
        "a dataset of inputs alone",
        (
            "mini-batch 0 is a Tensor: a loader must give pairs (input, target), each a "
            "tensor or a nest of tensors"
        ),
        command="train",
        arguments="--data.train my_data.Alone",
        files=MINE,
    ),
    Row(
        "a dataset without a length, and a schedule that needs it",
        (
            "scheduler: data.train does not say how many samples it has, so `total` is "
            "unknown: write the number of updates"
        ),
        command="train",
        arguments="--data.train my_data.Stream --data.shuffle false --scheduler cosine_with_warmup",
        files=MINE,
    ),
    Row(
        "an input that is not finite",
        (
            "stage 0 of 2, micro-batch 0: its input is not finite: look "
            "at the data. Staleness 0 updates, effective learning rate η/(1-m) = 0.2. Try a "
            "lower learning rate (what a delay allows falls as 1/(2τ+1)), "
            "pipeline.clip_grad_norm: 1.0, or pipeline.on_nonfinite: 'skip'"
        ),
        1,
        command="train",
        arguments="--data.train my_data.Infinite",
        files=MINE,
    ),
    Row(
        "a learning rate that diverges",
        (
            "stage 0 of 2, micro-batch 2: the output of layer '3' "
            "(Linear) is not finite, its input is. Staleness 1 updates, effective learning "
            "rate η/(1-m) = 2e+30. Try a lower learning rate (what a delay allows falls as "
            "1/(2τ+1)), pipeline.clip_grad_norm: 1.0, or "
            "pipeline.on_nonfinite: 'skip'"
        ),
        1,
        command="train",
        arguments="--optimizer.init_args.lr 1e30",
    ),
    Row(
        "a learning rate that diverges, one stage",
        (
            "stage 0 of 1, micro-batch 1: the output of layer '3' "
            "(Linear) is not finite, its input is. Staleness 0 updates, effective learning "
            "rate η/(1-m) = 2e+30. Try a lower learning rate, pipeline.clip_grad_norm: 1.0, "
            "or pipeline.on_nonfinite: 'skip'"
        ),
        1,
        command="train",
        arguments="--optimizer.init_args.lr 1e30 --stages 1 --pipeline.balance [6]",
    ),
    Row(
        "a loss that does not fit the targets",
        (
            "loss_fn MSELoss cannot take the output float32[8, 3] with the target int64[8]: "
            "The size of tensor a (3) must match the size of tensor b (8) at non-singleton "
            "dimension 1; give a loss and targets (their dtype and shape) that fit the "
            "model's output"
        ),
        command="train",
        arguments="--loss MSELoss",
    ),
    # How the stages work together
    Row(
        "`exact` under a stream",
        (
            "rule exact under schedule 'stream' with 2 stages: a stream never waits for the "
            "gradients of what is in flight, so they cannot be exact; write pipeline.rule: "
            "{class_path: delayed, init_args: {weights: stash}}, or pipeline.schedule: '1f1b'"
        ),
        command="train",
        arguments="--pipeline.rule exact",
    ),
    Row(
        "`delayed` under a flush",
        (
            "rule delayed under schedule '1f1b': nothing is stale under a flush; write "
            "pipeline.rule: exact, or pipeline.schedule: 'stream'"
        ),
        command="train",
        arguments="--pipeline.schedule 1f1b --pipeline.rule delayed",
    ),
    Row(
        "`synthetic` under a flush",
        (
            "rule synthetic under schedule 'gpipe': its stages never wait, and a flush does; "
            "write pipeline.schedule: 'stream', or pipeline.rule: exact"
        ),
        command="train",
        arguments="--pipeline.schedule gpipe --pipeline.rule synthetic",
    ),
    Row(
        "a weight policy that is none",
        "pipeline.rule: weights='stashed': write one of stash, current, replay, predict",
        command="train",
        arguments="--pipeline.rule delayed --pipeline.rule.init_args.weights stashed",
    ),
    Row(
        "as many rules as there are no stages",
        (
            "pipeline.rule is a list of 3, for 2 stages: give one for each stage, or a "
            "single one for all"
        ),
        command="train",
        arguments="--pipeline.rule [delayed,delayed,delayed]",
    ),
    Row(
        "micro-batches out of range",
        "pipeline.micro_batches is 0: give a whole number >= 1",
        command="train",
        arguments="--pipeline.micro_batches 0",
    ),
    Row(
        "slack out of range",
        (
            "pipeline.slack is -1: give a whole number >= 0, or one for each of the 1 hops "
            "between 2 stages, as in [1]"
        ),
        command="train",
        arguments="--pipeline.slack -1",
    ),
    Row(
        "a slack for each of too many hops",
        (
            "pipeline.slack is [1, 1]: give a whole number >= 0, or one for each of the 1 "
            "hops between 2 stages, as in [1]"
        ),
        command="train",
        arguments="--pipeline.slack [1,1]",
    ),
    Row(
        "`slack: auto` in one process",
        (
            "pipeline.slack: 'auto' measures the links of a stream under torchrun: alone, or "
            "under a schedule that flushes, write a number"
        ),
        command="train",
        arguments="--pipeline.slack auto",
    ),
    Row(
        "a norm out of range",
        "pipeline.clip_grad_norm is 0.0: give a number > 0, or null",
        command="train",
        arguments="--pipeline.clip_grad_norm 0",
    ),
    Row(
        "a device that is none",
        "pipeline.device is 'gpu': write cpu, cuda, or cuda:0 for a certain GPU",
        command="train",
        arguments="--pipeline.device gpu",
    ),
    Row(
        "a device that is not here",
        "pipeline.device is 'cuda': torch sees no GPU here; write pipeline.device: 'cpu'",
        command="train",
        arguments="--pipeline.device cuda",
    ),
    Row(
        "a time-out of one number",
        "pipeline.timeout must be a list of 2 numbers, not [60]",
        command="train",
        arguments="--pipeline.timeout [60]",
    ),
    Row(
        "a time-out of nothing",
        (
            "pipeline.timeout is (0.0, 0.0): give two numbers of seconds, until the first "
            "update and after it, as in (300, 60)"
        ),
        command="train",
        arguments="--pipeline.timeout [0,0]",
    ),
    Row(
        "a time-out that is no number",
        (
            "pipeline.timeout is (nan, nan): give two numbers of seconds, until the first "
            "update and after it, as in (300, 60)"
        ),
        command="train",
        arguments="--pipeline.timeout [.nan,.nan]",
    ),
    Row(
        "more threads than any machine has",
        "threads must be at most 1024, not 100000000",
        command="train",
        arguments="--threads 100000000",
    ),
    # Corrections and batches
    Row(
        "spike compensation of Adam",
        (
            "spike_compensation is defined for SGD with momentum, and Muon, and this is "
            "AdamW: write one of them, or weight_prediction, which every optimizer can have"
        ),
        command="train",
        arguments="--optimizer.class_path AdamW --pipeline.corrections spike_compensation",
    ),
    Row(
        "spike compensation without momentum",
        (
            "spike_compensation is about momentum, and this SGD has none: write a momentum "
            "above 0, or leave the correction out"
        ),
        command="train",
        arguments="--optimizer.init_args.momentum 0 --pipeline.corrections spike_compensation",
    ),
    Row(
        "a correction that needs weights that are not kept",
        (
            "pipeline.corrections has a GapAware, which compares with the weights of the "
            "forward, and a rule does not keep them: write pipeline.rule: {class_path: "
            "delayed, init_args: {weights: stash}}"
        ),
        command="train",
        arguments=(
            "--pipeline.corrections gap_aware --pipeline.rule delayed "
            "--pipeline.rule.init_args.weights current"
        ),
    ),
    Row(
        "the same correction twice",
        (
            "pipeline.corrections has weight_prediction and weight_prediction, which are the "
            "same: leave out all but one"
        ),
        command="train",
        arguments="--pipeline.corrections [weight_prediction,weight_prediction]",
    ),
    Row(
        "a correction that undoes one that `auto` chooses",
        (
            "pipeline.corrections has spike_compensation (chosen by auto) and "
            "asynchronous_nesterov, which both change how momentum steps, Nesterov's way or "
            "another: leave out all but one"
        ),
        command="train",
        arguments="--pipeline.corrections [auto,asynchronous_nesterov]",
    ),
    Row(
        "basis rotation of SGD",
        (
            "basis_rotation is defined for Adam, AdamW and NAdam, and this is SGD: write one "
            "of them, or leave it out"
        ),
        command="train",
        arguments="--pipeline.corrections basis_rotation",
    ),
    Row(
        "two versions with too few micro-batches",
        (
            "pipeline.corrections has two_versions, which needs as many micro-batches to "
            "an update as are in flight at the first stage: write pipeline.update_every: 4 "
            "or more, not 1"
        ),
        command="train",
        arguments="--stages 5 --pipeline.balance [2,1,1,1,1] --pipeline.corrections two_versions",
    ),
    Row(
        "two versions beside a batch in samples",
        (
            "pipeline.corrections has two_versions, which must know how many micro-batches an "
            "update has, and pipeline.batch_size is in samples: leave two_versions out (without "
            "it, too, nothing is more than 1 update late while an update has 4 micro-batches or "
            "more), or write pipeline.update_every: 4 in place of pipeline.batch_size"
        ),
        command="train",
        arguments=(
            "--stages 5 --pipeline.balance [2,1,1,1,1] --pipeline.corrections two_versions "
            "--pipeline.batch_size.class_path steps --pipeline.batch_size.init_args.sizes "
            "[32,64] --pipeline.batch_size.init_args.at [1]"
        ),
    ),
    Row(
        "a growing batch beside a constant one",
        (
            "pipeline.update_every: 2 beside pipeline.batch_size: both say when an update is "
            "made, one in micro-batches and one in samples: leave one of them out"
        ),
        command="train",
        arguments=(
            "--pipeline.batch_size.class_path steps --pipeline.batch_size.init_args.sizes "
            "[8,16] --pipeline.batch_size.init_args.at [1] --pipeline.update_every 2"
        ),
    ),
    Row(
        "a growth without bounds",
        "pipeline.batch_size: factor=inf: give a finite number >= 1, as 1.1",
        command="train",
        arguments=(
            "--pipeline.batch_size.class_path geometric --pipeline.batch_size.init_args.start 8 "
            "--pipeline.batch_size.init_args.most 64 --pipeline.batch_size.init_args.factor .inf"
        ),
    ),
    Row(
        "an update smaller than a micro-batch",
        (
            "pipeline.batch_size is a Steps that starts at 4 samples, and a micro-batch has "
            "8: start at 8 or more, or make the loader's mini-batches smaller, or "
            "pipeline.micro_batches larger"
        ),
        command="train",
        arguments=(
            "--pipeline.batch_size.class_path steps --pipeline.batch_size.init_args.sizes "
            "[4,16] --pipeline.batch_size.init_args.at [1]"
        ),
    ),
    # Replicas and processes
    Row(
        "replicas in one process",
        (
            "pipeline.replicas are processes beside each other: start the script with "
            "torchrun --nproc-per-node 4"
        ),
        command="train",
        arguments="--pipeline.replicas allreduce",
    ),
    Row(
        "more stages than processes",
        (
            "stages: 2, but torchrun started 4 processes: start it with --nproc-per-node 2, "
            "or write --stages 4"
        ),
        command="train",
        ranks=4,
    ),
    Row(
        "replicas that do not divide the processes",
        "3 ranks do not make replicas of 2 stages: start with torchrun --nproc-per-node 4",
        command="train",
        arguments="--pipeline.replicas allreduce",
        ranks=3,
    ),
    Row(
        "replicas and servers that do not divide the processes",
        (
            "3 ranks do not make replicas of 2 stages and 2 servers: start with torchrun "
            "--nproc-per-node 6, or write beside: true for servers without ranks"
        ),
        command="train",
        arguments="--pipeline.replicas downpour",
        ranks=3,
    ),
    Row(
        "replicas without `stages`",
        "pipeline.replicas needs `stages`, the number of stages of each replica",
        command="train",
        arguments="--stages null --pipeline.replicas allreduce",
        ranks=4,
    ),
    Row(
        "an address that is none",
        "pipeline.replicas: address is 'here': write host:port, as in '10.0.0.5:29600'",
        command="train",
        arguments="--pipeline.replicas.class_path downpour "
        "--pipeline.replicas.init_args.address here",
    ),
    Row(
        "a folder that cannot be written",
        (
            "runs/tiny cannot be made: Not a directory; start in a folder that you may write "
            "to, or move away what is in the way"
        ),
        command="train",
        files={"runs": "a file"},
    ),
    # The other commands
    Row(
        "without torchrun",
        (
            "throughput compares systems over several processes: start it with torchrun "
            "--nproc-per-node N -m headrace.launch.throughput --config FILE"
        ),
        command="throughput",
    ),
    Row(
        "a row that is none",
        "--rows dpp: there is no such row; write …",
        command="throughput",
        arguments="--rows dpp",
        ranks=2,
    ),
    Row(
        "no rounds",
        "--rounds 0: give a whole number of at least 1",
        command="throughput",
        arguments="--rounds 0",
        ranks=2,
    ),
    Row(
        "a link that is slower than nothing",
        "--link-latency-ms -1.0: give milliseconds, 0 or more",
        command="throughput",
        arguments="--link-latency-ms -1",
        ranks=2,
    ),
    Row(
        "replicas",
        (
            "throughput measures one pipeline: write --pipeline.replicas null; "
            "headrace.launch.studies.scaling measures replicas"
        ),
        command="throughput",
        arguments="--pipeline.replicas allreduce",
        ranks=2,
    ),
    Row(
        "results that are there already",
        "--out old: an earlier run's results are there; give another folder",
        command="throughput",
        arguments="--out old",
        ranks=2,
        files={"old/table.json": ""},
    ),
    Row(
        "stages that are no numbers",
        "--stages two: give whole numbers from 1 on, as in 8,16,32",
        command="simulate",
        arguments="--stages two",
    ),
    Row(
        "more stages than layers",
        (
            "--stages 9: the model has 6 layers, and each stage needs one: write --stages up "
            "to 6, or --scale-depth KEY (model.init_args.blocks of a gpt) for a depth that "
            "follows the stages"
        ),
        command="simulate",
        arguments="--stages 2,9",
    ),
    Row(
        "a variant of more stages than layers",
        (
            "variant 'deep' has stages: 9, the model has 6 layers, and each stage needs one: write "
            "stages: 6 there, or fewer, or leave it out"
        ),
        command="simulate",
        arguments="--stages 2 --variants variants.yaml",
        files={"variants.yaml": "stash: {}\ndeep: {stages: 9}\n"},
    ),
    Row(
        "a variant that comes last and is bad",
        (
            "variant 'late', 2 stages: pipeline.corrections has a GapAware, which "
            "compares with the weights of the forward, and a rule does not keep them: write "
            "pipeline.rule: {class_path: delayed, init_args: {weights: stash}}"
        ),
        command="simulate",
        arguments="--stages 2 --variants bad.yaml",
        files={"bad.yaml": VARIANTS},
    ),
    Row(
        "variants that are not there",
        "--variants none: no such file (Headrace brings …)",
        command="simulate",
        arguments="--stages 2 --variants none",
    ),
    Row(
        "one rate to choose from",
        "--tune chooses among --rates: give two or more, as in 1e-3,3e-3",
        command="simulate",
        arguments="--stages 2 --tune --rates 0.1",
    ),
    Row(
        "no seeds",
        "--seeds 0: give a whole number of at least 1",
        command="simulate",
        arguments="--stages 2 --seeds 0",
    ),
    Row(
        "a folder that cannot be written",
        (
            "runs cannot be made: runs is a file; start in a folder that you may write to, "
            "or move away what is in the way"
        ),
        command="simulate",
        arguments="--stages 2",
        files={"runs": "a file"},
    ),
    Row(
        "torchrun",
        "simulate runs in one process: start it without torchrun",
        command="simulate",
        arguments="--stages 2",
        ranks=2,
    ),
    Row(
        "a folder that is no run",
        (
            "--checkpoint .: neither a run nor a checkpoint is there; give a run's folder, as "
            "runs/digits, or one with a checkpoint.json"
        ),
        command="sharpness",
        arguments="--checkpoint .",
        config=False,
    ),
    Row(
        "a seed below 0",
        "--seed -1: give a whole number from 0 on and below 2^64",
        command="sharpness",
        arguments="--checkpoint run --seed -1",
        config=False,
    ),
    Row(
        "a run that has not ended, without a checkpoint",
        "--checkpoint run: no weights.pt and no checkpoint there; the run has not ended",
        command="sharpness",
        arguments="--checkpoint run",
        config=False,
        files={"run/config.yaml": CONFIG},
    ),
    Row(
        "weights that are none",
        "--checkpoint run: weights.pt cannot be read; give a run that has ended whole",
        command="sharpness",
        arguments="--checkpoint run",
        config=False,
        files={"run/config.yaml": CONFIG, "run/weights.pt": "text"},
    ),
    Row(
        "a checkpoint made in Python",
        (
            "--checkpoint step: no configuration is in its notes, where headrace.launch.train "
            "keeps it: give a folder with a config.yaml, and a weights.pt by "
            "torch.save(load_weights('step'), 'weights.pt')"
        ),
        command="sharpness",
        arguments="--checkpoint step",
        config=False,
        files={"step/checkpoint.json": MANIFEST},
    ),
    Row(
        "a checkpoint of which a file is gone",
        (
            "--checkpoint step: step/weights/stage-0.safetensors cannot be read: No such file or "
            "directory: the checkpoint is damaged; go on from an older one, or remove it"
        ),
        command="sharpness",
        arguments="--checkpoint step",
        config=False,
        files={
            "step/checkpoint.json": MANIFEST.replace(
                '"files": {}',
                '"files": {"weights/stage-0.safetensors": {"bytes": 8, "sha256": ""}}',
            )
        },
    ),
    Row(
        "a box out of range",
        "--epsilon 2: give numbers above 0 and below 1, as 1e-3",
        command="sharpness",
        arguments="--checkpoint run --epsilon 2",
        config=False,
    ),
    Row(
        "files that cannot be written",
        "--out tiny.yaml: it cannot be made: tiny.yaml is a file; give another folder",
        command="sharpness",
        arguments="--checkpoint run --out tiny.yaml",
        config=False,
        files={"run/config.yaml": CONFIG, "run/weights.pt": "text"},
    ),
    Row(
        "three runs",
        "--checkpoint has 3 folders: give one, or two for the line",
        command="sharpness",
        arguments="--checkpoint a b c",
        config=False,
    ),
    Row(
        "a configuration beside a run's own",
        "--config: a checkpoint has its own configuration; leave it out",
        command="sharpness",
        arguments="--checkpoint run",
        files={"run/config.yaml": CONFIG},
    ),
    Row(
        "a model that is no `nn.Sequential`",
        (
            "model is a Linear: a pipeline cuts an nn.Sequential between its layers; write "
            "the model as nn.Sequential(first, second, …), each layer taking what the one "
            "before gives"
        ),
        command="plan",
        arguments="--model my_models.linear",
        files=MINE,
    ),
    Row(
        "more stages than layers",
        (
            "6 layers cannot make 7 stages, the layers being …: take fewer stages, or write "
            "a large layer as several"
        ),
        command="plan",
        arguments="--stages 7 --pipeline.balance time",
    ),
    Row(
        "no address",
        (
            "launch.serve is for `stages`, and `pipeline.replicas` downpour or elastic with "
            "a `count` and an `address`, as in address: 127.0.0.1:29600"
        ),
        command="serve",
        arguments="--pipeline.replicas downpour",
    ),
    Row(
        "without torchrun",
        "serve() needs torchrun --nproc-per-node 2: a process a stage",
        command="serve",
        arguments=(
            "--pipeline.replicas.class_path downpour --pipeline.replicas.init_args.address "
            "127.0.0.1:1 --pipeline.replicas.init_args.count 2"
        ),
    ),
    # Python
    Row(
        "a model that is no `nn.Sequential`",
        (
            "model is a Linear: a pipeline cuts an nn.Sequential between its layers; write "
            "the model as nn.Sequential(first, second, …), each layer taking what the one "
            "before gives"
        ),
        TypeError,
        act=new(model=nn.Linear(2, 2)),
    ),
    Row(
        "a `forward` of a Sequential's own",
        (
            "model is a Skips with a forward() of its own, which would not run: a pipeline "
            "calls the layers one after the other; move what it does into layers"
        ),
        TypeError,
        act=new(model=Skips(nn.Linear(2, 2))),
    ),
    Row(
        "a loss that cannot be called",
        "loss_fn='mse' cannot be called: give a function or a module",
        TypeError,
        act=new(loss_fn="mse"),
    ),
    Row(
        "an optimizer for a function",
        (
            "optimizer is a SGD: give a function that makes one for a stage's parameters, as "
            "in optimizer=lambda params: torch.optim.SGD(params, lr=0.1)"
        ),
        TypeError,
        act=new(optimizer=sgd(network().parameters())),
    ),
    Row(
        "a factory that raises",
        (
            "optimizer= raised ZeroDivisionError: division by zero, for the parameters "
            "'0.weight' and 3 others"
        ),
        InputError,
        act=train(pairs(), optimizer=lambda p: 1 / 0),
    ),
    Row(
        "a factory of no optimizer",
        (
            "optimizer= gave a str: it must be a function that takes a list of (name, "
            "Parameter) pairs and gives a torch.optim.Optimizer, or a list of them, as in "
            "optimizer=lambda params: torch.optim.SGD(params, lr=0.1)"
        ),
        TypeError,
        act=train(pairs(), optimizer=lambda p: "SGD"),
    ),
    Row(
        "an optimizer of other parameters",
        (
            "optimizer= gave an optimizer of other parameters than it was called with: make "
            "it of its argument, as in optimizer=lambda params: torch.optim.SGD(params, lr=0.1)"
        ),
        ValueError,
        act=train(pairs(), optimizer=lambda p: sgd(network().parameters())),
    ),
    Row(
        "an optimizer that calls back",
        (
            "optimizer= gave an LBFGS, which runs the model as often as it likes, and a "
            "stream does so once: write SGD, AdamW or another that steps on one gradient"
        ),
        TypeError,
        act=train(pairs(), optimizer=lambda p: torch.optim.LBFGS([w for _, w in p])),
    ),
    Row(
        "a name for a rule",
        (
            "rule='delayed': give an object, or a list of one for each stage, as in "
            "rule=Delayed('stash') with from headrace.pipeline.rules import Delayed"
        ),
        TypeError,
        act=new(rule="delayed"),
    ),
    Row(
        "a name for a correction",
        (
            "corrections=['gap_aware']: give objects, as in "
            "corrections=[LearningRate('inverse')] with from headrace.pipeline.corrections "
            "import LearningRate"
        ),
        TypeError,
        act=new(corrections=["gap_aware"]),
    ),
    Row(
        "a name for replicas",
        (
            "replicas='hogwild': give an Allreduce, Hogwild, Downpour or Elastic, as in "
            "replicas=Allreduce(2) with from headrace.pipeline.replicas import Allreduce"
        ),
        TypeError,
        act=new(replicas="hogwild"),
    ),
    Row(
        "a number for a growth",
        (
            "batch_size=64: give an object, as in batch_size=Steps([64, 512], at=[5]) with "
            "from headrace.pipeline.batch_size import Steps; a constant size is "
            "update_every= micro-batches of the loader's"
        ),
        TypeError,
        act=new(batch_size=64),
    ),
    Row(
        "a number for a link",
        (
            "emulated_link=0.02: give a Link, as in emulated_link=Link(latency=0.02) with "
            "from headrace.pipeline import Link"
        ),
        TypeError,
        act=new(emulated_link=0.02),
    ),
    Row(
        "a name for a dtype",
        "autocast='bfloat16': give a dtype, as in autocast=torch.bfloat16",
        TypeError,
        act=new(autocast="bfloat16"),
    ),
    Row(
        "a schedule that is none",
        "schedule='zero-bubble': write one of gpipe, 1f1b, stream",
        ValueError,
        act=new(schedule="zero-bubble"),
    ),
    Row(
        "stages out of range",
        "stages=0: give a whole number >= 1",
        ValueError,
        act=new(stages=0),
    ),
    Row(
        "no list of stages' rules",
        ("rule= is a list of 1, for 2 stages: give one for each stage, or a single one for all"),
        ValueError,
        act=new(rule=[Exact()]),
    ),
    Row(
        "weights shared across stages",
        (
            "'0.weight' (stage 0) and '3.weight' (stage 1) are one tensor: a stage owns its "
            "weights alone; put both layers into one stage with balance=[…], or give each "
            "its own tensor"
        ),
        ValueError,
        act=train(pairs(), model=tied()),
    ),
    Row(
        "a loader of nothing",
        (
            "the loader gave no mini-batch: give a DataLoader or a list of (input, target) "
            "pairs; a generator can be read only once, and drop_last=True drops a lone short "
            "batch"
        ),
        InputError,
        act=train([]),
    ),
    Row(
        "a loader that raises",
        ("the loader raised OSError: the disk is on fire while making mini-batch 1 (… in burning)"),
        InputError,
        act=train(burning),
    ),
    Row(
        "one mini-batch for a loader",
        (
            "mini-batch 0 is a Tensor: a loader must give pairs (input, target), each a "
            "tensor or a nest of tensors"
        ),
        InputError,
        act=train(pairs()[0]),
    ),
    Row(
        "inputs alone",
        (
            "mini-batch 0 is a Tensor: a loader must give pairs (input, target), each a "
            "tensor or a nest of tensors"
        ),
        InputError,
        act=train([x for x, _ in pairs()]),
    ),
    Row(
        "text among tensors",
        (
            "mini-batch 0: found a str ('a') where a tensor was expected: between layers, "
            "and from a loader, only tensors travel, and plain tuples, lists and dicts (with "
            "string keys) of tensors; make it a tensor, or keep it inside a layer"
        ),
        InputError,
        act=train([(x, {"y": y, "name": "a"}) for x, y in pairs()]),
    ),
    Row(
        "unlike numbers of samples",
        (
            "a mini-batch's tensors must all have the samples in dimension 0, got "
            "(float32[4, 6], float32[3, 6]): give each tensor the same size there"
        ),
        InputError,
        act=train([(x, y[:3]) for x, y in pairs()]),
    ),
    Row(
        "a loss for each sample",
        (
            "loss_fn MSELoss gave float32[4, 6]: it must give one floating number, the mean "
            "over the samples (reduction='mean')"
        ),
        InputError,
        act=train(pairs(), loss_fn=nn.MSELoss(reduction="none")),
    ),
    Row(
        "a number out of range, in a correction",
        "factor=-1: give a number above 0",
        ValueError,
        act=partial(LearningRate, -1),
    ),
    Row(
        "a form that is none",
        "form='adam': write one of last_update, linear, momentum",
        ValueError,
        act=partial(WeightPrediction, form="adam"),
    ),
    Row(
        "an optimizer's class by a number",
        "of=3: give the name of an optimizer's class, as in of='Muon'",
        ValueError,
        act=partial(WeightPrediction, of=3),
    ),
    Row(
        "weights that are no tensors",
        "'a' is a int, and weights are tensors: give a model's state_dict()",
        TypeError,
        act=partial(save_weights, {"a": 1}, "weights.safetensors"),
    ),
    Row(
        "weights for a folder that is not there",
        "[Errno 2] No such file or directory: 'gone/weights.safetensors'",
        FileNotFoundError,
        act=partial(save_weights, {"a": torch.zeros(1)}, "gone/weights.safetensors"),
    ),
    Row(
        "Nesterov's way for plain SGD",
        (
            "asynchronous_nesterov is SGD with one momentum above 0, or NAdam, and this is "
            "SGD: write optimizer NAdam with betas [0.99, 0.999], or SGD with momentum 0.9"
        ),
        InputError,
        act=train(pairs(), corrections=[AsynchronousNesterov()]),
    ),
    Row(
        "a correction of weights that are kept",
        (
            "corrections= has a PipeMareT2, which stands in for weights of the forward that "
            "are not kept, and a rule keeps them, or runs the forward again: write "
            "rule=Delayed(weights='current'), or leave the correction out"
        ),
        ValueError,
        act=new(corrections=[PipeMareT2()]),
    ),
    Row(
        "a share out of range",
        "p_update=0: give a share in (0, 1]",
        ValueError,
        act=partial(Synthetic, p_update=0),
    ),
    Row(
        "a lag and an ahead",
        "ahead=1 has no meaning with lag=2: leave one of them out",
        ValueError,
        act=partial(Synthetic, lag=2, ahead=1),
    ),
    Row(
        "a local rule's head that is none",
        "head=3 cannot be called: give a class or a function",
        TypeError,
        act=partial(Local, outputs=3, head=3),
    ),
    Row(
        "a policy that is none",
        "weights='stashed': write one of stash, current, replay, predict",
        ValueError,
        act=partial(Delayed, "stashed"),
    ),
    Row(
        "sizes that do not match",
        (
            "sizes=[16, 32] with at=[1, 2] and factor=None: give a size for the start and "
            "one after each of at, and no factor, as in Steps([16, 80, 400], at=[15, 30])"
        ),
        ValueError,
        act=partial(Steps, [16, 32], at=[1, 2]),
    ),
    Row(
        "a factor below 1",
        "factor=0.5: give a finite number >= 1, as 1.1",
        ValueError,
        act=partial(Geometric, 16, factor=0.5, most=64),
    ),
    Row(
        "torchrun's port in use",
        "the ranks cannot meet at 127.0.0.1:…in use…; if another job holds that port, choose "
        "another with torchrun --master-port, or use --standalone",
        InputError,
        act=meet_at_a_port_in_use,
    ),
    Row(
        "the servers' port in use",
        "the servers cannot keep their store at 127.0.0.1:…: Address already in use; write an "
        "address of this machine with a port that nobody holds, and the same for every replica",
        InputError,
        act=serve_at_a_port_in_use,
    ),
    Row(
        "no replicas",
        "count=0: give 1 or more replicas",
        ValueError,
        act=partial(Allreduce, 0),
    ),
    Row(
        "a bound that none can keep",
        (
            "bound=0 with prefetch=1 and n_fetch=4: a replica goes on for 4 updates before "
            "it hears that it must wait; give a larger bound, or prefetch=0"
        ),
        ValueError,
        act=partial(Downpour, bound=0, n_fetch=4),
    ),
    Row(
        "an alpha out of range",
        "alpha=2: give a number above 0, up to 1, or None",
        ValueError,
        act=partial(Elastic, alpha=2),
    ),
    Row(
        "a latency below 0",
        "latency=-1.0: give seconds, 0 or more",
        ValueError,
        act=partial(Link, latency=-1.0),
    ),
    # Checkpoints
    Row(
        "no mini-batches between two checkpoints",
        "checkpoint.every must be at least 1, not 0",
        command="train",
        arguments="--checkpoint.every 0",
    ),
    Row(
        "a word that is no interval",
        "checkpoint.every must be a whole number, or epoch, or null, not 'hourly'",
        command="train",
        arguments="--checkpoint.every hourly",
    ),
    Row(
        "a checkpoint that is not there",
        "there is no runs/mine: write a checkpoint's folder, or that of several",
        command="train",
        arguments="--checkpoint.resume runs/mine",
    ),
    Row(
        "a checkpoint of no name",
        "checkpoint.resume is '': write auto, a checkpoint's folder, or null",
        command="train",
        arguments="--checkpoint.resume \"''\"",
    ),
    Row(
        "a folder without a checkpoint",
        ("no checkpoint is in notes (there is a.txt): one is a folder with checkpoint.json"),
        command="train",
        arguments="--checkpoint.resume notes",
        files={"notes/a.txt": "x"},
    ),
    Row(
        "a manifest that was cut short",
        (
            "no checkpoint in bad is whole: bad/step/checkpoint.json is no manifest of a "
            "checkpoint (…): the checkpoint is damaged; go on from an older one, or remove it"
        ),
        command="train",
        arguments="--checkpoint.resume bad",
        files={"bad/step/checkpoint.json": "{"},
    ),
    Row(
        "checkpoints beside which there is no name",
        (
            "runs/tiny/config.yaml does not say which run the checkpoints beside it are of: give "
            "checkpoint.resume runs/tiny to go on from them, or move runs/tiny away"
        ),
        command="train",
        arguments="--checkpoint.resume auto",
        files={"runs/tiny/checkpoints/step/checkpoint.json": "{}"},
    ),
    Row(
        "a checkpoint of a number of none",
        "keep=0: give a whole number >= 1",
        ValueError,
        act=partial(Checkpoints, "x", keep=0),
    ),
    Row(
        "a save that is to keep none",
        "keep=0: give a whole number >= 1, or None: all are kept",
        ValueError,
        act=save("x", keep=0),
    ),
    Row("a save into no folder", "path=5: give a folder's name", TypeError, act=save(5)),
    Row(
        "a checkpoint of another optimizer",
        (
            "the checkpoint has no AdamW of '0.weight', but SGD of others: write the optimizer "
            "that it was saved with, or load its weights alone"
        ),
        CheckpointError,
        act=resume(optimizer=torch.optim.AdamW),
    ),
    Row(
        "a checkpoint of other widths",
        (
            "saved has 2.weight of the shape [6, 6], and this model has it of [5, 6]: its weights "
            "do not fit either; build the model that it was saved of"
        ),
        CheckpointError,
        act=resume(model=narrow()),
    ),
    Row(
        "a manifest of too many depths",
        (
            "saved/checkpoint.json is no manifest of a checkpoint (depths=[1, 1, 0] of 2 stages: "
            "there is to be one for each): the checkpoint is damaged; go on from an older one, or "
            "remove it"
        ),
        CheckpointError,
        act=resume({"depths": [1, 1, 0]}),
    ),
    Row(
        "a configuration in the notes that is none",
        (
            "…checkpoint.json: notes.config is no configuration (…): the checkpoint is damaged, or "
            "its notes are another program's"
        ),
        CheckpointError,
        act=partial(check_notes, Path("saved"), {"config": "a: [1"}),
    ),
)
