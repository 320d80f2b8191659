"""Odd models train as they would on one device, whatever the schedule and the weight policy.

Two oracles, both plain torch: under a flush, an update per mini-batch; under the stream with as
many micro-batches to an update as there are, where every policy's weights are the first ones and
the one update is that of the mean gradient.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from headrace.pipeline import Pipeline
from headrace.pipeline.rules import Delayed

from .helpers import assert_close
from .odd_models import ODD, Odd


def made(name: str) -> Odd:
    torch.manual_seed(0)
    return ODD[name]()


def momentum(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05, momentum=0.9)


def pipeline(odd: Odd, stages: int, **options: Any) -> Pipeline:
    return Pipeline(
        odd.model, odd.loss_fn, momentum, stages=stages, balance=odd.balance(stages), device="cpu",
        **options,
    )  # fmt: skip


def trained_plainly(odd: Odd, update_every: int) -> dict[str, Tensor]:
    model = copy.deepcopy(odd.model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = momentum(parameters)
    for k in range(0, len(odd.batches), update_every):
        group = odd.batches[k : k + update_every]
        samples = sum(len(tree_leaves(y)[0]) for _, y in group)
        optimizer.zero_grad()
        for x, y in copy.deepcopy(group):
            loss: Any = odd.loss_fn(model(x), y) * len(tree_leaves(y)[0]) / samples
            loss.backward()
        optimizer.step()
    return model.state_dict()


def real(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: torch.view_as_real(t) if t.is_complex() else t for n, t in state.items()}


def stages_of(name: str) -> list[int]:
    """unused_parameters has one layer in two places, which only two stages can hold."""
    return [1, 2] if name == "unused_parameters" else [1, 2, 3]


CASES = [(name, stages) for name in ODD for stages in stages_of(name)]


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("name", "stages"), CASES)
def test_exact(name: str, stages: int, schedule: str) -> None:
    odd = made(name)
    expected = trained_plainly(odd, 1)
    before = copy.deepcopy(odd.batches)
    with pipeline(odd, stages, schedule=schedule, micro_batches=2) as pipe:
        report = pipe.train(odd.batches)
        assert report.updates == len(odd.batches)
        assert_close(real(pipe.state_dict()), real(expected))
    for a, b in zip(tree_leaves(odd.batches), tree_leaves(before), strict=True):
        assert torch.equal(a, b) and a.grad is None  # the user's data are the user's


@pytest.mark.parametrize("weights", ["current", "stash", "replay", "predict"])
@pytest.mark.parametrize(("name", "stages"), CASES)
def test_delayed(name: str, stages: int, weights: str) -> None:
    odd = made(name)
    expected = trained_plainly(odd, len(odd.batches))
    pipe = pipeline(odd, stages, rule=Delayed(weights), update_every=len(odd.batches))
    pipe.train(odd.batches)
    pipe.drain()
    assert pipe.version == 1
    assert_close(real(pipe.state_dict()), real(expected))
    # And on, with updates under way; three times as many as any depth here.
    for _ in range(3):
        assert pipe.train(odd.batches).loss < float("inf")
    pipe.close()


@pytest.mark.parametrize("weights", ["current", "replay"])
@pytest.mark.parametrize("name", ["own_parameter", "own_buffer"])
def test_what_leaves_a_stage_is_none_of_its_own_tensors(name: str, weights: str) -> None:
    """On the wire it would still be waiting to be sent when the next update moves it."""
    odd = made(name)
    stage = pipeline(odd, 2, rule=Delayed(weights))._engines[0].stage
    output: Any = stage.forward(0, odd.batches[0][0], None, 4)
    shift = stage.layers.state_dict()["2.shift"]
    assert torch.equal(output[1], shift) and output[1].data_ptr() != shift.data_ptr()


@pytest.mark.parametrize("update_every", [1, 3])
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_sparse_gradients_with_their_own_optimizer(stages: int, update_every: int) -> None:
    odd = made("sparse_embedding")
    dense = made("language_model")
    batches = [*odd.batches] * 4

    def optimizers(params: list[tuple[str, nn.Parameter]]) -> list[torch.optim.Optimizer]:
        table = [p for name, p in params if name == "0.weight"]
        rest = [p for name, p in params if name != "0.weight"]
        made = [torch.optim.SGD(rest, lr=0.1)] if rest else []
        return [*made, torch.optim.SparseAdam(table, lr=0.01)] if table else list(made)

    def run(odd: Odd, optimizer: Any) -> dict[str, Tensor]:
        with Pipeline(
            odd.model, odd.loss_fn, optimizer, stages=stages, balance=odd.balance(stages),
            update_every=update_every, device="cpu",
        ) as pipe:  # fmt: skip
            pipe.train(batches)
        return pipe.state_dict()

    before = odd.model.state_dict()["0.weight"].clone()
    got = run(odd, optimizers)
    assert (got["0.weight"] != before).any(dim=1).all()  # every word has occurred
    plain = lambda params: torch.optim.SGD(params, lr=0.1)  # noqa: E731
    assert_close(run(made("sparse_embedding"), plain), run(dense, plain))


def test_a_shared_relu_is_cut_by_time_too() -> None:
    """The layers were taken from `named_children`, which leaves a second occurrence out."""
    odd = made("shared_layers")
    pipe = Pipeline(odd.model, odd.loss_fn, momentum, stages=1, device="cpu")
    assert pipe.partition is not None and pipe.partition.sizes == (7,)
    act = nn.ReLU()
    model = nn.Sequential(nn.Linear(5, 4), act, nn.Linear(4, 4), act, nn.Linear(4, 3)).double()
    pipe = Pipeline(model, odd.loss_fn, momentum, stages=3, device="cpu")
    partition = pipe.prepare(odd.batches)
    assert [layer.name for layer in partition.layers] == ["0", "1", "2", "3", "4"]
    assert sum(partition.sizes) == 5
