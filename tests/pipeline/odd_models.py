"""Models that a pipeline must carry although they are not a row of Linears, with their data."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

__all__ = ["ODD", "Odd", "linears", "vectors"]

Batch = tuple[Any, Any]


@dataclass(frozen=True)
class Odd:
    """A model, its data, and where to cut it: each stage's number of layers, for 2 and 3 stages."""

    model: nn.Sequential
    batches: Sequence[Batch]
    sizes: dict[int, list[int]]
    loss_fn: Callable[[Any, Any], Tensor] = nn.functional.mse_loss

    def balance(self, stages: int) -> list[int]:
        return self.sizes.get(stages, [len(self.model)])


class Do(nn.Module):
    """A layer out of a function."""

    def __init__(self, function: Callable[[Any], Any], *parts: nn.Module) -> None:
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(parts)

    def forward(self, x: Any) -> Any:
        return self.function(x)


def vectors(
    counts: Sequence[int] = (4, 4, 3, 4), width: int = 5, targets: int = 3
) -> list[tuple[Tensor, Tensor]]:
    """Regression data, the mini-batches of so many samples each."""
    generator = torch.Generator().manual_seed(1)

    def some(n: int, m: int) -> Tensor:
        return torch.randn(n, m, generator=generator, dtype=torch.float64)

    return [(some(n, width), some(n, targets)) for n in counts]


def sequences(lengths: Sequence[int] = (6, 3, 7)) -> list[tuple[Tensor, Tensor]]:
    """Sequences (4, length, 5), every mini-batch of another length, each with a target (4, 3)."""
    generator = torch.Generator().manual_seed(2)
    return [
        (torch.randn(4, n, 5, generator=generator, dtype=torch.float64), target)
        for n, (_, target) in zip(lengths, vectors([4] * len(lengths)), strict=True)
    ]


def words(vocabulary: int = 11) -> list[tuple[Tensor, Tensor]]:
    """Token ids (samples, length), the next ones as targets; lengths and samples change."""
    generator = torch.Generator().manual_seed(3)
    shapes = ((4, 6), (4, 9), (2, 4))
    rows = [torch.randint(vocabulary, (n, t + 1), generator=generator) for n, t in shapes]
    return [(row[:, :-1], row[:, 1:]) for row in rows]


def linears(*widths: int) -> list[nn.Module]:
    """Linear and Tanh in turn."""
    pairs = itertools.pairwise(widths)
    return [layer for a, b in pairs for layer in (nn.Linear(a, b), nn.Tanh())]


def of(
    *layers: nn.Module,
    batches: Sequence[Batch] | None = None,
    sizes: tuple[list[int], list[int]],
    loss_fn: Callable[[Any, Any], Tensor] = nn.functional.mse_loss,
) -> Odd:
    model = nn.Sequential(*layers).double()
    return Odd(model, batches or vectors(), {2: sizes[0], 3: sizes[1]}, loss_fn)


def inplace_everywhere() -> Odd:
    """Every stage, and the model, begins with a layer that works in place."""
    act = nn.ReLU(inplace=True)
    return of(
        act, nn.Linear(5, 6), act, nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 3),
        sizes=([2, 4], [2, 2, 2]),
    )  # fmt: skip


def inplace_on_a_view() -> Odd:
    flat = Do(lambda x: x.view(len(x), -1).mul_(2))
    return of(
        flat, nn.Linear(5, 6), nn.Unflatten(1, (2, 3)), flat, nn.Linear(6, 3),
        sizes=([3, 2], [1, 2, 2]),
    )  # fmt: skip


def lstm() -> Odd:
    """Tuples between stages, with the samples in dimension 1 of the state."""
    return of(
        nn.LSTM(5, 4, num_layers=2, batch_first=True),
        Do(lambda both: (both[0] * 2, both[1])),
        Do(lambda both: both[0][:, -1] + both[1][0][1] + both[1][1].sum(0)),
        nn.Linear(4, 3),
        batches=sequences(),
        sizes=([1, 3], [1, 1, 2]),
    )


