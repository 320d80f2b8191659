"""What a network learns from synthetic gradients: its filters, and how its layers compare.

python -m headrace.launch.studies.representations [--out FOLDER] [--iterations N]

Trains one network on scikit-learn's digits by back-propagation, with cDNI and with DNI, from the
same first weights; draws what training added to its first layer's filters; and compares, layer by
layer, what the test images become, by linear CKA. Two runs of back-propagation from different first
weights, and a network that was not trained, are the measure.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from headrace.pipeline.errors import InputError
from headrace.pipeline.rules import Rule, Synthetic
from headrace.pipeline.synthesizers import MLP

from ..data import Digits
from ..plotting import import_pyplot
from ..run_files import check_folder
from .digits import network, train_digits

__all__ = ["agreement", "cka", "main", "smoothness"]

HIDDEN = 3


def cka(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment of two layers' outputs (N, p) and (N, q), in [0, 1].

    ‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖), columns centred, Frobenius norms (Kornblith et al. 2019):
    1 for the same up to rotation and scale.
    """
    x, y = (x - x.mean(0)).double(), (y - y.mean(0)).double()
    return float((y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm()))


def smoothness(filters: Tensor) -> float:
    """The mean correlation of neighbouring pixels of filters (units, rows, columns): 0 is noise."""
    centred = filters - filters.mean((1, 2), keepdim=True)
    variance = centred.square().mean((1, 2))
    beside = (centred[:, :, 1:] * centred[:, :, :-1]).mean((1, 2)) / variance
    below = (centred[:, 1:] * centred[:, :-1]).mean((1, 2)) / variance
    return float(((beside + below) / 2).mean())


def agreement(filters: Tensor, others: Tensor) -> float:
    """The mean cosine of each unit's filter with the same unit's of another network."""
    pairs = filters.flatten(1), others.flatten(1)
    return float(torch.nn.functional.cosine_similarity(*pairs, dim=1).mean())


def _features(model: nn.Sequential, x: Tensor) -> list[Tensor]:
    """Of each hidden layer after its ReLU, and of the output."""
    model.eval()
    found = []
    with torch.no_grad():
        for layer in model:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                found.append(x)
    return [*found, x]


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, compare, print and draw."""
    parser = argparse.ArgumentParser(
        prog="python -m headrace.launch.studies.representations",
        description=(__doc__ or "").splitlines()[0],
    )
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of the picture (.)")
    parser.add_argument("--iterations", type=int, default=2000, help="of each training (2000)")
    options = parser.parse_args(arguments)
    if options.iterations < 10:
        parser.error(f"--iterations {options.iterations}: give a whole number >= 10")
    try:
        check_folder(options.out, "--out")
    except InputError as error:
        parser.error(str(error))
    torch.set_num_threads(1)
    ways: dict[str, tuple[int, Callable[[], Rule] | None]] = {
        "back-propagation": (0, None),
        "cDNI": (0, partial(Synthetic, conditional=True, classes=10)),
        "DNI": (0, partial(Synthetic, MLP)),
        "back-propagation, other seed": (1, None),
    }
    models: dict[str, nn.Sequential] = {}
    for name, (seed, rule) in ways.items():
        models[name] = _make(seed)
        score = train_digits(HIDDEN, options.iterations, seed, rule, model=models[name])
        print(f"{name:<30} test accuracy {score:.3f}", flush=True)
    models["untrained"] = _make(0)
    x = Digits("test").inputs
    features = {name: _features(model, x) for name, model in models.items()}
    learned = {
        name: _filters(models[name]) - _filters(_make(seed)) for name, (seed, _) in ways.items()
    }
    reference = "back-propagation"
    alike = {
        name: [cka(a, b) for a, b in zip(features[reference], features[name], strict=True)]
        for name in models
        if name != reference
    }
    layers = [*(f"hidden {k + 1}" for k in range(HIDDEN)), "output"]
    print(f"\nCKA with back-propagation      {'  '.join(layers)}")
    for name, values in alike.items():
        cells = (f"{v:.2f}".rjust(len(layer)) for v, layer in zip(values, layers, strict=True))
        print(f"{name:<30} {'  '.join(cells)}")
    print("\nwhat training added to the first layer's filters   smoothness   cosine, unit by unit")
    for name, added in learned.items():
        same = f"{agreement(added, learned[reference]):.2f}"
        print(f"{name:<50} {smoothness(added):>10.2f}   {same:>20}")
    path = options.out / "representations.png"
    options.out.mkdir(parents=True, exist_ok=True)
    _draw(learned, alike, path)
    print(f"\n{path}")


def _make(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return network(HIDDEN)


def _filters(model: nn.Sequential) -> Tensor:
    weight = model[1].weight
    assert isinstance(weight, Tensor)
    filters: Tensor = weight.detach().view(-1, 8, 8)
    return filters


def _draw(learned: Mapping[str, Tensor], alike: Mapping[str, Sequence[float]], path: Path) -> None:
    plt = import_pyplot(user="representations")
    shown = ["back-propagation", "cDNI", "DNI"]
    fig, axes = plt.subplots(
        1, len(shown) + 1, figsize=(13, 4.1), layout="constrained",
        gridspec_kw={"width_ratios": [*[1] * len(shown), 1.35]},
    )  # fmt: skip
    for ax, name in zip(axes, shown, strict=False):
        # Each filter on its own scale; those that back-propagation changed most come first.
        order = learned["back-propagation"].flatten(1).norm(dim=1).argsort(descending=True)
        tiles = learned[name][order[:36]]
        tiles = tiles / tiles.abs().amax((1, 2), keepdim=True)
        padded = torch.nn.functional.pad(tiles, (1, 1, 1, 1), value=float("nan"))
        grid = padded.view(6, 6, 10, 10).permute(0, 2, 1, 3).reshape(60, 60)
        ax.imshow(grid.numpy(), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
        same = agreement(learned[name], learned["back-propagation"])
        ax.set_title(name if same > 0.999 else f"{name}: cosine {same:.2f}", fontsize=11)
        ax.axis("off")
    ax = axes[-1]
    styles = {
        "cDNI": ("#0072B2", "o-"),
        "DNI": ("#D55E00", "s-"),
        "back-propagation, other seed": ("#555555", "^--"),
        "untrained": ("#AAAAAA", "x:"),
    }
    x = range(1, HIDDEN + 2)
    for name, (colour, style) in styles.items():
        ax.plot(x, alike[name], style, color=colour, label=name)
    ax.set_xticks(list(x), [*(f"hidden {k}" for k in range(1, HIDDEN + 1)), "output"])
    ax.set_ylim(0, 1.02)
    ax.set_ylabel("CKA with back-propagation")
    ax.legend(frameon=False, fontsize=9, loc="lower left")
    ax.spines[["top", "right"]].set_visible(False)
    fig.suptitle(
        "What training adds to 36 filters of the first layer, the same start; and how alike the "
        "layers become",
        fontsize=12,
    )
    fig.savefig(path, dpi=110)
    plt.close(fig)


if __name__ == "__main__":
    main()
