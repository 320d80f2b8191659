"""The language model: causality, lengths, and GPT-2's start."""

import pytest
import torch
from torch import nn

from headrace.models import TokenCrossEntropy, gpt
from headrace.models.gpt import Attention


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return gpt(vocabulary=13, context=8, blocks=3, width=24, heads=4)


def first_attention(model: nn.Sequential) -> Attention:
    attention = model.get_submodule("1.attention")
    assert isinstance(attention, Attention)
    return attention


def test_the_layers_are_embedding_blocks_norm_and_head(model: nn.Sequential) -> None:
    kinds = [type(layer).__name__ for layer in model]
    assert kinds == ["Embedding", "Block", "Block", "Block", "LayerNorm", "NormalLinear"]


def test_a_token_changes_nothing_before_it(model: nn.Sequential) -> None:
    tokens = torch.randint(13, (2, 8))
    before = model(tokens)
    for t in range(8):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % 13
        after = model(changed)
        torch.testing.assert_close(after[:, :t], before[:, :t])
        assert (after[:, t] != before[:, t]).any()


def test_every_earlier_token_and_its_place_matter(model: nn.Sequential) -> None:
    tokens = torch.tensor([[1, 2, 3, 4]])
    swapped = torch.tensor([[2, 1, 3, 4]])
    last, last_swapped = model(tokens)[:, -1], model(swapped)[:, -1]
    assert not torch.allclose(last, last_swapped, atol=1e-6)


def test_attention_is_torch_s_own(model: nn.Sequential) -> None:
    attention = first_attention(model)
    theirs = nn.MultiheadAttention(24, 4, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(attention.query_key_value.weight)
        theirs.in_proj_bias.copy_(attention.query_key_value.bias)
        theirs.out_proj.load_state_dict(attention.output.state_dict())
    x = torch.randn(2, 8, 24)
    mask = nn.Transformer.generate_square_subsequent_mask(8)
    expected, _ = theirs(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)
    torch.testing.assert_close(attention(x), expected)


def test_shorter_sequences_give_the_same_as_the_start_of_longer_ones(
    model: nn.Sequential,
) -> None:
    tokens = torch.randint(13, (2, 8))
    for length in (1, 5):
        torch.testing.assert_close(model(tokens[:, :length]), model(tokens)[:, :length])


def test_a_sequence_beyond_the_context_is_refused(model: nn.Sequential) -> None:
    with pytest.raises(ValueError, match="a sequence of 9 tokens, but context=8"):
        model(torch.zeros(1, 9, dtype=torch.int64))


def test_the_start_is_gpt_2_s() -> None:
    torch.manual_seed(0)
    model = gpt(vocabulary=500, context=256, blocks=8, width=64, heads=4)
    weights = dict(model.named_parameters())
    for name, std in {
        "0.tokens.weight": 0.02,
        "0.positions.weight": 0.01,
        "1.attention.query_key_value.weight": 0.02,
        "1.mlp.0.weight": 0.02,
        "1.attention.output.weight": 0.02 / 4,  # sqrt(2 branches in each of 8 blocks)
        "1.mlp.2.weight": 0.02 / 4,
        "10.weight": 0.02,
    }.items():
        assert weights[name].std().item() == pytest.approx(std, rel=0.05), name
    loss = TokenCrossEntropy()(model(torch.randint(500, (4, 32))), torch.randint(500, (4, 32)))
    assert loss.item() == pytest.approx(torch.log(torch.tensor(500.0)).item(), abs=0.1)


def test_dropout_works_in_training_only() -> None:
    torch.manual_seed(0)
    model = gpt(vocabulary=13, context=8, blocks=1, width=24, heads=4, dropout=0.5)
    attention, x = first_attention(model), torch.randn(2, 8, 24)
    assert not torch.equal(attention(x), attention(x))
    model.eval()
    assert torch.equal(attention(x), attention(x))
    tokens = torch.randint(13, (2, 8))
    assert torch.equal(model(tokens), model(tokens))