def gru() -> Odd:
    first = nn.GRU(5, 4, batch_first=True)
    return of(
        first, Do(lambda both: both[0]), nn.GRU(4, 3, batch_first=True, bidirectional=True),
        Do(lambda both: both[0].sum(1)), nn.Linear(6, 3),
        batches=sequences(), sizes=([1, 4], [1, 2, 2]),
    )  # fmt: skip


def language_model(sparse: bool = False) -> Odd:
    return of(
        nn.Embedding(11, 6, sparse=sparse),
        *linears(6, 8),
        nn.LayerNorm(8),
        Do(lambda x: x.cumsum(1)),
        nn.Linear(8, 11),
        Do(lambda x: x.transpose(1, 2)),
        batches=words(),
        sizes=([1, 6], [1, 3, 3]),
        loss_fn=nn.functional.cross_entropy,
    )


def nested_data() -> Odd:
    """Inputs and targets are nests, and so is the output."""

    def split(x: dict[str, Any]) -> Any:
        return {"sum": x["a"] + x["pair"][0], "pair": x["pair"], "nothing": None}

    def swap(x: dict[str, Any]) -> Any:
        return [x["sum"].tanh(), x["pair"][1].long(), x["pair"]]

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(5, 3), nn.Linear(5, 2)

        def forward(self, x: list[Any]) -> dict[str, Tensor]:
            return {"one": self.one(x[0]), "two": self.two(x[0] * x[1].unsqueeze(1))}

    def loss(output: dict[str, Tensor], target: list[Tensor]) -> Tensor:
        mse = nn.functional.mse_loss(output["one"], target[0])
        return mse + nn.functional.cross_entropy(output["two"], target[1])

    batches = [
        ({"a": x, "pair": (x * 2, (x[:, 0] > 0))}, [y, (y[:, 0] > 0).long()]) for x, y in vectors()
    ]
    return of(
        Do(split), Do(swap), Heads(), batches=batches, sizes=([1, 2], [1, 1, 1]), loss_fn=loss
    )


class Shift(nn.Module):
    """Gives its own parameter or buffer, as it is, beside what it takes."""

    def __init__(self, learns: bool) -> None:
        super().__init__()
        start = torch.linspace(-1, 1, 6)
        if learns:
            self.shift: Tensor = nn.Parameter(start)
        else:
            self.register_buffer("shift", start)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, self.shift


def own_parameter() -> Odd:
    add = Do(lambda both: both[0] + both[1])
    return of(
        *linears(5, 6), Shift(True), add, nn.Linear(6, 6), Shift(True), add, nn.Linear(6, 3),
        sizes=([3, 5], [3, 3, 2]),
    )  # fmt: skip


def own_buffer() -> Odd:
    add = Do(lambda both: both[0] + both[1])
    return of(
        *linears(5, 6), Shift(False), add, nn.Linear(6, 6), Shift(False), add, nn.Linear(6, 3),
        sizes=([3, 5], [3, 3, 2]),
    )  # fmt: skip


def same_tensor_twice() -> Odd:
    twice, product = Do(lambda x: (x, x)), Do(lambda both: both[0] * both[1].exp())
    return of(
        *linears(5, 4), twice, product, nn.Linear(4, 4), twice, product, nn.Linear(4, 3),
        sizes=([3, 5], [3, 3, 2]),
    )  # fmt: skip


def integers_beside_floats() -> Odd:
    route = Do(lambda x: (x, x.argmax(1), x.detach() > 0))
    pick = Do(lambda t: t[0] * t[2] + t[0].gather(1, t[1].unsqueeze(1)))
    return of(
        *linears(5, 4), route, pick, nn.Linear(4, 4), route, pick, nn.Linear(4, 3),
        sizes=([3, 5], [3, 3, 2]),
    )  # fmt: skip


def scalar_beside() -> Odd:
    """A penalty rides along as a 0-d tensor, and another is added to it."""
    begin = Do(lambda x: (x, x.square().mean()))
    penalise = Do(lambda both: (both[0].tanh(), both[1] + both[0].abs().mean()))
    return of(
        nn.Linear(5, 3), begin, penalise, penalise,
        sizes=([2, 2], [2, 1, 1]),
        loss_fn=lambda out, y: nn.functional.mse_loss(out[0], y) + 0.1 * out[1],
    )  # fmt: skip


