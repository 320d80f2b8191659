"""Basis rotation: Adam in the eigenbasis of a matrix's gradients, where a delay harms less.

The basis is SOAP's (Vyas et al. 2024): eigenvectors of the averages of G Gᵀ and Gᵀ G. That it helps
with late gradients is from 2026's work on asynchronous pipelines.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Adam, NAdam, Optimizer

from ..errors import InputError
from ..stateful import Stateful
from .correction import Correction

if TYPE_CHECKING:
    from ..stage import Stage

__all__ = [
    "BasisRotation",
    "follow_product",
    "refine",
    "rotate",
    "rotate_back",
    "rotates",
    "straighten",
]


def follow_product(average: Tensor, product: Tensor, beta: float) -> Tensor:
    """EMA(G Gᵀ): L ← β L + (1 - β) G Gᵀ; of Gᵀ G, R alike."""
    return torch.lerp(product, average, beta)


def refine(average: Tensor, basis: Tensor | None) -> Tensor:
    """An eigenbasis of a symmetric matrix: whole at first, then by one step of orthogonal iteration
    (QR), which keeps each vector's place.
    """
    if basis is None:
        first: Tensor = torch.linalg.eigh(average).eigenvectors
        return first.flip(-1).contiguous()
    refined: Tensor = torch.linalg.qr(average @ basis).Q
    return refined


def rotate(matrix: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Q_Lᵀ G Q_R, in the dtype of G."""
    return (left.T @ matrix.to(left.dtype) @ right).to(matrix.dtype)


