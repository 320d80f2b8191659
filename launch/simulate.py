"""What the staleness of many stages does to a model, exactly, in one process on one device.

python -m headrace.launch.simulate --config FILE --stages 8,16,32,64 [options] [--KEY VALUE ...]

Trains with each number of stages, variant, learning rate and seed, and compares them. The weights
are, bit for bit, those of torchrun with as many processes.
"""

import argparse
import math
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

from headrace.pipeline.errors import InputError

from .config import Config, to_yaml
from .display import console, count, duration, print_table
from .plotting import import_pyplot
from .ranks import processes, refuse_error, stop
from .run_files import check_folder, new_folder
from .simulation.differences import differences, differences_table, import_special, left_out
from .simulation.picture import draw
from .simulation.plan import DEFAULT, Case, Grid, plan, read_variants
from .simulation.results import Row, best, results_table, write_csv, write_json
from .simulation.side_by_side import outcomes
from .wording import engine_in_yaml, in_yaml

__all__ = ["main"]

_T = TypeVar("_T", int, float)


@engine_in_yaml()
def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and simulate; ends the process with 2 where that cannot be done."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    try:
        own, rest = _parser().parse_known_args(given)
        if processes() is not None:
            raise ValueError("simulate runs in one process: start it without torchrun")
        grid = _grid(own)
        cases = plan(rest, grid)
        import_pyplot()
        if grid.seeds > 1:
            import_special()
        check_folder(Path("runs"))
        rows = _tuned(cases, own.processes) if grid.tune else _run(cases, own.processes)
    except (ValueError, TypeError, ImportError, InputError) as error:
        refuse_error(error)
    except BrokenProcessPool:
        sys.stderr.write(
            "headrace: a process that simulated was ended from outside, most often as memory was "
            "short: nothing was written; give fewer --processes\n"
        )
        raise SystemExit(1) from None
    name = cases[0].configs[0].name
    folder = new_folder(Path("runs"), f"{name}-simulation")
    (folder / "config.yaml").write_text(to_yaml(cases[0].configs[0]), encoding="utf-8")
    about: dict[str, Any] = {"command": ["python", "-m", "headrace.launch.simulate", *given]}
    # First of all: the runs took hours, and nothing that comes next may lose them.
    write_json(folder / "results.json", rows, about)
    write_csv(folder / "results.csv", rows)
    apart = differences(rows)
    about["differences"] = [asdict(each) for each in apart]
    write_json(folder / "results.json", rows, about)
    seeds = f"{grid.seeds} seeds, mean ± standard deviation" if grid.seeds > 1 else "one seed"
    draw(rows, folder / "curves", f"{name}: {seeds}")
    out = console()
    out.print()
    print_table(results_table(rows, own.until))
    if apart:
        print_table(differences_table(apart))
    out.print(_legend(rows, seeds, compared=bool(apart)))
    out.print(f"files      {folder}: curves.png, results.csv, results.json")


def _legend(rows: Sequence[Row], seeds: str, *, compared: bool) -> str:
    lines = [f"{seeds}; staleness of the first stage; time over that of one stage"]
    if compared:
        lines.append("differences are paired by seed; the interval of their mean is Student's")
    if any(row.case.rate is not None for row in rows):
        lines.append("* each variant's best rate, which the picture shows")
    for row in rows:
        for config, outcome in zip(row.case.configs, row.outcomes, strict=True):
            if outcome.diverged is not None:
                where = f"{count(row.case.stages, 'stage')}, {_what(row.case, config)}"
                lines.append(f"diverged: {where}: {in_yaml(outcome.diverged)}")
                break
    lines += [f"not compared: {words}" for words in left_out(rows)]
    return "\n".join(lines) + "\n"


def _what(case: Case, config: Config) -> str:
    rate = "" if case.rate is None else f", rate {case.rate:g}"
    return f"{case.variant}{rate}, seed {config.seed}"


