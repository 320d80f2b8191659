"""Copies of a stage's weights, one for each distinct version in flight."""

from collections.abc import Callable, Hashable, Mapping

import torch
from torch import Tensor

__all__ = ["Version", "Versions", "copy_all"]


class Version:
    """One copy of the weights, as leaves that gradients are taken of.

    Args:
        leaves: by the user's layer names.
        key: what distinguishes it from other copies.
    """

    def __init__(self, leaves: dict[str, Tensor], key: Hashable) -> None:
        self.leaves, self.key = leaves, key
        self.users = 0

    def release(self) -> None:
        """One user less; without any, the next `take` may fill it anew."""
        self.users -= 1
        if not self.users:
            self.key = None


class Versions:
    """The copies of one stage; the memory of one that nothing in flight uses is used again."""

    def __init__(self) -> None:
        self.copies: list[Version] = []

    def take(
        self,
        key: Hashable,
        weights: Mapping[str, Tensor],
        fill: Callable[[str, Tensor], Tensor] | None = None,
    ) -> Version:
        """Give the copy under this key, made now if there is none.

        Args:
            key: the version's number, and whatever else its values depend on.
            weights: what to copy, by name.
            fill: computes a value from a weight; None copies it.
        """
        for version in self.copies:
            if version.key == key:
                return version
        version = next((v for v in self.copies if not v.users), None) or self._allocate(weights)
        version.key = key
        if fill is None:
            copy_all(version.leaves, weights)
            return version
        with torch.no_grad():
            for name, weight in weights.items():
                version.leaves[name].copy_(fill(name, weight))
        return version

    def _allocate(self, weights: Mapping[str, Tensor]) -> Version:
        leaves = {
            name: torch.empty_like(weight).requires_grad_() for name, weight in weights.items()
        }
        self.copies.append(Version(leaves, None))
        return self.copies[-1]


def copy_all(into: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Copy tensors into those of the same names, in one operation."""
    if weights:
        with torch.no_grad():
            torch._foreach_copy_([into[name] for name in weights], [*weights.values()])
