"""Measure how sharp the minimum is that a run found; with two runs, also the line between them.

python -m headrace.launch.sharpness --checkpoint runs/A [runs/B] [options] [--KEY VALUE ...]

Of a run that has not ended, its newest whole checkpoint is measured; or give a checkpoint's folder.
Prints a table, and writes sharpness.json and pictures. Everything is computed over all training
data in float64, layers in evaluation mode, through a pipeline: under torchrun a stage a process,
for a model that is larger than one device.
"""

import argparse
import json
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from headrace.pipeline.errors import InputError
from headrace.pipeline.hessian import Eigenvalue
from headrace.pipeline.objective import Objective
from headrace.pipeline.sharpness import Sharpness, find_solver

from .assemble import make_loader, make_loss, make_metrics, make_model
from .config import Config
from .display import count
from .landscape import draw_line, draw_worst
from .minima import STEPS, Data, Line, Measured, State, measure, measure_line
from .ranks import check_stages, hear, processes, rank, refuse_error, stop, tell
from .run_files import check_folder
from .saved import Saved, find_saved
from .wording import engine_in_yaml

__all__ = ["main"]


@dataclass(frozen=True)
class Options:
    """What the command line says, beside the configuration's keys.

    Args:
        saved: one, or two for the line.
        out: for the files.
        epsilon: of each φ, the largest first.
        subspace: p, the number of random directions.
        seed: of those directions, random starts and first vectors.
    """

    saved: tuple[Saved, ...]
    out: Path
    epsilon: tuple[float, ...]
    subspace: int
    seed: int


@engine_in_yaml()
def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and measure; ends the process with 2 where that cannot be done."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    try:
        config, options = parse_command(sys.argv[1:] if arguments is None else arguments)
        find_solver()
        states = [each.weights() for each in options.saved]
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        data = _make_data(config)
        f = _make_objective(config, data)
    except (ValueError, TypeError, ImportError) as error:
        refuse_error(error)
    try:
        with f:
            _run(config, options, data, f, states)
    except InputError as error:
        refuse_error(error)


# What is to be measured ---------------------------------------------------------------------


