"""What a checkpoint keeps of an object: the attributes that training changes, by name."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

__all__ = ["Stateful", "get", "put"]


class Stateful:
    """Tells its state as plain data, and takes it on again.

    What it was made with is no state: that comes from the user's own code.
    """

    state: ClassVar[tuple[str, ...]] = ()
    """The attributes that training changes: tensors, numbers, containers of them, or whatever has
    a `state_dict` of its own."""

    def state_dict(self) -> dict[str, Any]:
        """Its state; tensors are its own, not copies."""
        return {name: get(getattr(self, name)) for name in self.state}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on from a state, its tensors on a device."""
        for name in self.state:
            setattr(self, name, put(getattr(self, name), state[name], device))


def get(value: Any) -> Any:
    """A value as plain data."""
    if hasattr(value, "state_dict"):
        return value.state_dict()
    if isinstance(value, torch.Generator):
        return value.get_state()
    if type(value) in (list, tuple):
        return type(value)(get(each) for each in value)
    if type(value) is dict:
        return {key: get(each) for key, each in value.items()}
    return value


def put(now: Any, saved: Any, device: torch.device) -> Any:
    """The value that `get` gave, in place of the one of now; objects are kept, and told."""
    if isinstance(now, Stateful):
        now.load_state_dict(saved, device)
        return now
    if hasattr(now, "load_state_dict"):
        now.load_state_dict(saved)
        return now
    if isinstance(now, torch.Generator):
        now.set_state(saved.cpu())
        return now
    if type(now) is list and any(hasattr(each, "load_state_dict") for each in now):
        return [put(each, one, device) for each, one in zip(now, saved, strict=True)]
    return _place(saved, device)


def _place(saved: Any, device: torch.device) -> Any:
    if isinstance(saved, Tensor):
        return saved.to(device)
    if type(saved) in (list, tuple):
        return type(saved)(_place(each, device) for each in saved)
    if type(saved) is dict:
        return {key: _place(each, device) for key, each in saved.items()}
    return saved
