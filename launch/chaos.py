"""Do to real jobs what machines do to them, until so many faults are survived.

python -m headrace.launch.chaos [--faults 100] [--seed 0] [--kinds kill,…] [--jobs stream,…]
"""

import argparse
import json
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from headrace.pipeline.errors import InputError

from .faults.disk import can_mount
from .faults.plan import IN_A_JOB, KINDS, ORDER, draw
from .faults.table import table
from .faults.trials import Trials
from .faults.workload import WORKLOADS
from .ranks import refuse
from .run_files import new_folder

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and play; ends with 1 if anything is lost."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)
    options = _parse(sys.argv[1:] if arguments is None else arguments)
    kinds = [kind for kind in KINDS if kind in options.kinds.split(",")]
    try:
        folder = new_folder(Path(options.folder).parent, Path(options.folder).name)
    except InputError as error:
        refuse(f"--folder: {error}")
    if "full" in kinds and (why := can_mount(folder / "disk")):
        print(f"no fault fills the disk: {why}", flush=True)
        kinds.remove("full")
    jobs = options.jobs.split(",")
    try:
        trials_to_play = [*draw(options.faults, options.seed, kinds, options.in_a_job, jobs)]
    except ValueError as error:
        refuse(f"--jobs and --kinds: {error}")
    trials = Trials(folder.absolute(), options.stages, lambda line: print(line, flush=True))
    begin = time.monotonic()
    try:
        for trial in trials_to_play:
            trials.play(trial)
    finally:
        seconds = time.monotonic() - begin
        text = table(trials.rows, trials.lost, seconds)
        rows = [row.numbers() for row in trials.rows]
        results = {"seed": options.seed, "stages": options.stages, "seconds": seconds}
        results |= {"faults": rows, "lost": trials.lost}
        (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        print(f"\n{text}\n{folder / 'results.json'}", flush=True)
    if trials.lost:
        print(f"seed {options.seed}:", *trials.lost, sep="\n  ", file=sys.stderr)
        raise SystemExit(1)
    for path in folder.iterdir():
        if path.is_dir() and not options.keep:
            shutil.rmtree(path)


def _leave(number: int, frame: FrameType | None) -> None:
    sys.stderr.write(f"headrace: stopped by {signal.Signals(number).name}\n")
    raise SystemExit(128 + number)  # jobs are ended and disks given back on the way


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m headrace.launch.chaos",
        description=(__doc__ or "").splitlines()[0],
    )
    parser.add_argument("--faults", type=int, default=100, help="to be survived (100)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (0)")
    parser.add_argument("--stages", type=int, default=3, help="of each job (3)")
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"of {', '.join(KINDS)} (all)")
    parser.add_argument(
        "--jobs", default=",".join(ORDER), help=f"in turn, of {', '.join(WORKLOADS)} (all)"
    )
    parser.add_argument(
        "--in-a-job", type=int, default=IN_A_JOB, help=f"at most so many faults ({IN_A_JOB})"
    )
    parser.add_argument("--folder", default="runs/chaos", help="to write into (runs/chaos)")
    parser.add_argument("--keep", action="store_true", help="keep the jobs' files")
    options = parser.parse_args(arguments)
    for name, least, most in (("faults", 1, None), ("stages", 2, None), ("in_a_job", 1, IN_A_JOB)):
        value = getattr(options, name)
        if value < least or (most is not None and value > most):
            upto = "" if most is None else f" and at most {most}"
            refuse(f"--{name.replace('_', '-')} {value}: give at least {least}{upto}")
    for name, known in (("kinds", [*KINDS]), ("jobs", [*WORKLOADS])):
        if unknown := [each for each in getattr(options, name).split(",") if each not in known]:
            refuse(f"--{name} {','.join(unknown)}: give some of {', '.join(known)}")
    return options


if __name__ == "__main__":
    main()