def ignores_its_input() -> Odd:
    class Deaf(Shift):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return self.shift[:3].expand(len(x), 3) * 2

    return of(*linears(5, 4), Deaf(True), nn.Linear(3, 3), sizes=([2, 2], [2, 1, 1]))


def unused_parameters() -> Odd:
    lazy = Do(torch.tanh, nn.Linear(7, 7))
    return of(
        nn.Linear(5, 4), lazy, nn.Linear(4, 4), lazy, nn.Linear(4, 3), sizes=([4, 1], [4, 0, 1])
    )


def without_parameters() -> Odd:
    """The first stage, and one in the middle, have none."""
    return of(
        nn.Tanh(), nn.Softsign(), nn.Linear(5, 4), nn.Tanh(), nn.Softsign(), nn.Linear(4, 3),
        sizes=([2, 4], [2, 1, 3]),
    )  # fmt: skip


def middle_without_parameters() -> Odd:
    return of(nn.Linear(5, 4), nn.Tanh(), nn.Softsign(), nn.Linear(4, 3), sizes=([3, 1], [1, 2, 1]))


def frozen_first_stage() -> Odd:
    layers = linears(5, 4, 4, 3)
    for layer in layers[:2]:
        layer.requires_grad_(False)
    return of(*layers, sizes=([2, 4], [2, 2, 2]))


def partly_frozen() -> Odd:
    layers = linears(5, 4, 4, 3)
    layers[2].requires_grad_(False)
    layers[0].bias.requires_grad_(False)
    return of(*layers, sizes=([2, 4], [2, 2, 2]))


def tied_within_a_stage() -> Odd:
    layers = linears(5, 4, 4, 4, 3)
    layers[4].weight = layers[2].weight
    return of(*layers, sizes=([2, 6], [2, 4, 2]))


def shared_layers() -> Odd:
    """One ReLU in all stages, one Linear twice in one."""
    act, twice = nn.Tanh(), nn.Linear(4, 4)
    return of(
        nn.Linear(5, 4), act, twice, act, twice, act, nn.Linear(4, 3),
        sizes=([2, 5], [1, 5, 1]),
    )  # fmt: skip


def parametrized() -> Odd:
    return of(
        weight_norm(nn.Linear(5, 4)), nn.Tanh(), weight_norm(nn.Linear(4, 4)), nn.Tanh(),
        nn.Linear(4, 3), sizes=([2, 3], [2, 2, 1]),
    )  # fmt: skip


def convolutions() -> Odd:
    """Layouts that are not contiguous go between the stages."""
    generator = torch.Generator().manual_seed(5)

    def image(n: int) -> Tensor:
        x = torch.randn(n, 2, 6, 6, generator=generator, dtype=torch.float64)
        return x.to(memory_format=torch.channels_last)

    return of(
        nn.Conv2d(2, 4, 3), nn.Tanh(), Do(lambda x: x.transpose(2, 3)), nn.Conv2d(4, 3, 3),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3),
        batches=[(image(len(y)), y) for _, y in vectors()], sizes=([3, 4], [1, 2, 4]),
    )  # fmt: skip


def complex_numbers() -> Odd:
    class Spectrum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.randn(3, dtype=torch.complex128))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.gain

    return of(
        Do(lambda x: torch.fft.rfft(x)), Spectrum(), Do(lambda x: x.abs()), nn.Linear(3, 3),
        sizes=([2, 2], [1, 1, 2]),
    )  # fmt: skip


def one_sample_at_a_time() -> Odd:
    return of(*linears(5, 4, 4, 3), batches=vectors([1] * 4), sizes=([2, 4], [2, 2, 2]))


ODD: dict[str, Callable[[], Odd]] = {
    make.__name__: make
    for make in (
        inplace_everywhere, inplace_on_a_view, lstm, gru, language_model, nested_data,
        own_parameter, own_buffer, same_tensor_twice, integers_beside_floats, scalar_beside,
        ignores_its_input, unused_parameters, without_parameters, middle_without_parameters,
        frozen_first_stage, partly_frozen, tied_within_a_stage, shared_layers, parametrized,
        convolutions, complex_numbers, one_sample_at_a_time,
    )
}  # fmt: skip
ODD["sparse_embedding"] = lambda: language_model(sparse=True)
