"""Layers keep the user's names and modes, say which one failed, and come to life alike anywhere."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from headrace.pipeline.layers import (
    Layers,
    Places,
    layer_at_fault,
    materialise,
    named_layers,
)

CPU = torch.device("cpu")


def test_names_are_those_of_the_whole_model() -> None:
    inner, last = nn.Linear(3, 4), nn.Linear(4, 1)
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), inner, last)
    part = Layers(named_layers(model)[2:])
    assert list(part.state_dict()) == ["2.weight", "2.bias", "3.weight", "3.bias"]
    x = torch.ones(5, 3)
    assert torch.equal(part(x), last(inner(x)))
    assert part.state_dict()["2.weight"].data_ptr() == inner.weight.data_ptr()


def test_a_layer_that_occurs_twice_runs_twice() -> None:
    double = nn.Linear(1, 1, bias=False)
    nn.init.constant_(double.weight, 2)
    model = nn.Sequential(double, nn.Identity(), double, double)
    assert [name for name, _ in named_layers(model)] == ["0", "1", "2", "3"]
    assert Layers(named_layers(model))(torch.ones(1, 1)).item() == 8


def test_modes_are_put_back_one_by_one() -> None:
    frozen = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout())
    frozen[0].eval()
    part = Layers([("a", nn.Dropout()), ("b", frozen), ("c", nn.Linear(2, 2).eval())])
    before = {name: module.training for name, module in part.named_modules()}
    assert list(before.values()).count(False) == 2
    part.eval()
    assert not any(module.training for module in part.modules())
    part.resume_training_mode()
    assert {name: module.training for name, module in part.named_modules()} == before


def test_the_layer_that_failed_is_named() -> None:
    part = Layers([("4", nn.ReLU()), ("5", nn.Sequential(nn.Linear(3, 1)))])
    with pytest.raises(RuntimeError) as caught:
        part(torch.ones(2, 2))
    assert layer_at_fault(caught.value) == "layer '5' (Sequential)"
    assert layer_at_fault(ValueError("elsewhere")) is None


def tied() -> nn.Sequential:
    """Module a occurs twice, the weight of c is that of a, and d has none of a bias."""
    a, c, d = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2, bias=False)
    c.weight = a.weight
    return nn.Sequential(a, a, nn.Sequential(c, nn.BatchNorm1d(2)), d)


def test_places_of_tied_tensors_and_of_a_module_that_occurs_twice() -> None:
    model = tied()
    names = {
        name: torch.ones(()) for name, _ in (*model.named_parameters(), *model.named_buffers())
    }
    placed = Places(model).placed(names)
    assert list(placed) == [
        "0.weight",
        "0.bias",
        "2.0.weight",
        "2.0.bias",
        "2.1.weight",
        "2.1.bias",
        "2.1.running_mean",
        "2.1.running_var",
        "2.1.num_batches_tracked",
        "3.weight",
    ]
    assert placed["2.0.weight"] is placed["0.weight"] is names["0.weight"]
    assert placed["2.0.bias"] is names["2.0.bias"]
    assert list(Places(model).placed({"3.weight": names["3.weight"]})) == ["3.weight"]
    assert Places(model).names("2")[:3] == ["0.weight", "2.0.bias", "2.1.weight"]
    assert Places(model).names("3") == ["3.weight"]


def test_holding_other_tensors_for_a_while() -> None:
    model = tied()
    places = Places(model)
    own = dict(model.named_parameters(remove_duplicate=False))
    mean = model[2][1].running_mean  # type: ignore[index]
    other, zeros = torch.ones(2, 2), torch.zeros(2)
    held = {"0.weight": other, "2.1.running_mean": zeros}
    with pytest.raises(KeyError), places.holding(held):
        assert model[0].weight is other and model[1].weight is other
        assert model[2][0].weight is other  # type: ignore[index]
        assert model[2][1].running_mean is zeros  # type: ignore[index]
        raise KeyError
    after = dict(model.named_parameters(remove_duplicate=False))
    assert after.keys() == own.keys() and all(after[name] is own[name] for name in own)
    assert model[2][1].running_mean is mean  # type: ignore[index]


def on_meta() -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 3, device="meta"),
        nn.BatchNorm1d(3, device="meta"),
        nn.LSTM(3, 2, device="meta"),
    )


def weights(layer: nn.Module) -> list[Tensor]:
    return list(layer.state_dict().values())


def made(make: Callable[[], nn.Module], name: str = "x", seed: int = 7) -> nn.Module:
    layer = make()
    materialise(name, layer, seed, CPU)
    return layer


def test_meta_layers_depend_on_their_name_and_the_seed_alone() -> None:
    first = made(on_meta)
    torch.manual_seed(99)
    random = torch.get_rng_state()
    again = made(on_meta)
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(weights(first), weights(again), strict=True))
    assert not any(t.is_meta for t in weights(first))
    for other in (made(on_meta, name="y"), made(on_meta, seed=8)):
        assert not torch.equal(weights(first)[0], weights(other)[0])
    assert first[1].running_var.tolist() == [1, 1, 1]  # type: ignore[index]


def test_frozen_meta_layers_stay_frozen() -> None:
    layer = made(lambda: nn.Linear(2, 2, device="meta").requires_grad_(False))
    assert not any(p.requires_grad for p in layer.parameters())


def test_a_layer_with_weights_is_left_alone() -> None:
    layer = nn.Linear(2, 2)
    before = layer.weight.clone()
    materialise("0", layer, 0, CPU)
    assert torch.equal(layer.weight, before)


class Scaled(nn.Module):
    """Its own choice for the weights of a part."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2, device="meta")
        self.gain = nn.Parameter(torch.empty(2, device="meta"))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.gain)
        nn.init.constant_(self.inner.weight, 0.25)


def test_an_outer_module_has_the_last_word_on_its_parts() -> None:
    layer = made(Scaled)
    assert layer.inner.weight.unique().tolist() == [0.25]  # type: ignore[union-attr, operator]


def test_a_module_that_cannot_fill_its_weights_is_named() -> None:
    class Gain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.empty(2, device="meta"))

    match = r"layer '3' is on the meta device and 1 \(Gain\) has no reset_parameters\(\)"
    with pytest.raises(ValueError, match=match):
        made(lambda: nn.Sequential(nn.Linear(2, 2, device="meta"), Gain()), name="3")
    with pytest.raises(ValueError, match=r"layer '3' is on the meta device and it \(Gain\)"):
        made(Gain, name="3")
