"""Weights that several replicas map: two of them in one process here, by the same way."""

import json
import os
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing import reductions

from headrace.pipeline.errors import InputError
from headrace.pipeline.layers import Layers
from headrace.pipeline.shared_weights import ALIGNMENT, ROW, SharedWeights, _from_json, _to_json


class Board:
    """What replicas tell each other."""

    def __init__(self) -> None:
        self.notes: dict[str, str] = {}

    def share(self, key: str, text: str) -> None:
        self.notes[key] = text

    def learn(self, key: str) -> str:
        return self.notes[key]


def layers(seed: int) -> Layers:
    torch.manual_seed(seed)
    return Layers(
        [("0", nn.Linear(3, 5)), ("1", nn.BatchNorm1d(5)), ("2", nn.Linear(5, 2).double())]
    )


def share(made: Layers, replica: int, board: Any) -> SharedWeights:
    return SharedWeights(made, replica, 2, board, "weights/0")


def test_what_one_writes_the_other_reads() -> None:
    board, one, other = Board(), layers(0), layers(1)
    expected = {name: value.clone() for name, value in one.state_dict().items()}
    first = share(one, 0, board)
    second = share(other, 1, board)
    for name, value in other.state_dict().items():
        assert torch.equal(value, expected[name]), "the first one's weights, and buffers"
        assert value.data_ptr() % ALIGNMENT == 0
    with torch.no_grad():
        other[0].weight.fill_(7)
    assert (one[0].weight == 7).all()
    one[1](torch.randn(4, 5))
    assert torch.equal(one[1].running_mean, other[1].running_mean)
    assert other[1].num_batches_tracked == 1
    first.counters[ROW + 1] = 9
    assert second.counters[ROW + 1] == 9
    assert len(second.counters) == 2 * ROW


def test_gradients_and_optimizers_work_on_it() -> None:
    """And a version counter of autograd's does not see the other's writes."""
    board, one, other = Board(), layers(0), layers(0)
    share(one, 0, board)
    share(other, 1, board)
    loss = one[0](torch.ones(1, 3)).sum()
    with torch.no_grad():
        other[0].weight += 1
    loss.backward()
    optimizer = torch.optim.SGD(one.parameters(), lr=0.5)
    before = other[0].bias.clone()
    optimizer.step()
    assert torch.equal(other[0].bias, before - 0.5)


def test_another_host_is_refused() -> None:
    board, one, other = Board(), layers(0), layers(0)
    share(one, 0, board)
    process, file, size = json.loads(board.notes["weights/0"])
    board.notes["weights/0"] = json.dumps([2**22 + 1, file, size])
    with pytest.raises(InputError, match=r"hogwild shares weights in the memory of one host, and"):
        share(other, 1, board)
    board.notes["weights/0"] = json.dumps([process, os.open("/dev/zero", os.O_RDWR), size])
    with pytest.raises(InputError, match=r"it is another file"):
        share(other, 1, board)


def test_another_model_is_refused() -> None:
    board = Board()
    share(layers(0), 0, board)
    with pytest.raises(RuntimeError, match=r"replica 0's weights take \d+ bytes, these \d+"):
        share(Layers([("0", nn.Linear(30, 50))]), 1, board)


def test_handles_of_a_gpus_memory_travel_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch gives them, and as it takes them: nothing is pickled."""
    kind = torch.storage.TypedStorage
    given = (
        torch.Tensor, torch.Size([3, 2]), (2, 1), 5, kind, torch.float16, 0, b"\x00\xff", 64, 16,
        False, b"counter", 8, b"event", True,
    )  # fmt: skip
    taken: list[object] = []
    monkeypatch.setattr(reductions, "rebuild_cuda_tensor", lambda *each: taken.extend(each))
    _from_json(json.loads(json.dumps(_to_json(given))), torch.float16)
    assert tuple(taken) == given
