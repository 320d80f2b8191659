"""The whole profile: cut, contest, timelines, diagnosis, prediction; printed and written."""

import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from headrace.pipeline import Link
from headrace.pipeline.partition import Partition
from headrace.pipeline.schedule import SCHEDULES

from ..assemble import expected_staleness
from ..config import Config, to_yaml
from ..display import console, partition_table, title
from ..run_files import new_folder
from .contest import Entry, best, hold
from .table import comparison_table, rows_of, stages_table, write_csv, write_json
from .workload import Workload

__all__ = ["Options", "prepare", "profile"]


@dataclass(frozen=True)
class Options:
    """What the command line asks for; `headrace.launch.throughput --help` says more."""

    rows: Sequence[str]
    rounds: int
    steps: int
    micro_batches: Sequence[int]
    out: Path | None
    link: Link | None
    predicts: bool
    fixes: bool
    timeline: str
    torch_profiler: bool
    config_file: str | None


def prepare(config: Config, options: Options) -> tuple[Workload, Partition]:
    """Meet the other ranks, load the data, measure every layer, and cut.

    Raises:
        ValueError, TypeError: the configuration cannot be.
    """
    work = Workload.load(config, options.steps, options.link)
    return work, work.cut(work.measure(work.samples))


def profile(work: Workload, cut: Partition, options: Options) -> None:
    """Do all the rest, on every rank; the first one prints and writes."""
    config = work.config
    out, folder = console(), Path()
    if work.rank == 0:
        folder = options.out or new_folder(Path("runs"), f"{config.name}-throughput")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        _print_head(out, work, cut)

    def watch(entry: Entry, k: int) -> None:
        if work.rank == 0 and out.is_terminal:
            out.print(f"round {k + 1} of {options.rounds}: {entry.system}", end="\r")

    entries = hold(work, cut, options.rows, options.micro_batches, options.rounds, watch)
    if work.rank == 0:
        rows, chosen = rows_of(entries, {}), rows_of(best(entries), {})
        write_json(folder / "table.json", rows, _about(work, cut, options))
        write_csv(folder / "table.csv", rows, work.is_emulated)
        _print_tables(out, work, cut, chosen, rows)
        out.print(f"written to {folder}")


def _print_head(out: Console, work: Workload, cut: Partition) -> None:
    emulated = "EMULATED devices or links, " if work.is_emulated else ""
    out.print(title(work.config, f"{emulated}{work.ranks} ranks, {work.device.type}"))
    options = work.config.pipeline
    slack = 1 if options.slack == "auto" else options.slack
    depths = SCHEDULES[options.schedule].depths(work.ranks, slack)
    out.print(partition_table(cut, expected_staleness(work.config, depths)))
    out.print()


def _print_tables(
    out: Console,
    work: Workload,
    cut: Partition,
    chosen: list[dict[str, Any]],
    rows: list[dict[str, Any]],
) -> None:
    if work.is_emulated:
        out.print("EMULATED: layers that sleep, or links that wait; no device computes this fast")
    out.print(comparison_table(chosen))
    out.print()
    out.print(stages_table(chosen))
    out.print(f"\nthe cut allows {cut.speed_up / work.ranks:.3f} of the ceiling")
    for row in chosen:
        if row["not_run"]:
            out.print(f"not run: {row['system']}: {row['not_run']}")


def _about(work: Workload, cut: Partition, options: Options) -> dict[str, Any]:
    return {
        "name": work.config.name,
        "emulated": work.is_emulated,
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads a process",
        "torch": torch.__version__,
        "ranks": work.ranks,
        "device": work.device.type,
        "mini_batch": work.samples,
        "cut": cut.sizes,
        "cut_allows_of_ceiling": cut.speed_up / work.ranks,
        "rounds": options.rounds,
        "steps": options.steps,
        "link_latency_ms": None if options.link is None else options.link.latency * 1000,
    }
