"""The whole profile: cut, contest, timelines, diagnosis, prediction; printed and written."""

import json
import math
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.padding import Padding

from headrace.pipeline import Link
from headrace.pipeline.partition import LayerCost, Partition
from headrace.pipeline.schedule import SCHEDULES
from headrace.pipeline.timeline import chrome_trace

from ..assemble import expected_staleness
from ..config import Config, find_file, to_yaml
from ..display import console, partition_table, title
from ..run_files import new_folder
from .contest import Entry, best, hold
from .diagnosis import Diagnosis, Evidence, diagnose
from .fix import write_fixed
from .observe import RECORDED, Observation, excerpt, observe, trace_kernels
from .pictures import draw_bandwidth, draw_speed_up, draw_timelines
from .prediction import Costs, by_bandwidth, by_stages, predict, winners
from .table import (
    comparison_table,
    curves_table,
    rows_of,
    stages_table,
    write_csv,
    write_json,
)
from .text import timelines_text
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
    out, folder = console(), _folder(work, options)
    if work.rank == 0:
        _print_head(out, work, cut)

    def watch(entry: Entry, k: int) -> None:
        if work.rank == 0 and out.is_terminal:
            out.print(f"round {k + 1} of {options.rounds}: {entry.system:30}", end="\r")

    entries = hold(work, cut, options.rows, options.micro_batches, options.rounds, watch)
    flushing = [m for m in options.micro_batches if m <= work.samples]
    parts = _best_parts(entries) or (flushing[0] if flushing else 0)
    weights = _weights(options.rows)
    seen = observe(work, cut, weights, parts)
    small = work.measure(max(1, work.samples // 16)) if options.predicts else None
    if options.torch_profiler:
        trace_kernels(work, cut, weights, folder / f"torch-profiler-rank{work.rank}.json")
    if work.rank:
        return
    costs = None if small is None else _costs(work, cut, small, seen)
    rows = rows_of(entries, {} if costs is None else predict(costs, entries))
    chosen = rows_of(best(entries), {} if costs is None else predict(costs, entries))
    diagnosis = diagnose(_evidence(work, cut, seen, entries, weights))
    about = _about(work, cut, options) | {
        "links": [{"latency": k.latency, "bandwidth": k.bandwidth} for k in seen.links],
        "diagnosis": diagnosis.lines,
        "fixes": diagnosis.fixes,
    }
    write_json(folder / "table.json", rows, about)
    write_csv(folder / "table.csv", rows, work.is_emulated)
    _print_tables(out, work, cut, chosen)
    _print_diagnosis(out, diagnosis, options, folder)
    if options.timeline != "none":
        _show_timelines(out, work, seen, folder, options.timeline == "text", parts)
    if costs is not None:
        _show_prediction(out, work, costs, chosen, folder)
    out.print(f"\nwritten to {folder}: {', '.join(sorted(p.name for p in folder.iterdir()))}")


def _folder(work: Workload, options: Options) -> Path:
    """Where the results go, the same on every rank."""
    folder = options.out or Path()
    if work.rank == 0:
        if options.out is None:
            folder = new_folder(Path("runs"), f"{work.config.name}-throughput")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(to_yaml(work.config), encoding="utf-8")
    return Path(work.gather(str(folder))[0])


def _best_parts(entries: Sequence[Entry]) -> int | None:
    """The number of micro-batches at which our 1F1B was the fastest, if it ran."""
    own = [e for e in entries if e.system == "1f1b" and e.rates]
    return max(own, key=lambda e: e.rate).micro_batches if own else None


def _weights(rows: Sequence[str]) -> str:
    """The policy to look at: that of the first stream row."""
    streams = [row.partition(":")[2] for row in rows if row.startswith("stream:")]
    return streams[0].partition("+")[0] if streams else "stash"


def _costs(work: Workload, cut: Partition, small: Sequence[LayerCost], seen: Observation) -> Costs:
    size = sum(p.numel() * p.element_size() for p in work.model().parameters())
    few = max(1, work.samples // 16)
    return Costs(work.samples, cut, few, tuple(small), float(size), tuple(seen.links))


def _evidence(
    work: Workload, cut: Partition, seen: Observation, entries: Sequence[Entry], weights: str
) -> Evidence:
    rates = {entry.system: entry.rate for entry in entries}
    options = work.config.pipeline
    return Evidence(
        partition=cut,
        links=seen.links,
        schedule=options.schedule,
        slack=seen.slack,
        micro_batches=options.micro_batches,
        busy=seen.busy,
        bubble=seen.bubble,
        data=seen.data,
        samples_per_second=rates.get(f"stream:{weights}", math.nan),
        ceiling=rates.get("ceiling", math.nan),
    )


def _print_head(out: Console, work: Workload, cut: Partition) -> None:
    emulated = "EMULATED devices or links, " if work.is_emulated else ""
    out.print(title(work.config, f"{emulated}{work.ranks} ranks, {work.device.type}"))
    options = work.config.pipeline
    slack = 1 if options.slack == "auto" else options.slack
    depths = SCHEDULES[options.schedule].depths(work.ranks, slack)
    out.print(partition_table(cut, expected_staleness(work.config, depths)))
    out.print()


def _print_tables(
    out: Console, work: Workload, cut: Partition, chosen: list[dict[str, Any]]
) -> None:
    if work.is_emulated:
        out.print("EMULATED: layers that sleep, or links that wait")
    out.print(comparison_table(chosen))
    out.print()
    out.print(stages_table(chosen))
    allows = cut.speed_up / work.ranks
    out.print(f"\nm: the best number of micro-batches; the cut allows {allows:.3f} of the ceiling")
    for row in chosen:
        if row["system"] == "stream:stash" and row["of_ceiling"]:
            out.print(f"stream:stash reaches {row['of_ceiling'] / allows:.3f} of that")
    for row in chosen:
        if row["not_run"]:
            out.print(f"not run: {row['system']}: {row['not_run']}")


def _print_diagnosis(out: Console, found: Diagnosis, options: Options, folder: Path) -> None:
    out.print("\ndiagnosis")
    for line in found.lines:
        out.print(Padding(f"- {line}", (0, 0, 0, 2)))
    if options.fixes and options.config_file is None:
        out.print("--fix: there is no --config FILE to copy")
    elif options.fixes and not found.fixes:
        out.print("--fix: nothing to change")
    elif options.fixes:
        source = find_file(str(options.config_file))
        target = folder / f"{source.stem}-fixed.yaml"
        write_fixed(source, found.fixes, target)
        out.print(f"--fix: {target}")


def _show_timelines(
    out: Console, work: Workload, seen: Observation, folder: Path, text: bool, parts: int
) -> None:
    trace = folder / "timeline.json"
    trace.write_text(json.dumps(chrome_trace(seen.timelines)), encoding="utf-8")
    parts_of = [RECORDED, RECORDED // 2][: len(seen.timelines)]
    shown = excerpt(seen.timelines, parts_of)
    if text:
        out.print(f"\n{timelines_text(shown)}")
    else:
        draw_timelines(shown, folder / "timeline", _subtitle(work))


def _show_prediction(
    out: Console, work: Workload, costs: Costs, chosen: list[dict[str, Any]], folder: Path
) -> None:
    stages, links = by_stages(costs), by_bandwidth(costs)
    where = winners(links)
    dots = {
        row["system"]: (float(work.ranks), row["over_one_device"])
        for row in chosen
        if row["system"] in ("stream:stash", "1f1b", "gpipe") and row["over_one_device"]
    }
    draw_speed_up(stages, dots, folder / "speed-up", _subtitle(work))
    draw_bandwidth(links, where, folder / "bandwidth", _subtitle(work))
    text = json.dumps(
        {
            "emulated": work.is_emulated,
            "speed_up_by_stages": [asdict(curve) for curve in stages],
            "samples_per_second_by_bandwidth": [asdict(curve) for curve in links],
            "fastest": [{"system": n, "from": a, "to": b} for n, a, b in where],
        },
        indent=2,
    )
    (folder / "prediction.json").write_text(text + "\n", encoding="utf-8")
    out.print("\npredicted speed-up over one device, of a network that grows with the stages")
    out.print(curves_table(stages))
    for name, a, b in where:
        out.print(f"{name} is the fastest with links of {_bits(a)} to {_bits(b)}")


def _bits(bandwidth: float) -> str:
    bits = 8 * bandwidth
    return f"{bits / 1e9:.3g} Gbit/s" if bits >= 1e9 else f"{bits / 1e6:.0f} Mbit/s"


def _subtitle(work: Workload) -> str:
    emulated = "EMULATED devices or links: " if work.is_emulated else ""
    return (
        f"{emulated}{work.config.name}, mini-batch {work.samples}, {work.ranks} ranks, "
        f"{work.device.type}"
    )


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
