"""What the first stage is fed, and that a loader at fault leaves the stages whole."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from headrace.pipeline import InputError, Pipeline

Batch = tuple[Tensor, Tensor]


def batches(count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(6, 4, generator=generator), torch.randint(0, 2, (6,), generator=generator))
        for _ in range(count)
    ]


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))


def build() -> Pipeline:
    return Pipeline(
        model(),
        nn.CrossEntropyLoss(),
        lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        stages=2,
        balance=[1, 2],
    )


def test_training_goes_on_after_a_loader_raised() -> None:
    data = batches(5)

    def raises_at_3() -> Iterator[Batch]:
        yield from data[:3]
        raise KeyError("x")

    interrupted, plain = build(), build()
    for name, pipe, loader in (("bad", interrupted, raises_at_3()), ("good", plain, data[:3])):
        if name == "bad":
            with pytest.raises(InputError, match=r"KeyError: 'x' while making mini-batch 3 \("):
                pipe.train(loader)
        else:
            pipe.train(loader)
        pipe.train(data)
    same = zip(interrupted.state_dict().values(), plain.state_dict().values(), strict=True)
    assert interrupted.version == plain.version == 8
    assert all(torch.equal(a, b) for a, b in same)


def test_evaluation_goes_on_after_a_loader_raised() -> None:
    pipe, data = build(), batches(3)
    with pytest.raises(InputError, match="mini-batch 1"):
        pipe.evaluate(iter([data[0], data]))  # the second is no pair
    x, target = data[0]
    expected = nn.functional.cross_entropy(model()(x), target).item()
    assert pipe.evaluate(data[:1])["loss"] == pytest.approx(expected, abs=1e-6)


def test_a_metric_must_not_take_the_name_of_the_loss() -> None:
    with pytest.raises(ValueError, match="rename it"):
        build().evaluate(batches(1), {"loss": lambda output, target: 0.0})
