"""Do the whole profile, on all ranks: cut, contest, timelines, links; then the first rank tells."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from headrace.pipeline.partition import LayerCost, Partition, check_model

from ..config import Config, to_yaml
from ..display import console
from ..run_files import new_folder
from .contest import Entry, hold
from .costs import Costs, beside_the_layers, measure_layers, typical
from .observe import Observation, observe, trace_kernels
from .options import Options
from .prediction import COPIES
from .report import Results, check_extras, tell, tell_plan
from .systems import observed
from .workload import Workload

__all__ = ["prepare", "profile"]


def prepare(config: Config, options: Options) -> tuple[Workload, Partition]:
    """Meet the other ranks, load the data, measure every layer, and cut.

    Raises:
        ValueError, TypeError: the configuration cannot be.
        ImportError: a package is missing that drawing, or `--fix`, needs.
    """
    check_extras(options)
    work = Workload.load(config, options.link)
    check_model(work.model(), work.ranks)
    cut = work.cut(measure_layers(work, _sizes(work, options)[0]))
    return work.of_steps(options.steps or work.steps_of_a_second(cut)), cut


def profile(work: Workload, cut: Partition, options: Options) -> None:
    """Do all the rest, on every rank; the first one prints and writes."""
    out, folder = console(), _folder(work, options)
    if work.rank == 0:
        tell_plan(work, cut, out)

    def watch(entry: Entry, k: int) -> None:
        if work.rank == 0 and out.is_terminal:
            out.print(f"round {k + 1} of {options.rounds}: {entry.system:30}", end="\r")

    measured: dict[int, list[tuple[LayerCost, ...]]] = {s: [] for s in _sizes(work, options)}

    def measure() -> None:
        for samples, costs in measured.items():
            costs.append(measure_layers(work, samples))

    rows, counts = options.rows, options.micro_batches
    entries = hold(work, cut, rows, counts, options.rounds, watch, measure)
    layers = {samples: typical(costs) for samples, costs in measured.items()}
    parts = _best_parts(entries) or next((m for m in counts if m <= work.samples), 0)
    row = observed(rows)
    seen = observe(work, cut, row, parts)
    if options.torch_profiler:
        trace_kernels(work, cut, row, folder / f"torch-profiler-rank{work.rank}.json")
        work.barrier()
    if work.rank == 0:
        costs = _costs(work, cut, layers, seen, row) if options.predicts else None
        cut = replace(cut, layers=next(iter(layers.values())))
        tell(Results(work, cut, options, folder, entries, seen, costs), out)


def _sizes(work: Workload, options: Options) -> list[int]:
    """The numbers of samples that layers are measured with: first a micro-batch of the stream."""
    micro_batch = max(1, work.samples // work.config.pipeline.micro_batches)
    others = (work.samples, max(1, work.samples // 16)) if options.predicts else ()
    return list(dict.fromkeys((micro_batch, *others)))


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


def _costs(
    work: Workload,
    cut: Partition,
    layers: dict[int, tuple[LayerCost, ...]],
    seen: Observation,
    row: str,
) -> Costs:
    few = max(1, work.samples // 16)
    costs = Costs(
        samples=work.samples,
        cut=replace(cut, layers=layers[work.samples]),
        few=few,
        small=layers[few],
        parameter_bytes=float(sum(p.nbytes for p in work.model().parameters())),
        links=tuple(seen.links),
        passes=seen.passes,
    )
    stream, flush = seen.stream, seen.flush
    every = work.config.pipeline.update_every
    works = costs.streamed(stream.parts, every, COPIES.get(row, 0))
    costs = replace(
        costs, streaming=beside_the_layers(stream.timeline, stream.micro_batches, works, every)
    )
    if flush is not None:
        works = costs.flushed(flush.parts)
        seconds = beside_the_layers(flush.timeline, flush.micro_batches, works, flush.parts)
        costs = replace(costs, in_flushes=seconds)
    return costs
