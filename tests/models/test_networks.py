"""What a pipeline asks of every network: cut, copied, sent, called with other weights."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from headrace.models import emulated, gpt, mlp, resnet, resnet_cifar, speech_dnn, vgg, vgg_cifar

Case = tuple[Callable[[], nn.Sequential], Callable[[], Tensor], tuple[int, ...]]

CASES: dict[str, Case] = {
    "mlp": (
        lambda: mlp([12, 16, 16, 5], norm="LayerNorm", dropout=0.1),
        lambda: torch.randn(4, 3, 4),
        (4, 5),
    ),
    "speech_dnn": (lambda: speech_dnn(8, 16, 3, 20), lambda: torch.randn(4, 8), (4, 20)),
    "vgg": (lambda: vgg_cifar(11), lambda: torch.randn(2, 3, 32, 32), (2, 10)),
    "resnet": (lambda: resnet(18, classes=7), lambda: torch.randn(2, 3, 64, 64), (2, 7)),
    "resnet_cifar": (lambda: resnet_cifar(8), lambda: torch.randn(2, 3, 32, 32), (2, 10)),
    "gpt": (
        lambda: gpt(vocabulary=11, context=8, blocks=2, width=16, heads=2, dropout=0.1),
        lambda: torch.randint(11, (3, 6)),
        (3, 6, 11),
    ),
    "emulated": (lambda: emulated(2, 1, 1, width=4), lambda: torch.randn(5, 4), (5, 4)),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[nn.Sequential, Tensor, tuple[int, ...]]:
    torch.manual_seed(0)
    make, make_input, shape = CASES[request.param]
    return make(), make_input(), shape


def run(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    torch.manual_seed(1)
    return model(x)


def test_output_has_the_stated_shape(
    case: tuple[nn.Sequential, Tensor, tuple[int, ...]],
) -> None:
    model, x, shape = case
    assert isinstance(model, nn.Sequential)
    output = model(x)
    assert output.shape == shape
    assert output.isfinite().all()


def test_parameters_are_found_under_their_layers_names(
    case: tuple[nn.Sequential, Tensor, tuple[int, ...]],
) -> None:
    model, _, _ = case
    layers = {name for name, _ in model.named_children()}
    assert {name.split(".")[0] for name in model.state_dict()} <= layers


def test_deepcopied_and_pickled_networks_compute_the_same(
    case: tuple[nn.Sequential, Tensor, tuple[int, ...]],
) -> None:
    model, x, _ = case
    expected = run(model, x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(twin, x), expected)


def test_functional_call_gives_the_same_output_and_gradients(
    case: tuple[nn.Sequential, Tensor, tuple[int, ...]],
) -> None:
    model, x, _ = case
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    expected = run(model, x)
    torch.autograd.backward(expected.sum())
    leaves = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}

    output = run(lambda x: functional_call(model, {**leaves, **buffers}, (x,)), x)
    torch.autograd.backward(output.sum())

    assert torch.equal(output, expected)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.equal(leaves[name].grad, parameter.grad), name  # type: ignore[arg-type]


def test_gradients_cross_a_cut_after_any_layer(
    case: tuple[nn.Sequential, Tensor, tuple[int, ...]],
) -> None:
    # Each layer gets a fresh leaf, as a stage does: nothing may work in place on its input.
    model, x, _ = case
    torch.manual_seed(1)
    inputs, outputs = [], []
    for layer in model:
        leaf = x.detach().requires_grad_(x.is_floating_point())
        x = layer(leaf)
        inputs.append(leaf)
        outputs.append(x)
    gradient = torch.ones_like(x)
    for leaf, output in zip(reversed(inputs), reversed(outputs), strict=True):
        if output.requires_grad:
            output.backward(gradient)
            if leaf.grad is not None:
                gradient = leaf.grad
    cut = {name: p.grad for name, p in model.named_parameters()}

    model.zero_grad()
    torch.manual_seed(1)
    model(inputs[0].detach()).sum().backward()

    for name, parameter in model.named_parameters():
        torch.testing.assert_close(cut[name], parameter.grad)


def test_autocast_trains(case: tuple[nn.Sequential, Tensor, tuple[int, ...]]) -> None:
    model, x, shape = case
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(x)
    assert output.shape == shape
    output.float().square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_layers_materialised_from_meta_start_like_eager_ones(
    case: tuple[nn.Sequential, Tensor, tuple[int, ...]], request: pytest.FixtureRequest
) -> None:
    eager, x, shape = case
    make = CASES[request.node.callspec.params["case"]][0]
    with torch.device("meta"):
        model = make()
    model.to_empty(device="cpu")
    for module in model.modules():
        reset = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()

    assert model(x).shape == shape
    expected = dict(eager.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.numel() >= 100:
            assert parameter.std().item() == pytest.approx(expected[name].std().item(), rel=0.4), (
                name
            )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: speech_dnn(layers=0), "layers=0: give a whole number of at least 1"),
        (lambda: vgg(12), "depth=12: VGG comes in 11, 13, 16, 19"),
        (lambda: vgg(classes=0), "classes=0"),
        (lambda: vgg_cifar(classes=True), "classes=True"),
        (lambda: resnet(20), "depth=20: ImageNet ResNets come in 18, 34, 50, 101, 152"),
        (lambda: resnet(classes=-1), "classes=-1"),
        (lambda: resnet_cifar(18), "depth=18: CIFAR ResNets have depth 6n \\+ 2"),
        (lambda: resnet_cifar(2), "depth=2: CIFAR"),
        (lambda: emulated(layers=0), "layers=0"),
        (lambda: emulated(width=0), "width=0"),
        (lambda: emulated(backward_ms=-1), "backward_ms=-1: give milliseconds"),
        (lambda: gpt(11, 8, 2, 16, heads=3), "width=16, heads=3: heads must divide width"),
        (lambda: gpt(11, 8, 2, 16, heads=0), "heads=0"),
        (lambda: gpt(11, 8, 2, 16, 2, dropout=1.0), "dropout=1.0: give a share"),
        (lambda: mlp([3]), r"widths=\[3\]: give at least the input's and the output's"),
        (lambda: mlp("34"), "widths='34': give at least"),  # type: ignore[arg-type]
        (lambda: mlp([3, 0, 2]), r"widths\[1\]=0: give a whole number"),
        (lambda: mlp([3, 2], dropout=-0.1), "dropout=-0.1: give a share"),
        (lambda: mlp([3, 2], activation="Rellu"), "activation='Rellu': there is no torch.nn.Rellu"),
        (lambda: mlp([3, 2], activation="nowhere.X"), "activation='nowhere.X': there is no nowh"),
        (lambda: mlp([3, 2], norm="math.pi"), "norm='math.pi': math.pi is not a class"),
    ],
)
def test_impossible_networks_are_refused_by_name(
    make: Callable[[], nn.Sequential], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make()
