"""What a run prints: the partition, a progress line, and one table at the end."""

import math
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from headrace.pipeline.partition import LayerCost, Partition

from .components import Component
from .config import Config

__all__ = [
    "ProgressLine",
    "amount",
    "bars",
    "console",
    "count",
    "duration",
    "layers_table",
    "partition_table",
    "per_stage",
    "print_table",
    "prospect",
    "results_table",
    "stale",
    "title",
]


def console() -> Console:
    """Standard output: as wide as the terminal, 100 columns where it is none."""
    width = None if sys.stdout.isatty() else 100
    return Console(width=width, highlight=False, markup=False, emoji=False)


def print_table(table: Table) -> None:
    """On standard output, in whole lines where that is no terminal."""
    out = console()
    if not sys.stdout.isatty():
        wanted = Measurement.get(out, out.options.update(max_width=400), table).maximum
        out.width = max(out.width, wanted)
    out.print(table)


def count(number: int, thing: str) -> str:
    """How many there are, in words: "1 stage", "2 stages", "1,000 stages"."""
    return f"{number:,} {thing}{'s' * (number != 1)}"


def title(config: Config, stages: str) -> Text:
    """The run in one line: "digits  2 stages, stream, delayed (weights: stash), seed 0"."""
    options = config.pipeline
    rule = options.rule or Component("delayed" if options.schedule == "stream" else "exact")
    how = " | ".join(map(_in_words, rule)) if isinstance(rule, list) else _in_words(rule)
    single = (options.batch_size, options.replicas)
    more = [*(each for each in single if each), *options.corrections]
    how = ", ".join([how, *map(_in_words, more)])
    words = f"  {stages}, {options.schedule}, {how}, seed {config.seed}\n"
    return Text.assemble((config.name, "bold"), words)


def stale(config: Config) -> str:
    """What the plan's staleness is called: where the batch grows, it falls."""
    return "stale at start" if config.pipeline.batch_size else "stale"


def _in_words(rule: Component) -> str:
    shown = [
        f"{name}: {value['class_path'] if isinstance(value, dict) else value}"
        for name, value in rule.init_args.items()
    ]
    return f"{rule.class_path} ({', '.join(shown)})" if shown else rule.class_path


# Numbers ------------------------------------------------------------------------------------


def amount(size: float) -> str:
    """Bytes, in the unit that fits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if size >= 10 or unit == "B" else f"{size:.1f} {unit}"


def _milliseconds(seconds: float) -> str:
    return "-" if math.isnan(seconds) else f"{seconds * 1e3:,.3f}"


def duration(seconds: float) -> str:
    """Hours, minutes, seconds: 1:02:03 or 2:03."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def _number(value: float) -> str:
    return f"{value:.0f}" if value == round(value) else f"{value:.2f}"


def per_stage(values: Sequence[float]) -> str:
    """The values of all stages, or of the first and the last two of many."""
    shown = [_number(value) for value in values]
    return " ".join(shown if len(shown) <= 8 else [*shown[:3], "…", *shown[-2:]])


