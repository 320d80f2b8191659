"""The first rank's account of a run: what it prints, and what it writes."""

import importlib.metadata
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headrace.pipeline import Pipeline, Report
from headrace.pipeline.checkpoints import Position
from headrace.pipeline.corrections import Auto
from headrace.pipeline.report import Progress, ShardStatistics, StageStatistics

from .assemble import expected_staleness, make_corrections
from .config import Config, to_yaml
from .display import (
    ProgressLine,
    bars,
    console,
    count,
    duration,
    partition_table,
    per_stage,
    prospect,
    results_table,
    stale,
    title,
)
from .ranks import processes
from .run_files import RunFiles
from .stability import look_ahead

__all__ = ["Journal"]


class Journal:
    """Prints the partition, a progress line and the results; writes the files of runs/NAME.

    Args:
        pipe: prepared, and where a checkpoint has brought it.
        samples: in an epoch; None where the data does not say.
        folder: of the run.
        weights: the whole model's, where stability is to be checked.
    """

    def __init__(
        self,
        config: Config,
        pipe: Pipeline,
        samples: int | None,
        folder: Path,
        weights: Mapping[str, Tensor] | None,
    ) -> None:
        assert pipe.partition is not None
        self._config, self._partition = config, pipe.partition
        done = pipe.notes.get("journal", {})
        begun = pipe.position
        self._files = RunFiles(folder, to_yaml(config), begun.samples, begun.epochs)
        self._out = console()
        where = " in one process" if processes() is None else ""
        self._replicas, self._replica = pipe.replicas, pipe.replica
        copies = f"{pipe.replicas} replicas of " if config.pipeline.replicas else ""
        self._out.print(title(config, f"{copies}{count(pipe.stages, 'stage')}{where}"))
        staleness = expected_staleness(config, pipe.depths)
        self._out.print(partition_table(pipe.partition, staleness, stale(config)))
        self._out.print(prospect(pipe.partition))
        chooses = any(isinstance(each, Auto) for each in make_corrections(config.pipeline))
        self._chosen = pipe.chosen if chooses else {}
        if self._chosen:
            self._out.print(_what_auto_chose(self._chosen))
        if stability := look_ahead(config, pipe, weights):
            self._out.print(stability)
        self._samples, self._micro_batches = done.get("samples", 0), done.get("micro_batches", 0)
        self._seconds, self._loss = done.get("seconds", 0.0), done.get("loss", math.nan)
        self._notes = pipe.notes
        self._notes["config"] = to_yaml(config)
        if pipe.position.total:
            self._out.print(_where(pipe.position, config.epochs))
        total = samples * config.epochs // pipe.replicas if samples is not None else None
        self._line = ProgressLine(self._out, config.epochs, total)

    def progress(self, epoch: int, progress: Progress) -> None:
        """At a log interval."""
        done = self._samples + progress.samples
        self._line.update(
            epoch,
            done,
            progress.samples_per_second,
            progress.loss,
            progress.staleness,
            progress.cosine,
        )
        values = {
            "epoch": epoch,
            "update": progress.update,
            "loss": progress.loss,
            "samples_per_second": progress.samples_per_second,
            "learning_rate": progress.learning_rate,
            "batch_size": progress.batch_size,
            "staleness": progress.staleness,
            "busy": progress.busy,
        }
        values |= _known(
            synthesizer_loss=progress.synthesizer_loss,
            cosine=progress.cosine,
            lag=progress.lag,
            local_loss=progress.local_loss,
        )
        self._files.log("progress", done, values)

    def epoch(self, epoch: int, report: Report) -> None:
        """At the end of an epoch."""
        self._samples += report.samples
        self._micro_batches += report.micro_batches
        self._seconds += report.seconds
        self._loss = report.loss
        # For a checkpoint, of which this start may not see the end.
        done = {"samples": self._samples, "micro_batches": self._micro_batches}
        self._notes["journal"] = done | _finite({"seconds": self._seconds, "loss": self._loss})
        values = {
            "epoch": epoch,
            "loss": report.loss,
            "samples": report.samples,
            "updates": report.updates,
            "skipped": report.skipped,
            "seconds": report.seconds,
            "samples_per_second": report.samples_per_second,
            "staleness": report.staleness,
        }
        self._files.log("epoch", self._samples, values)

    def finish(
        self,
        scores: Mapping[str, float],
        statistics: Sequence[StageStatistics],
        shards: Sequence[ShardStatistics],
        weights: Mapping[str, Tensor],
    ) -> None:
        """After the last epoch and the test: the summary, the weights, the table.

        Args:
            scores: of the test data; empty without any.
            statistics: of every replica's stages.
            shards: of the parameter servers, if there are any.
        """
        self._line.close()
        if scores:
            self._files.log("test", self._samples, scores)
        if shards:
            self._log_shards(shards)
        self._files.finish(self._summary(scores, statistics, shards), weights)
        self._out.print()
        self._out.print(self._results(scores, statistics, shards))

    def _log_shards(self, shards: Sequence[ShardStatistics]) -> None:
        values = {
            "updates": [shard.updates for shard in shards],
            "staleness": [shard.staleness_mean for shard in shards],
        }
        self._files.log("servers", self._samples, values)
        for shard in shards:
            counts, tag = dict(sorted(shard.staleness.items())), f"staleness of stage {shard.stage}"
            self._files.histogram(tag, self._samples, counts)

    def close(self) -> None:
        """Take the progress line away and close the files, however the run ends."""
        self._line.close()
        self._files.close()

    @property
    def _rate(self) -> float:
        return self._samples / self._seconds if self._seconds else math.nan

    def _results(
        self,
        scores: Mapping[str, float],
        statistics: Sequence[StageStatistics],
        shards: Sequence[ShardStatistics],
    ) -> Any:
        whose = f", replica {self._replica} of {self._replicas}" if self._replicas > 1 else ""
        rows = {f"test {name}": f"{value:.4f}" for name, value in scores.items() if name != "loss"}
        rows |= {"test loss": f"{scores['loss']:.4f}"} if scores else {}
        if math.isfinite(self._loss):
            rows["train loss"] = f"{self._loss:.4f}, mean of the last epoch{whose}"
        else:  # all of it was still in flight at its end, or skipped
            rows["train loss"] = f"-, as no finite loss came back in the last epoch{whose}"
        rate = f"{self._rate:,.0f}" if self._samples and self._seconds else "-"
        rows["samples/s"] = f"{rate}, trained for {duration(self._seconds)}{whose}"
        if skipped := sum(stage.skipped for stage in statistics):
            rows["skipped updates"] = str(skipped)
        many = self._replicas > 1
        names = [f"{s.replica}.{s.stage}" if many else f"{s.stage}" for s in statistics]
        stages = {
            "replica.stage" if many else "stage": names,
            # Under servers, the pipeline's part of it alone; theirs follows.
            "own delay" if shards else "staleness": [
                f"{stage.staleness_mean:.2f}" for stage in statistics
            ],
            "busy": ["-" if math.isnan(s.busy) else f"{s.busy:.0%}" for s in statistics],
        }
        for name, digits, column in (
            ("lag", ".1f", [stage.lag_mean for stage in statistics]),
            ("cosine", ".2f", [stage.cosine for stage in statistics]),
            ("synthesizer loss", ".2g", [stage.synthesizer_loss for stage in statistics]),
            ("local loss", ".3g", [stage.local_loss for stage in statistics]),
        ):
            if any(value is not None for value in column):
                stages[name] = ["-" if v is None else format(v, digits) for v in column]
        last = {
            f"server of stage {shard.stage}": (
                f"{shard.updates:,} updates, staleness {shard.staleness_mean:.2f} "
                f"{bars(shard.staleness)}"
            )
            for shard in shards
        }
        return results_table(rows, stages, last | {"files": str(self._files.folder)})

    def _summary(
        self,
        scores: Mapping[str, float],
        statistics: Sequence[StageStatistics],
        shards: Sequence[ShardStatistics],
    ) -> dict[str, Any]:
        cut = self._partition.stages
        stages = [
            {
                "replica": stage.replica,
                "stage": stage.stage,
                "layers": [layer.name for layer in cut[stage.stage]],
                "parameters": sum(layer.parameters for layer in cut[stage.stage]),
                "updates": stage.updates,
                "skipped": stage.skipped,
                "staleness_mean": stage.staleness_mean,
                "staleness_max": stage.staleness_max,
                "busy": stage.busy,
                "learning_rate": stage.learning_rate,
            }
            | _known(
                lag_mean=stage.lag_mean,
                synthesizer_loss=stage.synthesizer_loss,
                cosine=stage.cosine,
                local_loss=stage.local_loss,
            )
            for stage in statistics
        ]
        servers = [
            {
                "stage": shard.stage,
                "updates": shard.updates,
                "staleness_mean": shard.staleness_mean,
                "staleness": shard.staleness,
                "pushed": shard.pushed,
            }
            for shard in shards
        ]
        return {
            "name": self._config.name,
            "seed": self._config.seed,
            "epochs": self._config.epochs,
            "samples": self._samples,
            "micro_batches": self._micro_batches,
            "seconds": self._seconds,
            "samples_per_second": self._rate,
            "train": {"loss": self._loss},
            "test": dict(scores),
            "stages": stages,
            **({"auto": self._chosen} if self._chosen else {}),
            **({"servers": servers} if servers else {}),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "headrace": _version(),
            },
        }


