"""Data for the launch scripts: ordinary map-style datasets of (input, target) tensors."""

from .cifar import CIFAR10, CIFAR100
from .digits import Digits
from .generated import Generated, GeneratedTokens
from .hugging_face import HuggingFace
from .image_folder import ImageFolder
from .mnist import MNIST
from .source_text import SourceText
from .sparse import SparseClassification

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "MNIST",
    "Digits",
    "Generated",
    "GeneratedTokens",
    "HuggingFace",
    "ImageFolder",
    "SourceText",
    "SparseClassification",
]
