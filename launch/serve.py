"""Serve the weights of replicas that are jobs of their own: `pipeline.replicas` with an address.

torchrun --nproc-per-node STAGES -m headrace.launch.serve --config FILE [--dotted.key VALUE ...]

Each replica is then `torchrun --nproc-per-node STAGES -m headrace.launch.train --config FILE`, with
the same configuration; it may come late, and one that dies does not end the others.
"""

import signal
import sys
from collections.abc import Sequence

import torch

from headrace.pipeline.replicas.served import Served
from headrace.pipeline.replicas.serving import serve

from .assemble import (
    make_corrections,
    make_loader,
    make_model,
    make_replicas,
    make_scheduler,
    updates,
    uses_total,
)
from .components import build
from .config import Config, parse
from .display import bars
from .ranks import refuse_error, stop
from .wording import engine_in_yaml

__all__ = ["main"]


@engine_in_yaml()
def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and serve; ends the process with 2 where that cannot be done."""
    signal.signal(signal.SIGTERM, stop)
    try:
        config = parse(sys.argv[1:] if arguments is None else arguments)
        torch.set_num_threads(config.threads or 1)
        _serve(config)
    except (ValueError, TypeError) as error:
        refuse_error(error)


def _serve(config: Config) -> None:
    replicas = make_replicas(config.pipeline)
    if not isinstance(replicas, Served) or replicas.address is None or config.stages is None:
        raise ValueError(
            "launch.serve is for `stages`, and `pipeline.replicas` downpour or elastic with a "
            "`count` and an `address`, as in address: 127.0.0.1:29600"
        )
    statistics = serve(
        make_model(config),
        build("optimizer", config.optimizer),
        replicas,
        stages=config.stages,
        scheduler=make_scheduler(config.scheduler, _updates(config)),
        corrections=make_corrections(config.pipeline),
        seed=config.seed,
        timeout=config.pipeline.timeout,
        log=lambda line: print(line, flush=True),
    )
    sys.stdout.write(
        f"server of stage {statistics.stage}: {statistics.updates:,} updates, staleness "
        f"{statistics.staleness_mean:.2f} {bars(statistics.staleness)}, gradients by replica "
        f"{dict(sorted(statistics.pushed.items()))}\n"
    )
    sys.stdout.flush()


def _updates(config: Config) -> int | None:
    if not uses_total(config.scheduler):
        return None
    return updates(config, make_loader(config, "data.train", config.data.train))


if __name__ == "__main__":
    main()
