"""Networks whose layers pass each other everything that can travel, and a program to train them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from headrace.pipeline import Pipeline
from headrace.pipeline.nest import Nest, describe
from headrace.pipeline.rules import Exact

from ..pipeline.helpers import momentum

__all__ = [
    "PAYLOADS",
    "Payload",
    "Seen",
    "choose_slack",
    "plain",
    "train_payload",
    "train_payloads",
]


class Apply(nn.Module):
    """A layer without parameters that notes what it takes."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.function = function
        self.seen: set[str] = set()

    def forward(self, x: Any) -> Any:
        self.seen.add(describe(x))
        return self.function(x)


class Frozen(nn.Linear):
    """A linear layer that does not learn."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.requires_grad_(False)


@dataclass(frozen=True)
class Payload:
    """A network of three stages; what one passes to the next is what is tried.

    Args:
        layers: makes them; sizes says how many each stage has.
        seen: what layers of the kind `Apply` take, by name.
    """

    layers: Callable[[], list[nn.Module]]
    sizes: tuple[int, int, int]
    seen: dict[str, set[str]]
    batches: Callable[[], list[tuple[Nest, Nest]]] = lambda: vectors()
    loss: Callable[[Any, Any], Tensor] = mse_loss
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Seen:
    """What came of a payload: in this process, the layers that take what others gave."""

    weights: dict[str, Tensor]
    losses: list[float]
    layers: dict[str, set[str]]


def vectors(width: int = 4, samples: int = 6, count: int = 4) -> list[tuple[Nest, Nest]]:
    """Regression, (samples, width) to (samples, 2)."""
    return [(torch.randn(samples, width), torch.randn(samples, 2)) for _ in range(count)]


def sentences() -> list[tuple[Nest, Nest]]:
    """Tokens of a length that changes from one mini-batch to the next, shorter and longer."""
    return [(torch.randint(7, (4, n)), torch.randint(2, (4,))) for n in (3, 9, 1, 30, 2)]


def labelled() -> list[tuple[Nest, Nest]]:
    """Nests as input and as target."""
    return [
        (
            {"ids": torch.randint(5, (6, 3)), "more": [torch.randn(6, 4), torch.rand(6) > 0.5]},
            {"label": torch.randint(2, (6,)), "weight": (torch.rand(6, dtype=torch.float64), None)},
        )
        for _ in range(4)
    ]


def weighted(output: Tensor, target: Any) -> Tensor:
    losses = cross_entropy(output, target["label"], reduction="none")
    loss: Tensor = (losses * target["weight"][0].float()).mean()
    return loss


class Join(nn.Module):
    """The first layer of `labelled`: an embedding, plus what else there is."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)

    def forward(self, x: Any) -> Tensor:
        dense, mask = x["more"]
        embedded: Tensor = self.embedding(x["ids"])
        joined: Tensor = embedded.mean(1) + dense * mask[:, None]
        return joined


def every_dtype(h: Tensor) -> dict[str, Tensor]:
    return {
        "h": h,
        "double": h.double() / 3,
        "bfloat16": h.bfloat16(),
        "half": h.half(),
        "complex": torch.complex(h, h * 2),
        "conjugate": torch.complex(h, h * 2).conj(),
        "int64": (h.detach() * 1e12).long(),
        "int32": (h.detach() * 1e6).int(),
        "int16": (h.detach() * 1e3).short(),
        "int8": (h.detach() * 10).to(torch.int8),
        "uint8": (h.detach() * 50 + 100).to(torch.uint8),
        "bool": h.detach() > 0,
    }


def mix_dtypes(x: dict[str, Tensor]) -> Tensor:
    h = x["h"] + x["double"].float() + x["bfloat16"].float() + x["half"].float()
    h = h + x["complex"].imag + x["conjugate"].imag
    whole = x["int64"] / 1e12 + x["int32"] / 1e6 + x["int16"] / 1e3 + x["int8"] / 10
    return h * x["bool"] + whole.float() + x["uint8"].float() / 255


ALL_DTYPES = (
    "{h: float32[6, 4], double: float64[6, 4], bfloat16: bfloat16[6, 4], half: float16[6, 4], "
    "complex: complex64[6, 4], conjugate: complex64[6, 4], int64: int64[6, 4], int32: int32[6, 4], "
    "int16: int16[6, 4], int8: int8[6, 4], uint8: uint8[6, 4], bool: bool[6, 4]}"
)


