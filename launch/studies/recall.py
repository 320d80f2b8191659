"""Synthetic gradients for a recurrent network: it learns what lies beyond its window.

A GRU reads random symbols and must say the one it saw `delay` steps ago. Truncated
back-propagation through time, a window of T steps at a time, cannot teach it to keep a symbol over
the border of two windows. A synthesizer M can: it guesses, from the state at the border, the
gradient that the windows to come would send back (Jaderberg et al. 2017).

python -m headrace.launch.studies.recall [--delay 4] [--window 4] [--segments 4000] [--seed 0]

It is the synthesizer of the pipeline's stages (`headrace.pipeline.teachable`), in a plain loop:

    M = SyntheticGradient(network, optimizer)
    for x, y in windows:
        h = h.detach().requires_grad_()               # the state at the border
        output, end = gru(x, h)
        guess = M.guess(end.detach())                 # what the future would say of `end`
        torch.autograd.backward([loss(output, y), end], [None, guess])
        M.learn(h.detach(), h.grad)                   # what this window says of `h`
"""

import argparse
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from headrace.pipeline.synthesizers import Linear, start_at_zero
from headrace.pipeline.teachable import SyntheticGradient

__all__ = ["Recall", "main", "train_recall"]

SYMBOLS, HIDDEN, STREAMS = 4, 48, 64


class Recall:
    """Endless streams of symbols, and what was seen `delay` steps before: chance is 1/4.

    Args:
        window: steps that `next` gives at a time.
    """

    def __init__(self, delay: int, window: int, seed: int) -> None:
        self._delay, self._window = delay, window
        self._generator = torch.Generator().manual_seed(seed)
        self._past = self._draw(delay)

    def _draw(self, steps: int) -> Tensor:
        return torch.randint(0, SYMBOLS, (STREAMS, steps), generator=self._generator)

    def next(self) -> tuple[Tensor, Tensor]:
        """The next window of every stream: one-hot (STREAMS, T, SYMBOLS), targets (STREAMS, T)."""
        both = torch.cat([self._past, self._draw(self._window)], dim=1)
        self._past = both[:, self._window :]
        seen, target = both[:, self._delay :], both[:, : self._window]
        return functional.one_hot(seen, SYMBOLS).float(), target


def train_recall(
    delay: int, window: int, segments: int, seed: int, factor: float | None = 1.0
) -> float:
    """Train a GRU window by window; its accuracy over the last tenth of them.

    Args:
        factor: of the synthetic gradient; None: truncated back-propagation.
    """
    torch.manual_seed(seed)
    gru, readout = nn.GRU(SYMBOLS, HIDDEN, batch_first=True), nn.Linear(HIDDEN, SYMBOLS)
    optimizer = torch.optim.Adam([*gru.parameters(), *readout.parameters()], lr=2e-3)
    network = Linear(torch.Size([HIDDEN]), torch.Size([HIDDEN]))
    start_at_zero(network)
    synthesizer = SyntheticGradient(network, partial(torch.optim.Adam, lr=1e-3))
    data, h = Recall(delay, window, seed), torch.zeros(1, STREAMS, HIDDEN)
    right: list[float] = []
    for _ in range(segments):
        x, y = data.next()
        h = h.detach().requires_grad_()
        states, end = gru(x, h)
        logits = readout(states)
        tops = [functional.cross_entropy(logits.flatten(0, 1), y.flatten())]
        gradients: list[Tensor | None] = [None]
        if factor is not None:
            tops.append(end)
            gradients.append(factor * synthesizer.guess(end.detach()[0]).unsqueeze(0))
        torch.autograd.backward(tops, gradients)
        if factor is not None and h.grad is not None:
            synthesizer.learn(h.detach()[0], h.grad[0])
        optimizer.step()
        optimizer.zero_grad()
        h = end
        right.append((logits.argmax(-1) == y).float().mean().item())
    late = right[-max(1, segments // 10) :]
    return sum(late) / len(late)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train with and without the synthesizer, and print both accuracies."""
    parser = argparse.ArgumentParser(
        prog="python -m headrace.launch.studies.recall",
        description=(__doc__ or "").splitlines()[0],
    )
    for name, default, meaning in (
        ("delay", 4, "steps to recall over"),
        ("window", 4, "steps that are back-propagated through"),
        ("segments", 4000, "windows to train on"),
        ("seed", 0, "of the first weights and the symbols"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{meaning} ({default})")
    options = parser.parse_args(arguments)
    if min(options.delay, options.window, options.segments) < 1:
        parser.error("--delay, --window and --segments: give whole numbers >= 1")
    torch.set_num_threads(1)
    task = options.delay, options.window, options.segments, options.seed
    print(f"truncated back-propagation  {train_recall(*task, factor=None):.3f}", flush=True)
    print(f"with synthetic gradients    {train_recall(*task):.3f}   (chance is .250)")


if __name__ == "__main__":
    main()
