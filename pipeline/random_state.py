"""The random state of a stage: captured, made, put in force for a while."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["RandomState"]


class RandomState:
    """The state of torch's generators: the CPU's, and the device's where it is a GPU."""

    def __init__(self, cpu: Tensor, cuda: Tensor | None, device: torch.device) -> None:
        self.cpu, self.cuda, self.device = cpu, cuda, device

    @classmethod
    def capture(cls, device: torch.device) -> "RandomState":
        """Note the state in force."""
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(torch.get_rng_state(), cuda, device)

    @classmethod
    def derive(cls, seed: int, stage: int, device: torch.device) -> "RandomState":
        """Make the state of a stage; other stages' are unlike it, every process's is the same."""
        number = (seed * 1_000_003 + stage) % 2**63
        cpu = torch.Generator().manual_seed(number).get_state()
        cuda = None
        if device.type == "cuda":
            cuda = torch.Generator(device).manual_seed(number).get_state()
        return cls(cpu, cuda, device)

    def state_dict(self) -> dict[str, Tensor | None]:
        """Both states."""
        return {"cpu": self.cpu, "cuda": self.cuda}

    def load_state_dict(self, state: Mapping[str, Tensor | None]) -> None:
        """Take other states on; a GPU keeps its own where none was kept of one."""
        assert state["cpu"] is not None
        self.cpu = state["cpu"].cpu()
        if self.cuda is not None and state["cuda"] is not None:
            self.cuda = state["cuda"].cpu()

    def restore(self) -> None:
        """Put this state in force."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)

    @property
    def is_in_force(self) -> bool:
        """Whether nothing was drawn since it was captured."""
        now = RandomState.capture(self.device)
        if self.cuda is not None and now.cuda is not None and not self.cuda.equal(now.cuda):
            return False
        return self.cpu.equal(now.cpu)

    def take_on(self) -> None:
        """Become the state in force, as it is now."""
        self.cpu = torch.get_rng_state()
        if self.cuda is not None:
            self.cuda = torch.cuda.get_rng_state(self.device)

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Run a block on this state, which moves on, and put the one before back."""
        outer = RandomState.capture(self.device)
        self.restore()
        try:
            yield
        finally:
            self.take_on()
            outer.restore()
