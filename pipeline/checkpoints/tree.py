"""A state as tensors by name, and JSON that says where each belongs; and back again.

Nothing is pickled: reading a stranger's checkpoint runs no code. What is neither a tensor nor plain
data is refused when it is written.
"""

import math
from collections import Counter, deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["pack", "unpack"]

MARK = "$"
"""Begins the one key of an object that stands for what JSON has not."""


def pack(state: Any) -> tuple[dict[str, Tensor], Any]:
    """Tensors by their places in the state ("optimizers/0/state/3.weight/exp_avg"), copied to the
    CPU, and the rest as JSON's types.

    Raises:
        TypeError: something in it is neither a tensor nor plain data; with its place.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _pack(state, "", tensors)


def _pack(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return _pack_tensor(value, place, tensors)
    if value is None:
        return None
    if isinstance(value, bool | int | str):
        return _plain(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
    if isinstance(value, torch.dtype):
        return {"$dtype": str(value).removeprefix("torch.")}
    if isinstance(value, list | tuple | deque):
        items = [_pack(each, f"{place}/{k}", tensors) for k, each in enumerate(value)]
        if isinstance(value, deque):
            return {"$deque": items, "most": value.maxlen}
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, Mapping):
        pairs = {key: _pack(each, f"{place}/{key}", tensors) for key, each in value.items()}
        if isinstance(value, Counter):
            return {"$counter": [[key, each] for key, each in pairs.items()]}
        if all(isinstance(key, str) and not key.startswith(MARK) for key in pairs):
            return pairs
        return {"$dict": [[_pack(key, place, tensors), each] for key, each in pairs.items()]}
    raise TypeError(
        f"{place.lstrip('/')} is a {type(value).__name__}, which a checkpoint cannot keep: make "
        "it a tensor, a number, text, or a list, tuple or dict of such"
    )


def _plain(value: Any) -> Any:
    """Of a subclass (an enumeration's member, say) the plain value."""
    kind = next(kind for kind in (bool, int, str) if isinstance(value, kind))
    return kind(value)


def _pack_tensor(tensor: Tensor, place: str, tensors: dict[str, Tensor]) -> Any:
    if tensor.is_sparse:
        parts = {"indices": tensor._indices(), "values": tensor._values()}
        packed = {k: _pack_tensor(part, f"{place}/{k}", tensors) for k, part in parts.items()}
        return {"$sparse": packed, "size": [*tensor.shape], "coalesced": tensor.is_coalesced()}
    if tensor.is_complex():
        return {"$complex": _pack_tensor(torch.view_as_real(tensor), place, tensors)}
    name = place.lstrip("/")
    while name in tensors:  # a name with a slash in it
        name += "'"
    copy = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    tensors[name] = copy
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    if tensor.is_contiguous() or not tensor.permute(order).is_contiguous():
        return {"$tensor": name}
    return {"$tensor": name, "order": order}


def unpack(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The state that `pack` packed.

    Raises:
        ValueError: it is no such thing, or a tensor is missing.
    """
    if isinstance(tree, list):
        return [unpack(each, tensors) for each in tree]
    if not isinstance(tree, dict):
        return tree
    mark = next((key for key in tree if key.startswith(MARK)), None)
    if mark is None:
        return {key: unpack(each, tensors) for key, each in tree.items()}
    try:
        return _unpack_marked(mark, tree, tensors)
    except _NoStateError:
        raise
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError, RuntimeError) as error:
        text = f"{str(tree)[:80]!r} is not what was written there ({error})"
        raise _NoStateError(text) from error


class _NoStateError(ValueError):
    """Names the innermost part that is none."""


def _unpack_marked(mark: str, tree: dict[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    value = tree[mark]
    if mark == "$tensor":
        if (order := tree.get("order")) is None:
            return tensors[value]
        # As it lay in memory before: the last bits of what is computed with it depend on that.
        laid = tensors[value].permute(order).contiguous()
        return laid.permute([order.index(k) for k in range(len(order))])
    if mark == "$float":
        return float(value)
    if mark == "$dtype":
        kind = getattr(torch, value)
        if not isinstance(kind, torch.dtype):
            raise KeyError(value)
        return kind
    if mark == "$tuple":
        return tuple(unpack(each, tensors) for each in value)
    if mark == "$deque":
        return deque((unpack(each, tensors) for each in value), tree["most"])
    if mark == "$counter":
        return Counter({key: unpack(each, tensors) for key, each in value})
    if mark == "$dict":
        return {unpack(key, tensors): unpack(each, tensors) for key, each in value}
    if mark == "$complex":
        return torch.view_as_complex(unpack(value, tensors))
    if mark == "$sparse":
        indices, values = (unpack(value[k], tensors) for k in ("indices", "values"))
        return torch.sparse_coo_tensor(
            indices, values, tree["size"], is_coalesced=tree["coalesced"], check_invariants=True
        )
    raise KeyError(mark)