def through(wrap: Callable[[Tensor], Any], unwrap: Callable[[Any], Tensor]) -> list[nn.Module]:
    """Two stage borders that a nest crosses: given by one stage, passed on by the next, taken."""
    return [
        nn.Linear(4, 4),
        Apply(wrap),
        Apply(lambda x: x),
        Apply(unwrap),
        nn.Tanh(),
        nn.Linear(4, 2),
    ]


def crossing(wrap: Any, unwrap: Any, seen: str, **more: Any) -> Payload:
    """Of six layers: the third, alone in the middle stage, and the fourth take the nest."""
    return Payload(lambda: through(wrap, unwrap), (2, 1, 3), {"2": {seen}, "3": {seen}}, **more)


MANY = {f"a name of some length, number {k}": k for k in range(40)}
FLOATS = "float32[6, 4]"

PAYLOADS = {
    "tensor": crossing(torch.tanh, torch.tanh, FLOATS),
    "tuple": crossing(lambda h: (h, h * 2), lambda x: x[0] + x[1], f"({FLOATS}, {FLOATS})"),
    "list": crossing(lambda h: [h.sin(), h], lambda x: x[0] * x[1], f"({FLOATS}, {FLOATS})"),
    "dict": crossing(
        lambda h: {"a": h, "ü": h.exp()}, lambda x: x["a"] * x["ü"], f"{{a: {FLOATS}, ü: {FLOATS}}}"
    ),
    "nest": crossing(
        lambda h: {"a": (h, [h * 2, {"b": h.sin()}], None), "c": ()},
        lambda x: x["a"][0] + x["a"][1][0] * x["a"][1][1]["b"],
        f"{{a: ({FLOATS}, ({FLOATS}, {{b: {FLOATS}}}), None), c: ()}}",
    ),
    "every dtype": crossing(every_dtype, mix_dtypes, ALL_DTYPES),
    "detached": crossing(
        lambda h: (h, h.detach() * 2), lambda x: x[0] * x[1], f"({FLOATS}, {FLOATS})"
    ),
    "not contiguous": crossing(
        lambda h: (h.t(), h[:, :1].expand(6, 4), h[::2]),
        lambda x: x[0].t() + x[1] + x[2].repeat(2, 1),
        "(float32[4, 6], float32[6, 4], float32[3, 4])",
    ),
    "no dimension": crossing(
        lambda h: (h, h.mean()), lambda x: x[0] - x[1], f"({FLOATS}, float32[])"
    ),
    "empty": crossing(
        lambda h: (h[:, :0], h, h[:0].detach() > 0),
        lambda x: torch.cat([x[1], x[0]], 1) + x[2].sum(),
        f"(float32[6, 0], {FLOATS}, bool[0, 4])",
    ),
    "8 MiB": crossing(
        lambda h: h[:, :, None].expand(6, 4, 87_400).sin(),
        lambda x: x.mean(2),
        "float32[6, 4, 87400]",
        batches=lambda: vectors(count=2),
    ),
    "larger and larger": crossing(
        lambda h: [h[:, :, None].expand(6, 4, 64 * 2**k).sin() for k in range(9)],
        lambda x: torch.stack([part.mean(2) for part in x]).mean(0),
        "(" + ", ".join(f"float32[6, 4, {64 * 2**k}]" for k in range(9)) + ")",
    ),
    "a long header": crossing(
        lambda h: {name: h * k for name, k in MANY.items()},
        lambda x: torch.stack(list(x.values())).mean(0),
        "{" + ", ".join(f"{name}: {FLOATS}" for name in MANY) + "}",
    ),
    "nests from the loader": Payload(
        lambda: [Join(), Apply(torch.tanh), nn.Linear(4, 4), Apply(torch.tanh), nn.Linear(4, 2)],
        (2, 2, 1),
        {"1": {FLOATS}, "3": {FLOATS}},
        labelled,
        weighted,
    ),
    "changing lengths": Payload(
        lambda: [
            nn.Embedding(7, 4),
            Apply(torch.tanh),
            nn.Linear(4, 4),
            Apply(lambda h: h.mean(1)),
            nn.Linear(4, 2),
        ],
        (1, 2, 2),
        {
            "1": {f"float32[4, {n}, 4]" for n in (3, 9, 1, 30, 2)},
            "3": {f"float32[4, {n}, 4]" for n in (3, 9, 1, 30, 2)},
        },
        sentences,
        nn.CrossEntropyLoss(),
    ),
    "a first stage without parameters": Payload(
        lambda: [Apply(torch.tanh), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)],
        (1, 2, 1),
        {"0": {FLOATS}},
    ),
    "a stage without parameters": Payload(
        lambda: [nn.Linear(4, 4), Apply(torch.tanh), nn.Dropout(0.0), nn.Linear(4, 2)],
        (1, 2, 1),
        {"1": {FLOATS}},
    ),
    "a last stage without parameters": Payload(
        lambda: [nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2), Apply(torch.tanh)],
        (2, 1, 1),
        {"3": {"float32[6, 2]"}},
    ),
    "a frozen first stage": Payload(
        lambda: [Frozen(4, 4), Apply(torch.tanh), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)],
        (2, 2, 1),
        {"1": {FLOATS}},
    ),
    "a frozen stage between": Payload(
        lambda: [nn.Linear(4, 4), Apply(torch.tanh), Frozen(4, 4), nn.Tanh(), nn.Linear(4, 2)],
        (1, 3, 1),
        {"1": {FLOATS}},
    ),
    "in place at a border": Payload(
        lambda: [
            nn.Linear(4, 4),
            nn.ReLU(inplace=True),
            nn.Linear(4, 4),
            nn.Tanh(),
            nn.Dropout(0.0, inplace=True),
            Apply(torch.tanh),
            nn.Linear(4, 2),
        ],
        (1, 3, 3),
        {"5": {FLOATS}},
    ),
}


