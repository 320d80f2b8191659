"""Reference networks: each a function that gives an `nn.Sequential` a pipeline can cut."""

from .emulated import EmulatedLayer, emulated
from .gpt import gpt
from .losses import TokenCrossEntropy
from .mlp import mlp
from .resnet import resnet, resnet_cifar
from .sparse_logistic import SparseLinear, sparse_logistic
from .speech_dnn import speech_dnn
from .vgg import vgg, vgg_cifar

__all__ = [
    "EmulatedLayer",
    "SparseLinear",
    "TokenCrossEntropy",
    "emulated",
    "gpt",
    "mlp",
    "resnet",
    "resnet_cifar",
    "sparse_logistic",
    "speech_dnn",
    "vgg",
    "vgg_cifar",
]