def rotate_back(matrix: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Q_L G' Q_Rᵀ, in the dtype of G'."""
    return (left @ matrix.to(left.dtype) @ right.T).to(matrix.dtype)


def rotates(group: Mapping[str, Any]) -> bool:
    """Whether a parameter group of Adam's, AdamW's or NAdam's can be moved in another basis."""
    added = group["weight_decay"] and not group["decoupled_weight_decay"]
    return not added and not group.get("amsgrad")


def straighten(state: Mapping[str, Any], bases: Mapping[str, Any]) -> dict[str, Any]:
    """What an optimizer kept by its weights' names, with the moments in the weights' own axes
    again: the first one is exact, the second as of elements that are independent.

    Args:
        bases: what a `BasisRotation` kept of the same weights.
    """
    straight = {}
    for name, kept in state.items():
        straight[name] = dict(kept)
        if name in bases and "exp_avg" in kept:
            left, right = bases[name]["left"], bases[name]["right"]
            squares = rotate_back(kept["exp_avg_sq"], left.square(), right.square())
            straight[name] |= {
                "exp_avg": rotate_back(kept["exp_avg"], left, right),
                "exp_avg_sq": squares,
            }
    return straight


@dataclass
class _Basis(Stateful):
    """Of one matrix: the averages, L and R, and their eigenvectors."""

    state: ClassVar = ("averages", "left", "right", "steps")

    averages: tuple[Tensor, Tensor]
    left: Tensor
    right: Tensor
    steps: int = 0


class BasisRotation(Correction):
    """Let Adam, AdamW or NAdam move every matrix in the eigenbasis of its gradients.

    Their first moment turns with the basis; the second is what it was, as in SOAP, but where the
    rotation begins. Vectors, and
    matrices with a side above `largest`, are moved as they are; so is a stage that nothing is late
    on.

    Args:
        decay: β of the averages.
        refresh: updates between two refinements of the basis.
        largest: the longest side of a matrix.

    Raises:
        ValueError: a number out of its range.
    """

    at_servers = False
    turns_moments = True

    def __init__(self, decay: float = 0.95, refresh: int = 10, largest: int = 2048) -> None:
        if not isinstance(decay, int | float) or not 0 <= decay < 1:
            raise ValueError(f"decay={decay!r}: give a number from 0 to below 1")
        for name, value in (("refresh", refresh), ("largest", largest)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: give a whole number >= 1")
        self.decay, self.refresh, self.largest = float(decay), refresh, largest
        self._bases: dict[int, _Basis] = {}
        self._parameters: Mapping[str, Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        return {names[key]: basis.state_dict() for key, basis in self._bases.items()}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        for name, saved in state.items():
            basis = _Basis((torch.empty(0), torch.empty(0)), torch.empty(0), torch.empty(0))
            basis.load_state_dict(saved, device)
            self._bases[id(self._parameters[name])] = basis

    def attach(self, stage: "Stage") -> None:
        self._parameters = stage.owned
        for optimizer in stage.optimizers:
            if not isinstance(optimizer, Adam | NAdam):
                raise InputError(
                    "basis_rotation is defined for Adam, AdamW and NAdam, and this is "
                    f"{type(optimizer).__name__}: write one of them, or leave it out"
                )
            for group in optimizer.param_groups:
                if group["weight_decay"] and not group["decoupled_weight_decay"]:
                    raise InputError(
                        "basis_rotation: a weight decay that is added to the gradient would be "
                        "rotated with it: write AdamW, or decoupled_weight_decay=True"
                    )
                if group.get("amsgrad"):
                    raise InputError(
                        "basis_rotation: the largest second moment of amsgrad is one basis's: "
                        "leave amsgrad out"
                    )

    def move(self, optimizer: Optimizer, staleness: float, step: Callable[[], None]) -> None:
        if staleness == 0 and not self._bases:
            step()
            return
        turned: list[tuple[Tensor, Tensor, _Basis, float]] = []
        with torch.no_grad():
            for group in optimizer.param_groups:
                shrink = 1 - group["lr"] * group["weight_decay"]
                for parameter in group["params"]:
                    if self._turns(parameter):
                        # Products are summed in an order that depends on the layout.
                        parameter.grad = parameter.grad.contiguous()
                        basis = self._follow(parameter, optimizer.state.get(parameter, {}))
                        parameter.grad = rotate(parameter.grad, basis.left, basis.right)
                        # From 0 it goes by the step alone, which then turns back.
                        turned.append((parameter, parameter.data, basis, shrink))
                        parameter.data = torch.zeros_like(parameter)
            step()
            for parameter, weight, basis, shrink in turned:
                moved = rotate_back(parameter.data, basis.left, basis.right)
                parameter.data = weight.mul_(shrink).add_(moved)

    def _turns(self, parameter: Tensor) -> bool:
        gradient = parameter.grad
        dense = gradient is not None and not gradient.is_sparse
        return dense and parameter.dim() == 2 and max(parameter.shape) <= self.largest

    def _follow(self, parameter: Tensor, state: dict[str, Any]) -> _Basis:
        """Take the gradient into the averages, and turn the first moment if the basis does."""
        assert parameter.grad is not None
        g = parameter.grad
        # Eigenvectors of half precision there are none.
        wide = g.float() if g.dtype.itemsize < 4 else g
        products, basis = (wide @ wide.T, wide.T @ wide), self._bases.get(id(parameter))
        if basis is None:
            left, right = (refine(product, None) for product in products)
            basis = self._bases[id(parameter)] = _Basis(products, left, right)
            if "exp_avg" in state:  # it has moved before anything was late
                state["exp_avg"].copy_(rotate(state["exp_avg"], left, right))
                squares = rotate(state["exp_avg_sq"], left.square(), right.square())
                state["exp_avg_sq"].copy_(squares)  # as of elements that are independent
        else:
            both = zip(basis.averages, products, strict=True)
            left, right = (follow_product(held, product, self.decay) for held, product in both)
            basis.averages = (left, right)
        basis.steps += 1
        if basis.steps % self.refresh == 0:
            left = refine(basis.averages[0], basis.left)
            right = refine(basis.averages[1], basis.right)
            if "exp_avg" in state:
                mean = rotate_back(state["exp_avg"], basis.left, basis.right)
                state["exp_avg"].copy_(rotate(mean, left, right))
            basis.left, basis.right = left, right
        return basis