def _run(cases: Sequence[Case], workers: int) -> list[Row]:
    """Run all, and tell of each when it is done."""
    runs = [(case, config) for case in cases for config in case.configs]
    out, done = console(), []
    with closing(outcomes([config for _, config in runs], workers)) as ended:
        for k, outcome in enumerate(ended):
            case, config = runs[k]
            end = "diverged" if outcome.diverged else f"loss {outcome.scores['loss']:.4f}"
            stages = f"{count(case.stages, 'stage'):>10}"
            what = f"{stages}  {_what(case, config)}"
            out.print(f"{k + 1:>{len(str(len(runs)))}}/{len(runs)} {what}: {end}, "
                      f"{duration(outcome.seconds)}", soft_wrap=True)  # fmt: skip
            done.append(outcome)
    rows, ends = [], iter(done)
    for case in cases:
        rows.append(Row(case, tuple(next(ends) for _ in case.configs)))
    return rows


def _tuned(cases: Sequence[Case], workers: int) -> list[Row]:
    """Run the first seed of all, then the others of each variant's best rate."""
    rows = _run([replace(case, configs=case.configs[:1]) for case in cases], workers)
    chosen = {
        id(row)
        for column in {column for case in cases for column in case.columns}
        for row in best(rows, column).values()
        if row.finished
    }
    again = [k for k, row in enumerate(rows) if id(row) in chosen and len(cases[k].configs) > 1]
    more = _run([replace(cases[k], configs=cases[k].configs[1:]) for k in again], workers)
    for k, row in zip(again, more, strict=True):
        rows[k] = Row(cases[k], (*rows[k].outcomes, *row.outcomes))
    return rows


def _grid(own: argparse.Namespace) -> Grid:
    """What the command line asks for.

    Raises:
        ValueError: it cannot be.
    """
    for name in ("seeds", "processes"):
        if (value := getattr(own, name)) < 1:
            raise ValueError(f"--{name} {value}: give a whole number of at least 1")
    stages = _numbers("stages", own.stages, int, "whole numbers from 1 on, as in 8,16,32")
    what = "learning rates, as in 1e-3,3e-3"
    rates = _numbers("rates", own.rates, float, what) if own.rates else ()
    variants = read_variants(own.variants) if own.variants else DEFAULT
    if own.until is not None and not 0 < own.until < math.inf:
        raise ValueError(f"--until {own.until}: give a training loss above 0")
    if own.tune and len(rates) < 2:
        raise ValueError("--tune chooses among --rates: give two or more, as in 1e-3,3e-3")
    return Grid(stages, variants, own.seeds, rates, own.scale_depth, own.tune)


def _numbers(name: str, text: str, read: Callable[[str], _T], what: str) -> tuple[_T, ...]:
    try:
        values = tuple(dict.fromkeys(read(part) for part in text.split(",") if part.strip()))
    except ValueError:
        values = ()  # refused below
    if not values or any(not 0 < value < math.inf for value in values):
        raise ValueError(f"--{name} {text or repr(text)}: give {what}")
    return values


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m headrace.launch.simulate",
        usage="%(prog)s --config FILE --stages N,N,... [options] [--KEY VALUE ...]",
        description=f"{__doc__.partition('.')[0]}.",
        epilog="Variants are a YAML file of names, and under each the configuration's keys that it "
        "changes: 'predict: {pipeline.rule.init_args.weights: predict}'. A variant with "
        "{stages: 1} is training without delay. Other keys are the configuration's: "
        "python -m headrace.launch.train --help lists them.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--stages", required=True, metavar="N,N,...", help="numbers of stages, as in 8,16,32,64")
    add(
        "--seeds", type=int, default=1, metavar="K", help="runs of each, from `seed` on (default 1)"
    )
    add("--rates", default="", metavar="X,X,...", help="learning rates, in place of optimizer's lr")
    add(
        "--variants",
        type=Path,
        metavar="FILE",
        help=f"what to compare (default: {', '.join(DEFAULT)})",
    )
    add(
        "--tune",
        action="store_true",
        help="choose each variant's rate on the first seed, and run the others with it alone",
    )
    add("--until", type=float, metavar="LOSS", help="also tell the updates to this training loss")
    add("--scale-depth", metavar="KEY", help="set this to the number of stages: a gpt's blocks")
    add("--processes", type=int, default=1, metavar="K", help="runs at a time (default 1)")
    return parser


if __name__ == "__main__":
    main()
