"""One stage's layers: a run of the user's own, under the user's own names."""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .loss import call_loss, name_of

__all__ = ["Layers", "Places", "layer_at_fault", "materialise", "named_layers"]


def named_layers(model: nn.Sequential) -> list[tuple[str, nn.Module]]:
    """A Sequential's layers; one that occurs twice (a shared ReLU) is there twice."""
    return list(model._modules.items())


class Layers(nn.Sequential):
    """A run of named layers; a layer's name there is its name in the whole model."""

    def __init__(self, layers: Iterable[tuple[str, nn.Module]]) -> None:
        super().__init__(OrderedDict(layers))
        self._modes = {name: module.training for name, module in self.named_modules()}

    def forward(self, x: Any) -> Any:
        # The traceback of an error finds `name` here: see `layer_at_fault`.
        for name, layer in self._modules.items():  # noqa: B007
            x = layer(x)
        return x

    def resume_training_mode(self) -> None:
        """Put every module into the mode the user left it in (a frozen BatchNorm stays so)."""
        for name, module in self.named_modules():
            module.training = self._modes[name]


class Places:
    """Every place of a module that holds a weight or buffer, by the first name of its tensor.

    A tied tensor has several places. A module that occurs twice has its places once: it is the
    reason not to leave ties to `functional_call`, which puts such a module's weights back wrongly.
    """

    def __init__(self, module: nn.Module) -> None:
        first: dict[int, str] = {}
        self._names: dict[str, str] = {}
        self._holders: dict[str, list[tuple[dict[str, Any], str]]] = {}
        for path, part in module.named_modules():
            for held in (part._parameters, part._buffers):
                for name, tensor in held.items():
                    if tensor is not None:
                        place = f"{path}.{name}" if path else name
                        self._names[place] = known = first.setdefault(id(tensor), place)
                        self._holders.setdefault(known, []).append((held, name))

    def names(self, layer: str) -> list[str]:
        """The names of the tensors in a layer's places."""
        inside = [n for place, n in self._names.items() if place.startswith(f"{layer}.")]
        return list(dict.fromkeys(inside))

    def placed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by name as tensors by place, for `functional_call`."""
        return {place: tensors[name] for place, name in self._names.items() if name in tensors}

    @contextmanager
    def holding(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Run a block with other tensors, by name, in the places of the module's own."""
        own = []
        for name, tensor in tensors.items():
            for held, key in self._holders[name]:
                own.append((held, key, held[key]))
                held[key] = tensor
        try:
            yield
        finally:
            for held, key, tensor in own:
                held[key] = tensor


def layer_at_fault(error: BaseException) -> str | None:
    """Name what of the user's raised an error: "layer '3' (Linear)", "the loss", or None."""
    found = None
    trace = error.__traceback__
    while trace is not None:
        frame = trace.tb_frame
        if frame.f_code is Layers.forward.__code__ and "layer" in frame.f_locals:
            found = f"layer '{frame.f_locals['name']}' ({type(frame.f_locals['layer']).__name__})"
        elif frame.f_code is call_loss.__code__:
            found = f"the loss {name_of(frame.f_locals['loss_fn'])}"
        trace = trace.tb_next
    return found


def materialise(name: str, layer: nn.Module, seed: int, device: torch.device) -> None:
    """Give a layer on the meta device its weights, from the seed and its name alone.

    Raises:
        ValueError: a module in it has weights and no `reset_parameters` to fill them with.
    """
    if not any(tensor.is_meta for tensor in (*layer.parameters(), *layer.buffers())):
        return
    layer.to_empty(device=device)
    number = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "big")
    with torch.random.fork_rng():
        torch.manual_seed(number)
        # The inner ones first: an outer one may give its parts weights of its own choice.
        for path, module in reversed(list(layer.named_modules())):
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
            elif [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
                raise ValueError(
                    f"layer {name!r} is on the meta device and {path or 'it'} "
                    f"({type(module).__name__}) has no reset_parameters() to fill its weights "
                    "with: write one, or build the model on the CPU"
                )
