"""Optimizers of several parts."""

import torch
from torch import nn
from torch.optim import Muon, NAdam

from headrace.launch.optimizers import muon
from headrace.models import gpt


def test_matrices_are_muons_and_all_else_is_nadams() -> None:
    model = gpt(vocabulary=11, context=4, blocks=2, width=8, heads=2)
    first, second = muon([*model.named_parameters()], lr=0.02, others=[0, "4"])
    assert isinstance(first, Muon) and isinstance(second, NAdam)
    names = {id(p): n for n, p in model.named_parameters()}
    matrices = {names[id(p)] for group in first.param_groups for p in group["params"]}
    assert matrices == {
        f"{block}.{layer}.weight"
        for block in (1, 2)
        for layer in ("attention.query_key_value", "attention.output", "mlp.0", "mlp.2")
    }
    rest = {names[id(p)] for group in second.param_groups for p in group["params"]}
    assert rest == set(names.values()) - matrices
    assert first.param_groups[0]["lr"] == second.param_groups[0]["lr"] == 0.02
    (_, other) = muon([*model.named_parameters()], lr=0.02, others_lr=0.1)
    assert other.param_groups[0]["lr"] == 0.1


def test_a_stage_of_one_kind_has_one_optimizer() -> None:
    """Neither takes an empty list."""
    matrix, vector = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(3))
    assert [type(o) for o in muon([("1.weight", matrix)])] == [Muon]
    assert [type(o) for o in muon([("1.bias", vector)])] == [NAdam]
    assert [type(o) for o in muon([("1.weight", matrix)], others=[1])] == [NAdam]
