"""What a profile found: printed for people, and written as files."""

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

from headrace.pipeline.partition import Partition
from headrace.pipeline.schedule import SCHEDULES
from headrace.pipeline.timeline import Work, chrome_trace

from ..assemble import expected_staleness, make_rules
from ..data.checks import import_extra
from ..display import partition_table, title
from ..run_files import for_json
from .contest import Entry, best
from .costs import Costs
from .diagnosis import Diagnosis, Evidence, diagnose
from .fix import write_fixed
from .observe import Observation, excerpt
from .options import Options
from .pictures import draw_bandwidth, draw_speed_up, draw_timelines
from .prediction import by_bandwidth, by_stages, predict, winners
from .systems import observed
from .table import (
    comparison_table,
    curves_table,
    rows_of,
    stages_table,
    time_table,
    write_csv,
    write_json,
)
from .text import timelines_text
from .workload import Workload

__all__ = ["Results", "check_extras", "tell", "tell_plan"]


@dataclass(frozen=True)
class Results:
    """All that was measured.

    Args:
        cut: its layers' costs are those of a micro-batch of the stream.
        folder: where the files go.
        costs: None if nothing is to be predicted.
    """

    work: Workload
    cut: Partition
    options: Options
    folder: Path
    entries: Sequence[Entry]
    seen: Observation
    costs: Costs | None

    @property
    def predicted(self) -> dict[tuple[str, int | None], float]:
        """Samples a second, by (system, micro-batches)."""
        if self.costs is None:
            return {}
        options = self.work.config.pipeline
        return predict(self.costs, self.entries, options.micro_batches, options.update_every)

    @property
    def subtitle(self) -> str:
        """What pictures are about."""
        work = self.work
        emulated = "EMULATED devices or links: " if work.is_emulated else ""
        return (
            f"{emulated}{work.config.name}, mini-batch {work.samples}, {work.ranks} ranks, "
            f"{work.device.type}"
        )


def check_extras(options: Options) -> None:
    """Find out before the measuring whether what it is for can be made.

    Raises:
        ImportError: a package is missing.
    """
    if options.predicts or options.timeline == "picture":
        import_extra("matplotlib", extra="profile", user="drawing")
    if options.fixes is not None:
        import_extra("ruamel.yaml", extra="profile", user="--fix")


def tell_plan(work: Workload, cut: Partition, out: Console) -> None:
    """Print what will be measured."""
    emulated = "EMULATED devices or links, " if work.is_emulated else ""
    out.print(title(work.config, f"{emulated}{work.ranks} ranks, {work.device.type}"))
    options = work.config.pipeline
    slack = 1 if options.slack == "auto" else options.slack
    rules = make_rules(options)
    each = rules if isinstance(rules, list) else [rules] * work.ranks
    waits = [rule is None or rule.ahead is None for rule in each]
    depths = SCHEDULES[options.schedule].depths(work.ranks, slack, waits)
    out.print(partition_table(cut, expected_staleness(work.config, depths)))
    out.print()


def tell(found: Results, out: Console) -> None:
    """Print and write it all."""
    rows, chosen = (rows_of(e, found.predicted) for e in (found.entries, best(found.entries)))
    diagnosis = diagnose(_evidence(found))
    write_json(found.folder / "table.json", rows, _about(found, diagnosis))
    write_csv(found.folder / "table.csv", rows, found.work.is_emulated)
    _tell_tables(found, chosen, out)
    _tell_diagnosis(found, diagnosis, out)
    if found.options.timeline != "none":
        _show_timelines(found, out)
    if found.costs is not None:
        _show_prediction(found, found.costs, chosen, out)
    names = sorted(path.name for path in found.folder.iterdir())
    out.print(f"\nwritten to {found.folder}: {', '.join(names)}")


def _evidence(found: Results) -> Evidence:
    rates = {entry.system: entry.rate for entry in found.entries}
    config, seen = found.work.config, found.seen
    options = config.pipeline
    streams = options.schedule == "stream"
    return Evidence(
        partition=found.cut,
        links=seen.links,
        schedule=options.schedule,
        slack=seen.slack,
        micro_batches=options.micro_batches,
        update_every=options.update_every,
        workers=config.data.workers,
        autocast=options.autocast is not None,
        busy=seen.busy if streams else [math.nan] * len(seen.busy),
        data=seen.data,
        samples_per_second=rates.get(observed(found.options.rows), math.nan),
        ceiling=rates.get("ceiling", math.nan),
        learning=[
            seen.stream.timeline.share(j, Work.LEARN) if streams else 0.0
            for j in range(len(seen.busy))
        ],
    )