def train_payload(payload: Payload, alone: bool, exact: bool) -> Seen:
    """Train on it, twice through; exact: without staleness, as a plain loop would."""
    torch.manual_seed(1)
    layers, batches = payload.layers(), payload.batches()
    options: dict[str, Any] = {"schedule": "1f1b", "rule": Exact()} if exact else {}
    with Pipeline(
        nn.Sequential(*layers),
        payload.loss,
        momentum,
        balance=payload.sizes,
        stages=3 if alone else None,
        **options,
    ) as pipe:
        losses = [pipe.train(batches).loss for _ in range(2)]
        losses.append(pipe.evaluate(batches)["loss"])
        weights = pipe.state_dict()
    noted = {str(k): layer.seen for k, layer in enumerate(layers) if isinstance(layer, Apply)}
    return Seen(weights, losses, noted)


def train_payloads(alone: bool) -> dict[str, tuple[Seen, Seen]]:
    """All of them: as a stream, and exactly."""
    return {
        name: (train_payload(payload, alone, False), train_payload(payload, alone, True))
        for name, payload in PAYLOADS.items()
    }


def plain(payload: Payload) -> dict[str, Tensor]:
    """The same on one device, as a torch user would write it."""
    torch.manual_seed(1)
    model, batches = nn.Sequential(*payload.layers()), payload.batches()
    optimizer = momentum([(n, p) for n, p in model.named_parameters() if p.requires_grad])
    for x, y in batches * 2:
        optimizer.zero_grad()
        torch.autograd.backward(payload.loss(model(x), y))
        optimizer.step()
    return model.state_dict()


def choose_slack(micro_batches: int) -> tuple[tuple[int, ...], dict[str, Tensor], list[float]]:
    """Train with slack='auto'; gives the depths, the weights and the losses."""
    torch.manual_seed(1)
    layers = [part for _ in range(3) for part in (nn.Linear(4, 4), nn.Tanh())]
    batches = [(torch.randn(6, 4), torch.randn(6, 4)) for _ in range(micro_batches)]
    with Pipeline(
        nn.Sequential(*layers), nn.MSELoss(), momentum, balance=[2, 2, 2], slack="auto"
    ) as pipe:
        losses = [pipe.train(batches).loss for _ in range(2)]
        return pipe.depths, pipe.state_dict(), losses
