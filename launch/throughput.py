"""Profile a model's streaming training, and compare it with what one would use instead, in one run.

torchrun --nproc-per-node N -m headrace.launch.throughput --config FILE [options] [--KEY VALUE ...]

Every system trains the same network on the same mini-batches at the same precision, in turn, a few
times over; loading is not measured. Ratios within one run are what counts: machines are noisy.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from headrace.pipeline import Link

from .config import Config, parse
from .profiling.report import Options, prepare, profile
from .profiling.systems import DEFAULT_ROWS, SYSTEMS
from .ranks import processes, refuse

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and profile; ends the process with 2 where that cannot be done."""
    try:
        config, options = _parse(sys.argv[1:] if arguments is None else arguments)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        work, cut = prepare(config, options)
    except (ValueError, TypeError) as error:
        refuse(str(error))
    profile(work, cut, options)


def _parse(arguments: Sequence[str]) -> tuple[Config, Options]:
    own, rest = _parser().parse_known_args(list(arguments))
    if processes() is None:
        raise ValueError(
            "throughput compares systems over several processes: start it with torchrun "
            "--nproc-per-node N -m headrace.launch.throughput --config FILE"
        )
    for name, value in (("rounds", own.rounds), ("steps", own.steps)):
        if value < 1:
            raise ValueError(f"--{name} {value}: give a whole number of at least 1")
    if min(own.micro_batches) < 1:
        raise ValueError(f"--micro-batches {min(own.micro_batches)}: give whole numbers from 1 on")
    unknown = [row for row in own.rows if row not in SYSTEMS]
    if unknown:
        raise ValueError(f"--rows {unknown[0]}: there is no such row; write {', '.join(SYSTEMS)}")
    milliseconds = own.link_latency_ms
    return parse(rest), Options(
        rows=own.rows,
        rounds=own.rounds,
        steps=own.steps,
        micro_batches=own.micro_batches,
        out=own.out,
        link=None if milliseconds is None else Link(latency=milliseconds / 1000),
        predicts=own.predict,
        fixes=own.fix,
        timeline=own.timeline,
        torch_profiler=own.torch_profiler,
        config_file=_config_file(rest),
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
    add("--rows", nargs="+", default=DEFAULT_ROWS, metavar="ROW", help=", ".join(SYSTEMS))
    add("--rounds", type=int, default=3, help="times that each row is measured (default 3)")
    add("--steps", type=int, default=20, help="mini-batches of a measurement (default 20)")
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
        help="what every stage does when: a trace and pictures, text as well, or nothing",
    )
    add("--torch-profiler", action="store_true", help="write torch.profiler's trace of each rank")
    return parser


def _config_file(arguments: Sequence[str]) -> str | None:
    for k, argument in enumerate(arguments):
        if argument == "--config" and k + 1 < len(arguments):
            return arguments[k + 1]
        if argument.startswith("--config="):
            return argument.partition("=")[2]
    return None


if __name__ == "__main__":
    main()
