"""The acoustic model of the pipelined back-propagation paper: deep, sigmoid, a large output."""

from torch import nn

from .checks import check_positive
from .layers import GlorotLinear

__all__ = ["speech_dnn"]


def speech_dnn(
    inputs: int = 429, hidden: int = 2048, layers: int = 7, senones: int = 9304
) -> nn.Sequential:
    """The CD-DNN-HMM's network: `layers` sigmoid layers of `hidden` units, then the senones.

    Input: (N, inputs) features, by default 11 frames of 39, normalised to mean 0 and variance 1.
    Output: (N, senones) logits, to be trained with `nn.CrossEntropyLoss`.

    The defaults give 45,122,648 parameters, 42% of them in the output layer: this is the network
    whose stages are hard to balance (Chen, Eversole, Li, Yu and Seide, "Pipelined
    Back-Propagation for Context-Dependent Deep Neural Networks", Interspeech 2012).

    Sigmoid layers this deep do not learn from torch's default start. As sigmoid(z) equals
    (1 + tanh(z / 2)) / 2, this network starts as exactly the function that a tanh network with
    Glorot and Bengio's (2010) weights computes, and learns without pre-training.

    Raises:
        ValueError: a size below 1.
    """
    check_positive(inputs=inputs, hidden=hidden, layers=layers, senones=senones)
    stack: list[nn.Module] = [GlorotLinear(inputs, hidden, gain=2.0, input_mean=0.0), nn.Sigmoid()]
    for _ in range(layers - 1):
        stack += [GlorotLinear(hidden, hidden, gain=4.0, input_mean=0.5), nn.Sigmoid()]
    return nn.Sequential(*stack, GlorotLinear(hidden, senones, gain=2.0, input_mean=0.5))
