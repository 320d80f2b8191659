"""What a slow cable between two hosts costs a micro-batch: the table in docs/several-hosts.md.

On Linux, as root: python -m tests.distributed.slow_links [milliseconds one way]
"""

import pickle
import sys
import tempfile
from pathlib import Path

import torch

from .across import Slack, measure_paces
from .hosts import far_apart

__all__: list[str] = []

PAYLOADS = {"small tensors": (4, 4), "64 KiB and targets of 64 KiB": (256, 64)}
"""Width and samples of a mini-batch; the small ones travel in the frame."""


def main(delay_ms: float, slacks: list[Slack], batches: int = 100) -> None:
    """Print the table's row for each payload."""
    for name, (width, samples) in PAYLOADS.items():
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            arguments = pickle.dumps((width, samples, slacks, batches))
            (folder / "arguments").write_bytes(arguments)
            program = f"{measure_paces.__module__}:{measure_paces.__name__}"
            job = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
            with far_apart(delay_ms / 1000, folder) as network:
                job |= {"MASTER_ADDR": network.hosts[0].name, "MASTER_PORT": "29400"}
                command = [sys.executable, "-m", "tests.distributed.play", program]
                processes = [
                    host.start(command, folder, {**job, "RANK": str(rank)})
                    for rank, host in enumerate(network.hosts)
                ]
                for process in processes:
                    out, err = process.communicate()
                    if process.returncode:
                        sys.exit(out + err)
            rows = torch.load(folder / "result0", weights_only=False)
            cells = [
                f"slack {s}: {1000 * pace:.1f} (depth {d})"
                for s, (pace, d) in zip(slacks, rows, strict=True)
            ]
            print(f"{delay_ms:g} ms, {name}:", *cells, sep="  ", flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]) if sys.argv[1:] else 10.0, [0, 1, 8, "auto"])
