"""A model's mean loss over a data set, and its gradient, as a function of one flat vector."""

from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from .engine import Metrics
from .loss import Loss
from .nest import Nest, map_tensors, to_double
from .pipeline import Pipeline
from .sharpness import between

__all__ = ["Objective"]


class Objective:
    """f(x) -> (loss, gradient): x (n,) holds all weights that are trained, float64, in their order.

    Every layer is in evaluation mode and in float64. The sums run through a `Pipeline`, so a model
    may be larger than a device; the vectors are on the CPU of every rank. Under torchrun every rank
    makes the same calls, and gets the same numbers.

    Args:
        model: taken over: it becomes float64, and its weights are written over.
        loss_fn: from an output and a target, the mean over dimension 0.
        loader: (input, target) pairs, the same in every pass; only the first stage reads it.
        batches: how many mini-batches it gives.
        options: of the `Pipeline`: stages, balance, micro_batches, device, seed, timeout.

    Raises:
        ValueError: the model has nothing to train, or what `Pipeline` refuses.
    """

    def __init__(
        self,
        model: nn.Sequential,
        loss_fn: Loss,
        loader: Iterable[Any],
        batches: int,
        **options: Any,
    ) -> None:
        self._names = _group(model)
        if not self._names:
            raise ValueError("the model has no weight that requires a gradient: nothing to measure")
        self._loader, self._batches = _InDouble(loader), batches
        if isinstance(loss_fn, nn.Module):
            loss_fn.double()
        self.pipeline = Pipeline(
            model.double().eval(),
            loss_fn,
            _Reveal,
            schedule="1f1b",
            update_every=batches,
            **options,
        )
        self.pipeline.prepare(self._loader)
        self._state = self.pipeline.state_dict()

    def __call__(self, x: Tensor) -> tuple[float, Tensor]:
        """The loss, and its gradient (n,).

        Raises:
            ValueError: the loader gives another number of mini-batches than `batches`.
            FloatingPointError: the loss or its gradient is not finite.
        """
        self.pipeline.load_state_dict(self._place(x))
        report = self.pipeline.train(self._loader)
        if self.pipeline.is_first and self._loader.given != self._batches:
            raise ValueError(
                f"batches={self._batches}, and the loader gave {self._loader.given}: a gradient "
                "is of all of them, so give their number"
            )
        return report.loss, self._flatten(self.pipeline.state_dict())

    def at(self, state: Mapping[str, Tensor]) -> Tensor:
        """Go to the weights and buffers of a whole model, by its own names, and give x there.

        From then on the buffers are these.

        Raises:
            ValueError: they do not fit the model, or are not finite; says which.
        """
        expected = {name: tuple(tensor.shape) for name, tensor in self._state.items()}
        given = {name: tuple(tensor.shape) for name, tensor in state.items()}
        wrong = sorted(
            f"{name} {expected.get(name, 'is unknown')}, given {given.get(name, 'none')}"
            for name in expected.keys() | given.keys()
            if expected.get(name) != given.get(name)
        )
        if wrong:
            raise ValueError(f"the weights do not fit the model: {'; '.join(wrong[:3])}")
        spoilt = [name for name, tensor in state.items() if not tensor.isfinite().all()]
        if spoilt:
            raise ValueError(
                f"the weights of layer {spoilt[0].rpartition('.')[0]!r} are not finite: NaN or "
                f"infinity in {', '.join(spoilt[:3])}; take a checkpoint from before training "
                "diverged"
            )
        self._state = {name: to_double(tensor.detach().cpu()) for name, tensor in state.items()}
        return self._flatten(self._state)

    def between(
        self, small: Mapping[str, Tensor], large: Mapping[str, Tensor], alpha: float
    ) -> Tensor:
        """Go to the point of the line through two models, 0 at the first, and give x there.

        Running statistics of normalisation go along between the two, and stay beyond them as they
        are there: a variance must not become negative.
        """
        x = between(self.at(small), self.at(large), alpha)
        share = min(max(alpha, 0.0), 1.0)
        for name, tensor in self._state.items():
            if tensor.is_floating_point():
                self._state[name] = between(to_double(small[name]), tensor, share)
        return x

    def evaluate(
        self, x: Tensor, loader: Iterable[Any], metrics: Metrics | None = None
    ) -> dict[str, float]:
        """The mean over samples of the loss and of each metric, as `Pipeline.evaluate`."""
        self.pipeline.load_state_dict(self._place(x))
        return self.pipeline.evaluate(_InDouble(loader), metrics)

    def close(self) -> None:
        """End the pipeline; also at the end of a with-block."""
        self.pipeline.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.pipeline.__exit__(kind, error, trace)

    def _flatten(self, state: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([state[names[0]].flatten() for names in self._names])

    def _place(self, x: Tensor) -> dict[str, Tensor]:
        """The whole state with these weights in it."""
        state, start = dict(self._state), 0
        for names in self._names:
            shape = state[names[0]].shape
            piece = x[start : start + shape.numel()].view(shape)
            state.update(dict.fromkeys(names, piece))
            start += shape.numel()
        return state


class _Reveal(torch.optim.Optimizer):
    """Writes the gradient where the weights were: the pipeline's state is the gradient then."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 1.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    weight.zero_()
                else:
                    weight.copy_(weight.grad.to_dense())


class _InDouble:
    """A loader whose numbers are float64; whole ones stay. It counts what it gave in a pass."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self._loader, self.given = loader, 0

    def __iter__(self) -> Iterator[Nest]:
        self.given = 0
        for pair in self._loader:
            yield map_tensors(to_double, pair)
            self.given += 1


def _group(model: nn.Sequential) -> list[list[str]]:
    """The names of each weight that is trained: a tied one has several."""
    groups: dict[int, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        if weight.requires_grad:
            groups.setdefault(id(weight), []).append(name)
    return list(groups.values())