def bars(counts: Mapping[int, int], most: int = 16) -> str:
    """A histogram in a line: the least value, a bar for each value or for as many, the largest."""
    if not counts:
        return "(none)"
    least, largest = min(counts), max(counts)
    width = max(1, math.ceil((largest - least + 1) / most))
    heights = [0] * math.ceil((largest - least + 1) / width)
    for value, count in counts.items():
        heights[(value - least) // width] += count
    top = max(heights)
    drawn = "".join(" ▁▂▃▄▅▆▇█"[math.ceil(8 * height / top)] for height in heights)
    return f"({least} {drawn} {largest})"


# Tables -------------------------------------------------------------------------------------


def _table(*headers: str) -> Table:
    """Columns of numbers, and one of words, which alone gives way in a narrow terminal."""
    table = Table(
        box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, header_style="bold"
    )
    for header in headers:
        words = header.startswith("layer")
        table.add_column(header, justify="left" if words else "right", no_wrap=not words)
    return table


def _share(part: float, whole: float) -> str:
    return "-" if math.isnan(whole) else f"{part / whole:.0%}"


def _kinds(layers: Sequence[LayerCost]) -> str:
    """What the layers are: "Flatten, 2×Linear, 2×ReLU"."""
    counted = Counter(layer.kind for layer in layers)
    return ", ".join(f"{n}×{kind}" if n > 1 else kind for kind, n in counted.items())


def layers_table(partition: Partition) -> Table:
    """A row a layer: what it is and what it costs, a gap after each stage."""
    table = _table("stage", "layer", "parameters", "output", "fwd", "bwd", "update", "share")
    work = sum(partition.costs)
    for j, layers in enumerate(partition.stages):
        for layer in layers:
            table.add_row(
                str(j) if layer is layers[0] else "",
                f"{layer.name}  {layer.kind}",
                f"{layer.parameters:,}",
                amount(layer.activation_bytes),
                _milliseconds(layer.forward),
                _milliseconds(layer.backward),
                _milliseconds(layer.update),
                _share(layer.total, work),
            )
    return table


def partition_table(
    partition: Partition, staleness: Sequence[float], named: str = "stale"
) -> Table:
    """A row a stage: what it holds, what it costs, and how late its gradients will be.

    Args:
        named: what the staleness is called.
    """
    table = _table(
        "stage", "layers", "parameters", "output", "fwd", "bwd", "update", "share", named,
    )  # fmt: skip
    work = sum(partition.costs)
    for j, layers in enumerate(partition.stages):
        first, last = layers[0].name, layers[-1].name
        names = first if first == last else f"{first} to {last}"
        table.add_row(
            str(j),
            f"{names}  {_kinds(layers)}",
            f"{sum(layer.parameters for layer in layers):,}",
            amount(layers[-1].activation_bytes),
            _milliseconds(sum(layer.forward for layer in layers)),
            _milliseconds(sum(layer.backward for layer in layers)),
            _milliseconds(sum(layer.update for layer in layers)),
            _share(partition.costs[j], work),
            _number(staleness[j]),
        )
    return table


def prospect(partition: Partition) -> str:
    """What the cut can gain, and whether one layer alone stands in its way; empty if unknown."""
    stages, work = len(partition.sizes), sum(partition.costs)
    if math.isnan(work):
        return ""
    text = "forward, backward and update in ms for one micro-batch"
    if stages > 1:
        text += f";\npredicted speed-up over one device: {partition.speed_up:.2f}x"
    largest = max(partition.layers, key=lambda layer: layer.total)
    if largest.total * stages > work and stages > 1:
        text += (
            f"\nlayer {largest.name} alone is {largest.total / work:.0%} of the work:"
            f" no cut by layers can exceed {work / largest.total:.2f}x"
        )
    return text


def results_table(
    rows: Mapping[str, str], stages: Mapping[str, Sequence[str]], last: Mapping[str, str]
) -> Table:
    """Names and values; between them, rows of a value for each stage, in columns.

    Of more stages than fit, the first and the last are shown: summary.json has them all.
    """
    table = Table.grid(padding=(0, 3))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    width = max(len(value) for values in stages.values() for value in values)
    for name, values in stages.items():
        shown = [value.rjust(width) for value in values]
        shown = shown if len(shown) <= 8 else [*shown[:4], "…", *shown[-3:]]
        table.add_row(name, "  ".join(shown))
    for name, value in last.items():
        table.add_row(name, value)
    return table


# Progress -----------------------------------------------------------------------------------


class ProgressLine:
    """One line that is rewritten on a terminal; elsewhere lines at growing intervals.

    Args:
        out: where to print.
        epochs: in the run.
        samples: in the run; None where the data does not say how many it has.
    """

    def __init__(self, out: Console, epochs: int, samples: int | None) -> None:
        self._out, self._epochs, self._samples = out, epochs, samples
        self._printed = time.monotonic()
        self._first: tuple[float, int] | None = None
        self._bar = Progress(
            TextColumn("{task.fields[before]}"),
            BarColumn(20, complete_style="cyan"),
            TextColumn("{task.fields[after]}"),
            console=out,
            auto_refresh=False,
            transient=True,
        )
        self._task = self._bar.add_task("", total=samples, before="waiting for data", after="")
        if out.is_terminal:
            self._bar.start()
            out.show_cursor(True)  # nobody would bring it back if the process were killed

    def close(self) -> None:
        """Take the line away."""
        if self._out.is_terminal:
            self._bar.stop()

    def update(
        self,
        epoch: int,
        done: int,
        rate: float,
        loss: float,
        staleness: Sequence[float],
        cosine: Sequence[float | None] = (),
    ) -> None:
        """Show how far the run is, unless something was shown just now.

        Args:
            epoch: from 1.
            done: samples of the run so far.
            rate: samples per second.
            staleness, cosine: of each stage; cosines are shown instead where there are any.
        """
        now = time.monotonic()
        if self._first is None:  # what came before it was the start, and says nothing of the rest
            self._first = (now, done)
        interval = 0.1 if self._out.is_terminal else max(3.0, 0.15 * (now - self._first[0]))
        if now - self._printed < interval or done == self._first[1]:
            return
        self._printed = now
        before = f"epoch {epoch:>{len(str(self._epochs))}}/{self._epochs}"
        after = f"{rate:>9,.0f} samples/s   loss {loss:<7.4g}  "
        known = [value for value in cosine if value is not None]
        after += f"cosine {per_stage(known)}" if known else f"staleness {per_stage(staleness)}"
        if self._samples:
            pace = (now - self._first[0]) / (done - self._first[1])
            before += f"  {min(done / self._samples, 1.0):4.0%}"
            after += f"   {duration(pace * max(self._samples - done, 0))} left"
        if self._out.is_terminal:
            self._bar.update(self._task, completed=done, before=before, after=after, refresh=True)
        else:
            self._out.print(before + after)
