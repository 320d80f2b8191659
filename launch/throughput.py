"""Profile a model's streaming training, and compare it with what one would use instead, in one run.

torchrun --nproc-per-node N -m headrace.launch.throughput --config FILE [options] [--KEY VALUE ...]

Every system trains the same network on the same mini-batches at the same precision, in turn, a few
times over; loading is not measured. Ratios within one run are what counts: machines are noisy.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from headrace.pipeline import Link

from .config import Config, find_file, parse, read_overrides
from .profiling.options import Options
from .profiling.profiler import prepare, profile
from .profiling.systems import SYSTEMS, default_rows
from .ranks import check_stages, processes, rank, refuse_error
from .run_files import check_folder
from .strict_yaml import load
from .wording import engine_in_yaml

__all__ = ["main", "parse_command"]


@engine_in_yaml()
def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and profile; ends the process with 2 where that cannot be done."""
    try:
        config, options = parse_command(sys.argv[1:] if arguments is None else arguments)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        work, cut = prepare(config, options)
    except (ValueError, TypeError, ImportError) as error:
        refuse_error(error)
    profile(work, cut, options)


def parse_command(arguments: Sequence[str]) -> tuple[Config, Options]:
    """The configuration, and what else the command line says.

    Raises:
        ValueError: one of them cannot be.
    """
    own, rest = _parser().parse_known_args(list(arguments))
    if (processes() or 1) < 2:
        raise ValueError(
            "throughput compares systems over several processes: start it with torchrun "
            "--nproc-per-node N -m headrace.launch.throughput --config FILE"
        )
    for name, value in (("rounds", own.rounds), ("steps", own.steps)):
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value}: give a whole number of at least 1")
    if min(own.micro_batches) < 1:
        raise ValueError(f"--micro-batches {min(own.micro_batches)}: give whole numbers from 1 on")
    unknown = [row for row in own.rows if row not in SYSTEMS]
    if unknown:
        raise ValueError(f"--rows {unknown[0]}: there is no such row; write {', '.join(SYSTEMS)}")
    if own.out is not None and (own.out / "table.json").exists():
        raise ValueError(
            f"--out {own.out}: an earlier run's results are there; give another folder"
        )
    milliseconds = own.link_latency_ms
    if milliseconds is not None and not 0 <= milliseconds < math.inf:
        raise ValueError(f"--link-latency-ms {milliseconds}: give milliseconds, 0 or more")
    if own.out is not None and own.out.exists() and not own.out.is_dir():
        raise ValueError(f"--out {own.out}: there is a file of that name; give a folder")
    if own.out is not None and not rank():
        check_folder(own.out, "--out")
    config = parse(rest)
    if config.pipeline.replicas is not None:
        raise ValueError(
            "throughput measures one pipeline: write --pipeline.replicas null; "
            "headrace.launch.studies.scaling measures replicas"
        )
    if config.pipeline.batch_size is not None:
        raise ValueError(
            "throughput measures updates of one size: write --pipeline.batch_size null, and "
            "pipeline.update_every for the size that matters"
        )
    check_stages(config.stages)
    keys = dict(read_overrides(rest))
    file = keys.pop("config", None)
    return config, Options(
        rows=own.rows or default_rows(config),
        rounds=own.rounds,
        steps=own.steps,
        micro_batches=own.micro_batches,
        out=own.out,
        link=None if milliseconds is None else Link(latency=milliseconds / 1000),
        predicts=own.predict,
        fixes=_file_to_fix(file, own.out) if own.fix else None,
        timeline=own.timeline,
        overrides={key: load(value) for key, value in keys.items()},
        torch_profiler=own.torch_profiler,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="torchrun --nproc-per-node N -m headrace.launch.throughput",
        usage="%(prog)s --config FILE [options] [--KEY VALUE ...]",
        description=f"{__doc__.partition('.')[0]}.",
        epilog="Keys are the configuration's: python -m headrace.launch.train --help lists them.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--rows", nargs="+", default=[], metavar="ROW", help=", ".join(SYSTEMS))
    add("--rounds", type=int, default=3, help="times that each row is measured (default 3)")
    add("--steps", type=int, help="mini-batches of a measurement (default: a second's, 20 or more)")
    add(
        "--micro-batches",
        type=int,
        nargs="+",
        default=[2, 4, 8, 16],
        metavar="M",
        help="counts tried for rows that flush (default 2 4 8 16)",
    )
    add("--out", type=Path, help="folder for the results (default runs/NAME-throughput)")
    add("--link-latency-ms", type=float, metavar="MS", help="emulate links this slow, one way")
    add("--predict", action="store_true", help="predict 2 to 1024 stages and other links")
    add("--fix", action="store_true", help="write what is advised into a copy of the YAML file")
    add(
        "--timeline",
        choices=["picture", "text", "none"],
        default="picture",
        help="what every stage does when: a trace, and pictures or letters; or nothing",
    )
    add("--torch-profiler", action="store_true", help="write torch.profiler's trace of each rank")
    return parser


def _file_to_fix(file: str | None, out: Path | None) -> Path:
    """The configuration's file, a copy of which can be written."""
    if file is None:
        raise ValueError("--fix writes into a copy of the YAML file: give one with --config FILE")
    source = find_file(file)
    target = (out or Path()) / f"{source.stem}-fixed.yaml"
    if out is not None and target.exists():
        raise ValueError(f"--fix: {target} exists: give another --out, or move it away")
    return source


if __name__ == "__main__":
    main()
