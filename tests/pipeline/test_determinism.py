"""The same program twice in one process: bitwise the same numbers, dropout included."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headrace.pipeline import Pipeline
from headrace.pipeline.rules import Delayed

from .helpers import adamw, assert_same, batches_of, clone, normed

CONFIGS: dict[str, dict[str, Any]] = {
    "gpipe": {"schedule": "gpipe", "micro_batches": 2},
    "1f1b": {"schedule": "1f1b", "micro_batches": 2, "clip_grad_norm": 0.1},
    "current": {"rule": Delayed(weights="current")},
    "stash": {"rule": Delayed(weights="stash"), "update_every": 3, "clip_grad_norm": 0.1},
    "replay": {"rule": Delayed(weights="replay"), "slack": 1},
    "predict": {"rule": Delayed(weights="predict"), "slack": [0, 1, 2]},
}


def run(config: dict[str, Any], seed: int = 3) -> tuple[dict[str, Tensor], list[float]]:
    """Weights and losses of two epochs, an evaluation and another epoch."""
    torch.manual_seed(seed)
    layers = [part for layer in normed().float() for part in (layer, nn.Dropout(0.2))]
    model, batches = nn.Sequential(*layers), batches_of(64, 6, dtype=torch.float32)
    torch.manual_seed(seed)
    with Pipeline(model, nn.MSELoss(), adamw, balance=[8] * 4, stages=4, **config) as pipe:
        losses = [pipe.train(batches).loss for _ in range(2)]
        losses.append(pipe.evaluate(batches)["loss"])
        losses.append(pipe.train(batches).loss)
        return clone(pipe.state_dict()), losses


@pytest.mark.parametrize("name", CONFIGS)
def test_twice_is_the_same(name: str) -> None:
    weights, losses = run(CONFIGS[name])
    torch.rand(17)  # whatever happens outside in between
    again, losses_again = run(CONFIGS[name])
    assert_same(again, weights)
    assert losses_again == losses


def test_the_seed_decides() -> None:
    """Dropout draws from the seed: another one, other numbers, from the same starting weights."""
    weights, _ = run(CONFIGS["stash"])
    other, _ = run(CONFIGS["stash"], seed=4)
    assert all((weights[n] != other[n]).any() for n in weights if "weight" in n)
