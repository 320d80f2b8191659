"""What a run says of its stability before it starts: from the delay alone, or from a curvature."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from rich.text import Text
from torch import Tensor

from headrace.pipeline import Pipeline
from headrace.pipeline.corrections.correction import expand
from headrace.pipeline.curvature import estimate_curvature
from headrace.pipeline.feed import read
from headrace.pipeline.layers import materialise, named_layers
from headrace.pipeline.rules import Delayed
from headrace.pipeline.settings import make_optimizers
from headrace.pipeline.stability import Stability, examine, speaks_of

from .assemble import (
    expected_staleness,
    make_corrections,
    make_loader,
    make_loss,
    make_model,
    make_rules,
    make_settings,
)
from .config import Config
from .wording import in_yaml

__all__ = ["foresee", "look_ahead"]


NOT_CHECKED = (
    "not checked: check_stability is for late gradients of SGD, where neither a correction nor "
    "weight prediction does anything about it, and no replicas add to it"
)


def foresee(config: Config, staleness: Sequence[float]) -> Text | None:
    """What a plan says, which has no stages; None where nothing is stale.

    Args:
        staleness: of each stage.
    """
    rules = make_rules(config.pipeline)
    first = rules[0] if isinstance(rules, list) else rules
    weights = [(n, p) for n, p in make_model(config).named_parameters() if p.requires_grad]
    optimizers = make_optimizers(make_settings(config).optimizer, weights)
    written, late = make_corrections(config.pipeline), staleness[0] > 0
    corrections = expand(written, late, first or Delayed("stash"), optimizers)
    return _say(examine(0, staleness[0], optimizers)) if speaks_of(first, corrections) else None


def look_ahead(config: Config, pipe: Pipeline, weights: Mapping[str, Tensor] | None) -> Text | None:
    """What the first rank says before training; None where nothing is stale, or something is done
    about it, unless a check was asked for. Where the batch grows, it is said of its first size, and
    of the rate there: a rate that grows with it may well be beyond the edge later.

    Args:
        pipe: prepared.
        weights: the whole model's, at which to check; None where no check was asked for.
    """
    law, iterations = pipe.stability, config.pipeline.check_stability
    if law is not None:  # the configuration knows how many micro-batches a growing batch has
        staleness = expected_staleness(config, pipe.depths)[law.stage]
        law = replace(law, staleness=staleness) if staleness else None
    if weights is None:
        return _say(law)
    if law is None:
        return Text(f"stability: {NOT_CHECKED}")
    if law.preconditions:
        return Text(f"{law.figures}, which check_stability cannot find: it is for SGD")
    with torch.random.fork_rng():
        stable, words = _judge(config, pipe, law, iterations, weights)
    if not stable:
        return _warn(words)
    # Training may well raise the curvature: what is to be said without it stays true.
    said = Text(f"stability: {words}")
    return said if law.warning is None else said.append("\n").append_text(_warn(law.warning))


def _judge(
    config: Config,
    pipe: Pipeline,
    law: Stability,
    iterations: int,
    weights: Mapping[str, Tensor],
) -> tuple[bool, str]:
    """The verdict on the stage that is closest to its edge, on the first mini-batch."""
    options = config.pipeline
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    batch = next(read(make_loader(config, "data.train", config.data.train), pairs_only=True))
    model, loss = make_model(config), make_loss(config)
    for name, layer in named_layers(model):
        materialise(name, layer, config.seed, device)
    model.load_state_dict(weights)
    assert pipe.partition is not None
    worst = (-math.inf, True, "")
    staleness = expected_staleness(config, pipe.depths)
    for j, (layers, stale) in enumerate(zip(pipe.partition.stages, staleness, strict=True)):
        if stale:
            own = replace(law, stage=j, staleness=stale)
            names = [layer.name for layer in layers]
            curvature = estimate_curvature(
                model, loss, batch, iterations, layers=names, device=device, seed=config.seed
            )
            worst = max(worst, (own.rate * curvature / own.bound, *own.verdict(curvature)))
    return worst[1:]


def _say(law: Stability | None) -> Text | None:
    if law is None:
        return None
    return Text(law.figures) if law.warning is None else _warn(law.warning)


def _warn(words: str) -> Text:
    return Text(f"warning: {in_yaml(words)}", style="yellow")
