"""Cut an nn.Sequential into stages: by measured time, by parameters, or as told."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .layers import named_layers

__all__ = ["Balance", "LayerCost", "Partition", "check_model", "count", "cut", "partition"]

Balance = str | Sequence[int | str]
"""'time', 'parameters', the number of layers of each stage, or each stage's first layer's name."""


@dataclass(frozen=True)
class LayerCost:
    """What a layer costs for one micro-batch.

    Args:
        kind: its class.
        activation_bytes: the size of its output.
        forward, backward, update: seconds; NaN where not measured.
    """

    name: str
    kind: str
    parameters: int
    activation_bytes: int = 0
    forward: float = float("nan")
    backward: float = float("nan")
    update: float = float("nan")

    @property
    def total(self) -> float:
        """Seconds for one micro-batch, update included."""
        return self.forward + self.backward + self.update


@dataclass(frozen=True)
class Partition:
    """A model's layers in order, and how many of them each stage has."""

    layers: tuple[LayerCost, ...]
    sizes: tuple[int, ...]

    @property
    def stages(self) -> list[tuple[LayerCost, ...]]:
        """The layers of each stage."""
        bounds = [0, *accumulate(self.sizes)]
        return [self.layers[a:b] for a, b in pairwise(bounds)]

    @property
    def costs(self) -> list[float]:
        """Seconds of each stage for one micro-batch; NaN where not measured."""
        return [sum(layer.total for layer in stage) for stage in self.stages]

    @property
    def speed_up(self) -> float:
        """Predicted speed-up over one device: the work of all stages over the slowest one's."""
        return sum(self.costs) / max(self.costs) if max(self.costs) > 0 else float("nan")

    def to_json(self) -> str:
        """Write it as JSON, for the other ranks."""
        return json.dumps({"layers": [asdict(layer) for layer in self.layers], "sizes": self.sizes})

    @classmethod
    def from_json(cls, text: str) -> "Partition":
        """Read what `to_json` wrote."""
        data = json.loads(text)
        return cls(tuple(LayerCost(**layer) for layer in data["layers"]), tuple(data["sizes"]))


def check_model(model: nn.Module, stages: int) -> None:
    """Refuse a model that cannot be cut into so many stages.

    Raises:
        TypeError: it is no nn.Sequential, or one with a forward of its own, or a layer keeps what
            is no tensor in its `state_dict`.
        ValueError: it has fewer layers than there are stages, or lazy ones.
    """
    if not isinstance(model, nn.Sequential):
        raise TypeError(
            f"model is a {type(model).__name__}: a pipeline cuts an nn.Sequential between its "
            "layers; write the model as nn.Sequential(first, second, …), each layer taking what "
            "the one before gives"
        )
    if type(model).forward is not nn.Sequential.forward:
        raise TypeError(
            f"model is a {type(model).__name__} with a forward() of its own, which would not run: "
            "a pipeline calls the layers one after the other; move what it does into layers"
        )
    if len(model) < stages:
        names = ", ".join(f"{n} ({type(m).__name__})" for n, m in named_layers(model))
        raise ValueError(
            f"{len(model)} layer{'s' * (len(model) != 1)} cannot make {stages} "
            f"stage{'s' * (stages > 1)}, the layers being {names or 'none'}: "
            "take fewer stages, or write a large layer as several"
        )
    _check_weights(model)


def _check_weights(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ValueError(
                f"{name!r} has no shape yet, its layer being lazy: run the model once on a sample, "
                "or give the layer its sizes"
            )
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{name!r} in the model's state_dict() is a {type(value).__name__}, and between "
                "stages and into checkpoints only tensors go: let that layer's get_extra_state() "
                "give a tensor, or leave it out"
            )


def count(model: nn.Sequential) -> tuple[LayerCost, ...]:
    """Each layer's name, class and number of parameters, without running anything."""
    return tuple(
        LayerCost(name, type(layer).__name__, sum(p.numel() for p in layer.parameters()))
        for name, layer in named_layers(model)
    )


def cut(costs: Sequence[float], stages: int) -> tuple[int, ...]:
    """The sizes of consecutive groups for which the costliest group costs the least.

    Exact, by dynamic programming over the number of groups; among equals, the earlier groups are
    the smaller ones. Every group has one layer at least.
    """
    total = [0.0, *accumulate(costs)]
    layers = len(costs)
    best: list[tuple[float, tuple[int, ...]]] = [(total[k], (k,)) for k in range(layers + 1)]
    for groups in range(2, stages + 1):
        best = [
            min(
                (max(best[m][0], total[k] - total[m]), (*best[m][1], k - m))
                for m in range(groups - 1, k)
            )
            if k >= groups
            else (float("inf"), ())
            for k in range(layers + 1)
        ]
    return best[layers][1]


def partition(
    model: nn.Sequential, stages: int, balance: Balance, layers: Sequence[LayerCost]
) -> Partition:
    """Cut a model whose layers were counted, or measured where balance is 'time'.

    Raises:
        ValueError: a balance that does not fit the model, or one tensor needed by two stages.
    """
    result = Partition(tuple(layers), _sizes(stages, balance, layers))
    _check_ties(model, result)
    return result


def _sizes(stages: int, balance: Balance, layers: Sequence[LayerCost]) -> tuple[int, ...]:
    if balance == "time":
        return cut([layer.total for layer in layers], stages)
    if balance == "parameters":
        # A layer without parameters still has a little weight, so that none is piled up for free.
        return cut([layer.parameters + 1e-3 for layer in layers], stages)
    if not isinstance(balance, list | tuple) or len(balance) != stages:
        raise ValueError(
            f"balance={balance!r} for {stages} stages: write 'time', 'parameters', the number of "
            f"layers of each of the {stages} stages, or the name of each stage's first layer"
        )
    names = [layer.name for layer in layers]
    sizes = [s for s in balance if isinstance(s, int)]
    if len(sizes) == stages:
        if sum(sizes) != len(layers) or min(sizes) < 1:
            raise ValueError(
                f"balance={list(balance)} has {sum(sizes)} layers, the model has {len(layers)}: "
                "give numbers >= 1 that add up to it"
            )
        return tuple(sizes)
    unknown = [name for name in balance if name not in names]
    if unknown:
        raise ValueError(f"balance names the layer {unknown[0]!r}; the layers are {names}")
    starts = [names.index(str(name)) for name in balance]
    if starts[0] != 0 or sorted(set(starts)) != starts:
        raise ValueError(
            f"balance={list(balance)} must name each stage's first layer in order, beginning with "
            f"the model's first, {names[0]!r}"
        )
    return tuple(b - a for a, b in pairwise([*starts, len(layers)]))


def _check_ties(model: nn.Sequential, cut_up: Partition) -> None:
    """Refuse weights that two stages would each train for themselves."""
    owner: dict[int, tuple[int, str]] = {}
    for j, stage in enumerate(cut_up.stages):
        for cost in stage:
            layer = model.get_submodule(cost.name)
            for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
                first, path = owner.setdefault(id(tensor), (j, f"{cost.name}.{name}"))
                if first != j:
                    raise ValueError(
                        f"{path!r} (stage {first}) and '{cost.name}.{name}' (stage {j}) are one "
                        "tensor: a stage owns its weights alone; put both layers into one stage "
                        "with balance=[…], or give each its own tensor"
                    )
