"""A cross-entropy for (N, T, V) outputs that stays a mean over samples."""

from torch import Tensor, nn
from torch.nn import functional

__all__ = ["TokenCrossEntropy"]


class TokenCrossEntropy(nn.Module):
    """The mean over samples of each sample's mean cross-entropy over its tokens, in nats.

    `nn.CrossEntropyLoss` wants the classes at dimension 1 and, where padding is ignored, divides
    by the tokens of the whole batch, so that a mini-batch's loss is not the mean of its
    micro-batches'. This one divides by each sample's own tokens first. Where all samples have the
    same number of tokens, it is the plain mean over tokens.

    Args:
        ignore_index: targets of this value (padding) do not count; a sample of nothing else has
            loss 0.
    """

    def __init__(self, ignore_index: int = -100) -> None:
        super().__init__()
        self.ignore_index = ignore_index

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """Logits (N, T, V) and int64 targets (N, T) -> a scalar.

        Raises:
            ValueError: shapes that do not fit each other.
        """
        if output.dim() != 3 or output.shape[:2] != target.shape:
            raise ValueError(
                f"output {tuple(output.shape)}, target {tuple(target.shape)}: TokenCrossEntropy"
                " takes logits (N, T, V) and targets (N, T); for one class a sample use"
                " nn.CrossEntropyLoss"
            )
        losses = functional.cross_entropy(
            output.flatten(0, 1),
            target.flatten(),
            ignore_index=self.ignore_index,
            reduction="none",
        ).view(target.shape)
        counted = (target != self.ignore_index).sum(dim=1).clamp(min=1)
        return (losses.sum(dim=1) / counted).mean()
