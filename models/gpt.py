"""A GPT-2-like language model: an embedding, transformer blocks (one layer each), norm, head."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from .checks import check_positive
from .layers import NormalEmbedding, NormalLinear

__all__ = ["Attention", "Block", "Embedding", "gpt"]

_STD = 0.02


def gpt(
    vocabulary: int, context: int, blocks: int, width: int, heads: int, *, dropout: float = 0.0
) -> nn.Sequential:
    """Token numbers (N, T), int64, T up to `context` -> logits (N, T, vocabulary).

    Position t's logits depend on tokens 0 … t only. Train it with `TokenCrossEntropy`, the target
    being the tokens one step later.

    The network and its start are those of Radford et al., "Language Models are Unsupervised
    Multitask Learners", 2019, section 2.3, and of their code: norms before each half of a block,
    N(0, 0.02²) weights (0.01 for positions), the layers that end a residual branch divided by the
    square root of the number of branches. The one difference: the head is not tied to the token
    embedding, since they live on different stages. vocabulary=50257, context=1024, blocks=12,
    width=768, heads=12: GPT-2 small, 124,439,808 parameters and 38,597,376 for its own head.

    Args:
        vocabulary: how many different tokens there are.
        context: the longest sequence.
        blocks: transformer blocks.
        width: numbers in a token's vector; a multiple of `heads`.
        heads: attention heads of a block.
        dropout: the share dropped, in training, of embeddings, attention weights and branches.

    Raises:
        ValueError: a size below 1, a `width` that `heads` does not divide, `dropout` out of range.
    """
    check_positive(vocabulary=vocabulary, context=context, blocks=blocks, width=width, heads=heads)
    if width % heads != 0:
        raise ValueError(f"width={width}, heads={heads}: heads must divide width")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout={dropout!r}: give a share in [0, 1)")
    branch_std = _STD / (2 * blocks) ** 0.5
    return nn.Sequential(
        Embedding(vocabulary, context, width, dropout),
        *(Block(width, heads, dropout, branch_std) for _ in range(blocks)),
        nn.LayerNorm(width),
        NormalLinear(width, vocabulary, std=_STD, bias=False),
    )


class Embedding(nn.Module):
    """The sum of a token's and a position's vector: (N, T) int64 -> (N, T, width)."""

    def __init__(self, vocabulary: int, context: int, width: int, dropout: float) -> None:
        super().__init__()
        self.tokens = NormalEmbedding(vocabulary, width, std=_STD)
        self.positions = NormalEmbedding(context, width, std=0.01)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        length, context = tokens.shape[-1], self.positions.num_embeddings
        if length > context:
            raise ValueError(
                f"a sequence of {length} tokens, but context={context}: cut the sequences,"
                " or build the model with a larger context"
            )
        positions = torch.arange(length, device=tokens.device)
        embedded: Tensor = self.dropout(self.tokens(tokens) + self.positions(positions))
        return embedded


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): (N, T, width) -> the same."""

    def __init__(self, width: int, heads: int, dropout: float, branch_std: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout, branch_std)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            NormalLinear(width, 4 * width, std=_STD),
            nn.GELU(approximate="tanh"),
            NormalLinear(4 * width, width, std=branch_std),
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        x = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return x


class Attention(nn.Module):
    """Causal multi-head self-attention: (N, T, width) -> the same."""

    def __init__(self, width: int, heads: int, dropout: float, branch_std: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.query_key_value = NormalLinear(width, 3 * width, std=_STD)
        self.output = NormalLinear(width, width, std=branch_std)

    def forward(self, x: Tensor) -> Tensor:
        projected: Tensor = self.query_key_value(x)
        heads = projected.view(*x.shape[:2], 3, self.heads, -1)  # (N, T, 3, heads, width / heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        dropped = self.dropout if self.training else 0.0
        attended = functional.scaled_dot_product_attention(
            query, key, value, dropout_p=dropped, is_causal=True
        )
        mixed: Tensor = self.output(attended.transpose(1, 2).flatten(-2))
        return mixed