def _what_auto_chose(chosen: Mapping[int, Sequence[str]]) -> str:
    """As in "auto chose gap_aware, spike_compensation at stage 0, nothing at stage 1"."""
    stages: dict[str, list[int]] = {}
    for stage, names in chosen.items():
        stages.setdefault(", ".join(names) or "nothing", []).append(stage)
    each = [f"{names} at stage {per_stage(where)}" for names, where in stages.items()]
    return f"auto chose {', '.join(each)}"


def _where(position: Position, epochs: int) -> str:
    if position.epochs >= epochs:
        done = "its epoch is" if epochs == 1 else f"its {epochs} epochs are"
        return f"{done} done, after {position.samples:,} samples: nothing is left to train"
    within = f", mini-batch {position.mini_batches:,}" if position.mini_batches else ""
    return f"goes on in epoch {position.epochs + 1}{within}, after {position.samples:,} samples"


def _finite(numbers: Mapping[str, float]) -> dict[str, float]:
    return {name: number for name, number in numbers.items() if math.isfinite(number)}


def _known(**values: Any) -> dict[str, Any]:
    """Those that are there: of all stages, or of one."""
    return {
        name: value
        for name, value in values.items()
        if (any(v is not None for v in value) if isinstance(value, tuple) else value is not None)
    }


def _version() -> str | None:
    try:
        return importlib.metadata.version("headrace")
    except importlib.metadata.PackageNotFoundError:
        return None
