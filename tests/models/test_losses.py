"""The token loss is a mean over samples, whatever their padding."""

import pytest
import torch
from torch import nn

from headrace.models import TokenCrossEntropy


def test_equal_lengths_give_the_plain_mean_over_tokens() -> None:
    torch.manual_seed(0)
    output, target = torch.randn(3, 5, 7), torch.randint(7, (3, 5))
    expected = nn.CrossEntropyLoss()(output.transpose(1, 2), target)
    torch.testing.assert_close(TokenCrossEntropy()(output, target), expected)


def test_a_mini_batch_s_loss_is_its_micro_batches_weighted_by_samples() -> None:
    torch.manual_seed(0)
    output, target = torch.randn(5, 6, 7), torch.randint(7, (5, 6))
    for sample, length in enumerate((6, 1, 3, 2, 6)):
        target[sample, length:] = -100
    loss = TokenCrossEntropy()
    weighted = (3 * loss(output[:3], target[:3]) + 2 * loss(output[3:], target[3:])) / 5
    torch.testing.assert_close(loss(output, target), weighted)


def test_a_sample_of_padding_only_has_no_loss_and_no_gradient() -> None:
    output = torch.randn(2, 3, 4, requires_grad=True)
    target = torch.tensor([[1, 2, 3], [9, 9, 9]])
    loss = TokenCrossEntropy(ignore_index=9)(output, target)
    loss.backward()
    first = nn.functional.cross_entropy(output[0], target[0])
    torch.testing.assert_close(loss, first / 2)
    assert output.grad is not None
    assert not output.grad[1].any()


@pytest.mark.parametrize(("output", "target"), [((3, 7), (3,)), ((3, 5, 7), (3, 4))])
def test_shapes_that_do_not_fit_are_refused(
    output: tuple[int, ...], target: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"takes logits \(N, T, V\) and targets \(N, T\)"):
        TokenCrossEntropy()(torch.randn(output), torch.zeros(target, dtype=torch.int64))