def parse_command(arguments: Sequence[str]) -> tuple[Config, Options]:
    """The first checkpoint's configuration, changed as told, and what else the command line says.

    Raises:
        ValueError: one of them cannot be.
    """
    own, rest = _parser().parse_known_args(list(arguments))
    folders = tuple(own.checkpoint)
    if len(folders) > 2:
        raise ValueError(f"--checkpoint has {len(folders)} folders: give one, or two for the line")
    if any(argument.partition("=")[0] == "--config" for argument in rest):
        raise ValueError("--config: a checkpoint has its own configuration; leave it out")
    for epsilon in own.epsilon:
        if not 0 < epsilon < 1:
            raise ValueError(f"--epsilon {epsilon:g}: give numbers above 0 and below 1, as 1e-3")
    if own.subspace < 1:
        raise ValueError(f"--subspace {own.subspace}: give a number of directions, 1 or more")
    if not 0 <= own.seed < 2**64:
        raise ValueError(f"--seed {own.seed}: give a whole number from 0 on and below 2^64")
    saved = tuple(find_saved(folder) for folder in folders)
    out = own.out or saved[0].out
    if (out / "sharpness.json").exists():
        raise ValueError(f"--out {out}: there is a sharpness.json already; give another folder")
    if not rank():
        check_folder(out, "--out")
    config = saved[0].config(rest)
    if config.stages is not None and not any(each.startswith("--stages") for each in rest):
        config = replace(config, stages=processes() or config.stages)
    check_stages(config.stages)
    epsilons = tuple(sorted(set(own.epsilon), reverse=True))
    return config, Options(saved, out, epsilons, own.subspace, own.seed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m headrace.launch.sharpness",
        usage="%(prog)s --checkpoint FOLDER [FOLDER] [options] [--KEY VALUE ...]",
        description=f"{(__doc__ or '').partition('.')[0]}.",
        epilog="Keys are the configuration's: python -m headrace.launch.train --help lists them.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, nargs="+", required=True, metavar="FOLDER", help="of a run (its "
        "end, or its newest checkpoint while it has not ended), or of a checkpoint")  # fmt: skip
    add("--out", type=Path, help="folder for the files (default: the first run's; beside a "
        "checkpoint, its name with -sharpness)")  # fmt: skip
    add("--epsilon", type=float, nargs="+", default=[1e-3, 5e-4], help="sizes of the box "
        "(default 1e-3 5e-4)")  # fmt: skip
    add("--subspace", type=int, default=100, metavar="P", help="random directions (default 100)")
    add("--seed", type=int, default=0, help="of directions and random starts (default 0)")
    return parser


def _make_data(config: Config) -> Data:
    has_test = config.data.test is not None
    if rank():
        return Data((), () if has_test else None, int(hear("batches")))
    config = replace(config, data=replace(config.data, shuffle=False, drop_last=False))
    train = make_loader(config, "data.train", config.data.train)
    test = make_loader(config, "data.test", config.data.test) if config.data.test else None
    try:
        batches = len(train)
    except TypeError:
        raise ValueError("data.train does not say how many samples it has: give a dataset with "
                         "a length") from None  # fmt: skip
    tell("batches", str(batches))
    return Data(train, test, batches)


def _make_objective(config: Config, data: Data) -> Objective:
    options = config.pipeline
    return Objective(
        make_model(config),
        make_loss(config),
        data.train,
        data.batches,
        stages=config.stages,
        balance=options.balance,
        micro_batches=options.micro_batches,
        device=options.device,
        seed=config.seed,
        timeout=options.timeout,
    )


# Measuring ----------------------------------------------------------------------------------


def _run(
    config: Config, options: Options, data: Data, f: Objective, states: Sequence[State]
) -> None:
    """Every rank does the same; the first one prints and writes."""
    first = rank() == 0
    start = time.perf_counter()
    points = []
    for each, state in zip(options.saved, states, strict=True):
        try:
            points.append(f.at(state))
        except ValueError as error:
            raise InputError(f"--checkpoint {each.folder}: {error}") from error
    n = len(points[0])
    if options.subspace > n:
        raise InputError(
            f"--subspace {options.subspace}: the model has {count(n, 'weight')}; give fewer "
            "directions"
        )
    metrics = make_metrics(config)
    found = []
    for each, state in zip(options.saved, states, strict=True):
        f.at(state)
        found.append(
            measure(
                f,
                str(each.folder),
                state,
                data,
                metrics,
                options.epsilon,
                options.subspace,
                options.seed,
            )
        )
    line = measure_line(f, states, data, metrics) if len(states) == 2 else None
    distance = float((points[-1] - points[0]).norm())
    if not first:
        return
    print(_title(config, n, f))
    print(_table(found, options, distance if line else None))
    options.out.mkdir(parents=True, exist_ok=True)
    files = [_write(found, line, distance, n, options)]
    try:
        files += draw_worst({m.name: (STEPS, m.worst) for m in found}, options.epsilon[0],
                            options.out / "worst-direction")  # fmt: skip
        if line is not None:
            files += draw_line(line, found[0].name, found[1].name, options.out / "line")
    except ImportError as error:
        print(f"no picture: {error}", file=sys.stderr)
    print("\n" + "\n".join(str(file) for file in files if file.suffix != ".svg"))
    print(f"{time.perf_counter() - start:.0f} s")


# Showing ------------------------------------------------------------------------------------


def _title(config: Config, n: int, f: Objective) -> str:
    stages = f.pipeline.stages
    where = count(stages, "stage")
    return f"{config.name}  {count(n, 'weight')}, float64, evaluation mode, {where}\n"


def _table(found: Sequence[Measured], options: Options, distance: float | None) -> str:
    """A row a figure, a column a checkpoint."""
    rows: list[tuple[str, list[str]]] = [("", [m.name for m in found])]
    for kind in ("train", "test"):
        for name in getattr(found[0], kind):
            rows.append((f"{kind} {name}", [f"{getattr(m, kind)[name]:.4g}" for m in found]))
    for e in options.epsilon:
        rows.append((f"phi, whole space, epsilon {e:g}", [f"{m.full[e].phi:.4g}" for m in found]))
    for e in options.epsilon:
        name = f"phi, {count(options.subspace, 'direction')}, epsilon {e:g}"
        rows.append((name, [f"{m.subspace[e].phi:.4g}" for m in found]))
    rows.append(("lambda_max", [f"{m.curvature.value:.4g}" for m in found]))
    rows.append(("  Hessian products", [_products(m.curvature) for m in found]))
    if distance is not None:
        rows.append(("distance between the two", [f"{distance:.4g}"]))
    left = max(len(name) for name, _ in rows) + 2
    width = max(len(cell) for _, cells in rows for cell in cells) + 2
    return "\n".join(
        f"{name:<{left}}{''.join(f'{cell:>{width}}' for cell in cells)}" for name, cells in rows
    )


def _products(found: Eigenvalue) -> str:
    return f"{found.products}" if found.converged else f"{found.products}, not converged"


def _write(
    found: Sequence[Measured], line: Line | None, distance: float, n: int, options: Options
) -> Path:
    """sharpness.json: every figure, and how the solver came to it."""

    def of_box(values: Mapping[float, Sharpness]) -> list[dict[str, Any]]:
        return [
            {"epsilon": e, "phi": s.phi, "loss": s.loss, "start": s.start,
             "iterations": s.iterations}
            for e, s in values.items()
        ]  # fmt: skip

    checkpoints = [
        {
            "checkpoint": m.name,
            "train": m.train,
            "test": m.test,
            "phi": of_box(m.full),
            "phi_subspace": of_box(m.subspace),
            "lambda_max": m.curvature.value,
            "hessian_products": m.curvature.products,
            "converged": m.curvature.converged,
            "worst_direction": {"steps": STEPS, "loss": m.worst},
        }
        for m in found
    ]
    content: dict[str, Any] = {
        "weights": n,
        "subspace": options.subspace,
        "seed": options.seed,
        "checkpoints": checkpoints,
    }
    if line is not None:
        content |= {"distance": distance, "line": asdict(line)}
    path = options.out / "sharpness.json"
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path


if __name__ == "__main__":
    main()
