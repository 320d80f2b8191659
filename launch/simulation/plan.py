"""Which runs a simulation is made of: numbers of stages x variants x learning rates x seeds."""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from headrace.pipeline.partition import check_model
from headrace.pipeline.simulation import Simulation
from headrace.pipeline.stability import StabilityWarning

from ..assemble import make_loader, make_model, make_pipeline, updates
from ..config import Config, Data, parse, to_yaml
from ..display import count as in_words
from ..strict_yaml import load_file

_OWN = Path(__file__).parent / "variants"

__all__ = ["DEFAULT", "Case", "Grid", "Variants", "plan", "read_variants"]

Variants = Mapping[str, Mapping[str, Any]]
"""Names, and what each changes: dotted keys of the configuration, and their values."""


def _delayed(weights: str) -> dict[str, Any]:
    rule = {"class_path": "delayed", "init_args": {"weights": weights}}
    return {"pipeline.schedule": "stream", "pipeline.rule": rule}


DEFAULT: Variants = {
    "no delay": {"stages": 1},
    **{weights: _delayed(weights) for weights in ("stash", "predict", "current")},
}


@dataclass(frozen=True)
class Grid:
    """What is asked for.

    Args:
        stages: numbers of stages.
        seeds: how many, from the configuration's own on.
        rates: learning rates; empty for the configuration's own.
        tune: choose each variant's rate on the first seed, and run the other seeds with it alone.
        scale_depth: the key of what is to be as many as there are stages; None for none.
    """

    stages: tuple[int, ...]
    variants: Variants
    seeds: int = 1
    rates: tuple[float, ...] = ()
    scale_depth: str | None = None
    tune: bool = False


@dataclass(frozen=True)
class Case:
    """One row: runs that differ in their seed only.

    Args:
        columns: the numbers of stages that it is compared under; a variant whose `stages` is its
            own is there once for all of them, if they are of one depth.
        configs: one a seed.
    """

    variant: str
    columns: tuple[int, ...]
    rate: float | None
    configs: tuple[Config, ...]

    @property
    def stages(self) -> int:
        """How many it runs on."""
        return self.configs[0].stages or 1


def read_variants(path: Path) -> Variants:
    """Read a YAML file of names, and under each the dotted keys that it changes; or one of
    Headrace's own, by its name (`charlm`).

    Raises:
        ValueError: there is none, or it holds something else.
    """
    own = {each.stem: each for each in sorted(_OWN.glob("*.yaml"))}
    if not path.exists() and str(path) not in own:
        raise ValueError(f"--variants {path}: no such file (Headrace brings {', '.join(own)})")
    path = path if path.exists() else own[str(path)]
    tree = load_file(path)
    if not isinstance(tree, dict) or not tree:
        raise ValueError(
            f"{path}: variants are names, and under each the keys that it changes, as in\n"
            "  no delay: {stages: 1}\n  stash: {}"
        )
    for name, changes in tree.items():
        if not isinstance(name, str) or not isinstance(changes, dict | None):
            raise ValueError(
                f"{path}: variant {name!r} must be a name with keys and values, as in\n"
                "  predict: {pipeline.rule.init_args.weights: predict}"
            )
    return {name: changes or {} for name, changes in tree.items()}


def plan(arguments: Sequence[str], grid: Grid) -> list[Case]:
    """The cases, every configuration checked.

    Args:
        arguments: `--config FILE` and overrides, as `launch.train` takes them.

    Raises:
        ValueError: one cannot be; it says which variant.
    """
    base = parse(arguments)
    if grid.scale_depth is not None:
        _check_depth(base, grid.scale_depth)
    cases: dict[tuple[str, float | None, str], Case] = {}
    for count in sorted(grid.stages):
        for variant, changes in grid.variants.items():
            for rate in grid.rates or (None,):
                try:
                    configs = _configs(arguments, grid, count, changes, rate)
                except ValueError as error:
                    raise _of(variant, count, error) from None
                key = (variant, rate, to_yaml(configs[0]))
                columns = (*cases[key].columns, count) if key in cases else (count,)
                cases[key] = Case(variant, columns, rate, configs)
    _check_layers(list(cases.values()), grid)
    _check_pipelines(list(cases.values()))
    return list(cases.values())


def _of(variant: str, stages: int, error: Exception) -> ValueError:
    return ValueError(f"variant {variant!r}, {in_words(stages, 'stage')}: {error}")


def _configs(
    arguments: Sequence[str],
    grid: Grid,
    count: int,
    changes: Mapping[str, Any],
    rate: float | None,
) -> tuple[Config, ...]:
    added: dict[str, Any] = {"stages": count}
    if grid.scale_depth is not None:
        added[grid.scale_depth] = count
    added |= changes
    if rate is not None:
        added["optimizer.init_args.lr"] = rate
    config = parse([*arguments, *(f"--{key}={json.dumps(value)}" for key, value in added.items())])
    stages, options = config.stages or 1, config.pipeline
    if options.replicas is not None:
        raise ValueError("replicas run in processes of their own: write --pipeline.replicas null")
    if not isinstance(options.balance, list) or len(options.balance) != stages:
        # What is measured would be cut in another way the next time.
        config = replace(config, pipeline=replace(options, balance="parameters"))
    return tuple(replace(config, seed=config.seed + k) for k in range(grid.seeds))


def _check_depth(config: Config, key: str) -> None:
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else getattr(value, part, None)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(
            f"--scale-depth {key}: that is {value!r} in the configuration, and it must be a whole "
            "number, as model.init_args.blocks of a gpt is"
        )


def _check_layers(cases: Sequence[Case], grid: Grid) -> None:
    """Before anything runs: the largest number of stages is the last that would be refused."""
    for case in cases:
        model = make_model(case.configs[0])
        check_model(model, 1)
        layers = len(model)
        if layers < case.stages and case.stages not in case.columns:
            raise ValueError(
                f"variant {case.variant!r} has stages: {case.stages}, the model has {layers} "
                f"layers, and each stage needs one: write stages: {layers} there, or fewer, or "
                "leave it out"
            )
        if layers < case.stages:
            deeper = (
                "a larger model"
                if grid.scale_depth
                else "--scale-depth KEY (model.init_args.blocks of a gpt) for a depth that follows "
                "the stages"
            )
            raise ValueError(
                f"--stages {case.stages}: the model has {layers} layers, and each stage needs one: "
                f"write --stages up to {layers}, or {deeper}"
            )


def _check_pipelines(cases: Sequence[Case]) -> None:
    """Before anything trains: the last variant may be the one that would be refused, hours later.

    What is refused when a stage's optimizer is made needs a mini-batch: of each data one is read.
    """
    loaders: list[tuple[Data, Any]] = []
    for case in cases:
        config = case.configs[0]
        try:
            loader = next((each for data, each in loaders if data == config.data), None)
            if loader is None:
                loader = make_loader(config, "data.train", config.data.train)
                loaders.append((config.data, loader))
            total = updates(config, loader)
            with (
                warnings.catch_warnings(),
                make_pipeline(config, make_model(config), total, kind=Simulation) as pipe,
            ):
                warnings.simplefilter("ignore", StabilityWarning)
                pipe.prepare(loader)
        except (ValueError, TypeError) as error:
            raise _of(case.variant, case.stages, error) from error
