"""Print how a configuration's model would be cut into stages, without starting anything.

python -m headrace.launch.plan --config FILE [--dotted.key VALUE ...]
"""

import sys
from collections.abc import Sequence
from dataclasses import replace

import torch

from headrace.pipeline.feed import read
from headrace.pipeline.measure import measure
from headrace.pipeline.microbatch import split
from headrace.pipeline.partition import Partition, partition

from .assemble import (
    expected_staleness,
    make_loader,
    make_model,
    make_pipeline,
    make_replicas,
    make_settings,
    updates,
)
from .config import Config, parse
from .display import console, count, layers_table, partition_table, prospect, stale, title
from .ranks import refuse_error
from .stability import foresee
from .wording import engine_in_yaml

__all__ = ["main", "make_plan"]


@engine_in_yaml()
def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, measure every layer here, and print; ends with 2 if it cannot be."""
    try:
        config = parse(sys.argv[1:] if arguments is None else arguments)
        plan, staleness = make_plan(config)
    except (ValueError, TypeError) as error:
        refuse_error(error)
    out = console()
    out.print(title(config, count(len(plan.sizes), "stage")))
    out.print(layers_table(plan))
    out.print()
    out.print(partition_table(plan, staleness, stale(config)))
    out.print(prospect(plan))
    if stability := foresee(config, staleness):
        out.print(stability)


def make_plan(config: Config) -> tuple[Partition, tuple[float, ...]]:
    """The partition training would use, measured on one micro-batch, and each stage's staleness.

    Raises:
        ValueError, TypeError: the model cannot be cut so.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    options = config.pipeline
    make_replicas(options)  # refuse what cannot be
    if options.slack == "auto":  # what it begins with, before it has measured the links
        options = replace(options, slack=1)
    options = replace(options, replicas=None)  # each replica is cut alike
    config = replace(config, pipeline=options, stages=config.stages or 1)
    loader = make_loader(config, "data.train", config.data.train)
    model = make_model(config)
    # A pipeline of all stages in this process refuses what training would refuse.
    with make_pipeline(config, model, updates(config, loader)) as pipe:
        staleness = expected_staleness(config, pipe.depths)
    micro_batch = split(next(read(loader, pairs_only=True)), options.micro_batches)[0]
    assert isinstance(micro_batch, tuple)
    inputs, target = micro_batch
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    costs = measure(model, inputs, target, make_settings(config), device, config.seed)
    return partition(model, pipe.stages, options.balance, costs), staleness


if __name__ == "__main__":
    main()