def _tell_tables(found: Results, chosen: list[dict[str, Any]], out: Console) -> None:
    if found.work.is_emulated:
        out.print("EMULATED: layers that sleep, or links that wait")
    stream = found.seen.stream
    for table in (
        comparison_table(chosen),
        stages_table(chosen),
        time_table(stream.timeline, stream.mini_batches),
    ):
        out.print(table)
        out.print()
    allows = found.cut.speed_up / found.work.ranks
    out.print(f"m: the best number of micro-batches; the cut allows {allows:.3f} of the ceiling")
    for row in chosen:
        if row["system"].startswith("stream:") and row["of_ceiling"]:
            out.print(f"{row['system']} reaches {row['of_ceiling'] / allows:.3f} of that")
    for row in chosen:
        if row["not_run"]:
            out.print(f"not run: {row['system']}: {row['not_run']}")


def _tell_diagnosis(found: Results, diagnosis: Diagnosis, out: Console) -> None:
    out.print("\ndiagnosis")
    for line in diagnosis.lines:
        out.print(Padding(f"- {line}", (0, 0, 0, 2)))
    source = found.options.fixes
    if source is not None and not diagnosis.fixes:
        out.print("--fix: nothing to change")
    elif source is not None:
        target = found.folder / f"{source.stem}-fixed.yaml"
        write_fixed(source, {**found.options.overrides, **diagnosis.fixes}, target)
        out.print(f"--fix: {target}")


def _show_timelines(found: Results, out: Console) -> None:
    recorded = found.seen.recorded
    trace = json.dumps(chrome_trace({each.name: each.timeline for each in recorded}))
    (found.folder / "timeline.json").write_text(trace, encoding="utf-8")
    shown = excerpt(recorded)
    if found.options.timeline == "text":
        out.print(f"\n{timelines_text(shown)}")
    else:
        draw_timelines(shown, found.folder / "timeline", found.subtitle)


def _show_prediction(
    found: Results, costs: Costs, chosen: list[dict[str, Any]], out: Console
) -> None:
    stages, links = by_stages(costs), by_bandwidth(costs)
    where = winners(links)
    dots = {
        row["system"]: (float(found.work.ranks), row["over_one_device"])
        for row in chosen
        if row["system"] in ("stream:stash", "1f1b", "gpipe") and row["over_one_device"]
    }
    draw_speed_up(stages, dots, found.folder / "speed-up", found.subtitle)
    draw_bandwidth(links, where, found.folder / "bandwidth", found.subtitle)
    content = {
        "emulated": found.work.is_emulated,
        "speed_up_by_stages": [asdict(curve) for curve in stages],
        "samples_per_second_by_bandwidth": [asdict(curve) for curve in links],
        "fastest": [{"system": n, "from": a, "to": b} for n, a, b in where],
    }
    text = json.dumps(content, indent=2)
    (found.folder / "prediction.json").write_text(text + "\n", encoding="utf-8")
    out.print("\npredicted speed-up over one device, of a network that grows with the stages")
    if found.seen.stream.name != "stream":
        out.print("(under delayed gradients: what synthesizers or heads take is not in it)")
    out.print(curves_table(stages))
    for name, a, b in where:
        out.print(f"{name} is the fastest with links of {_bits(a)} to {_bits(b)}")


def _bits(bandwidth: float) -> str:
    bits = 8 * bandwidth
    return f"{bits / 1e9:,.4g} Gbit/s" if bits >= 1e9 else f"{bits / 1e6:.0f} Mbit/s"


def _about(found: Results, diagnosis: Diagnosis) -> dict[str, Any]:
    work, cut, options, seen = found.work, found.cut, found.options, found.seen
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
        "steps": len(work.batches),
        "link_latency_ms": None if options.link is None else options.link.latency * 1000,
        "links": [for_json(asdict(link)) for link in seen.links],
        "slack": seen.slack,
        "diagnosis": diagnosis.lines,
        "fixes": diagnosis.fixes,
    }
