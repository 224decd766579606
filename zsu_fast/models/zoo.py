"""The zoo: the paper's small models, two CIFAR ResNets and a Vision Transformer, with weights.

``benchmarks/tools/train_zoo.py`` trains LeNet5, KarpathyNet and the transformer. Their weights, and
those of the *golden* models (trained without the forgotten classes), are in `ASSETS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ArgumentError
from . import checkpoint
from .input_spec import IMAGENET_MEAN, IMAGENET_STD, InputSpec

ASSETS = Path(__file__).parent / "assets"


class LeNet5(nn.Module):
    """LeNet-5 with ReLU and max pooling (LeCun et al. 1998), for 28x28 grey images.

    Input float [N, 1, 28, 28], output logits [N, classes].
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc1(x.flatten(1)))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


class KarpathyNet(nn.Module):
    """The three-convolution CIFAR-10 network of ConvNetJS: 16, 20, 20 filters of 5x5, pooled.

    Input float [N, 3, 32, 32], output logits [N, classes].
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 5, padding=2)
        self.conv2 = nn.Conv2d(16, 20, 5, padding=2)
        self.conv3 = nn.Conv2d(20, 20, 5, padding=2)
        self.fc1 = nn.Linear(20 * 4 * 4, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.max_pool2d(F.relu(self.conv3(x)), 2)
        return self.fc1(x.flatten(1))


def _conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut without parameters (He et al. 2016, option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride, self.extra = stride, outputs - inputs
        self.conv1, self.bn1 = _conv3x3(inputs, outputs, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = _conv3x3(outputs, outputs), nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        half = self.extra // 2
        skip = F.pad(x[..., :: self.stride, :: self.stride], (0, 0, 0, 0, half, half))
        return F.relu(y + skip)


class CifarResNet(nn.Module):
    """The CIFAR ResNet of depth 6 * blocks + 2 (He et al. 2016, section 4.2).

    Input float [N, 3, 32, 32], output logits [N, classes]. Fits the public checkpoints of
    akamaster/pytorch_resnet_cifar10 (without the prefix "module." of their names).
    """

    def __init__(self, blocks: int, classes: int = 10) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv3x3(3, 16), nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, 1, blocks)
        self.layer2 = self._stage(16, 32, 2, blocks)
        self.layer3 = self._stage(32, 64, 2, blocks)
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))

    @staticmethod
    def _stage(inputs: int, outputs: int, stride: int, blocks: int) -> nn.Sequential:
        first = BasicBlock(inputs, outputs, stride)
        return nn.Sequential(first, *[BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)])


class PatchEmbed(nn.Sequential):
    """Turns an image into tokens: two convolutions, each followed by pooling to half the size.

    The compact stem of Hassani et al. (2021) replaces the usual convolution whose stride equals its
    width, since a small data set does not suffice to learn the locality that convolutions have.
    Input float [N, 3, H, W], output [N, H/4 * W/4, width].
    """

    def __init__(self, width: int, stem: int = 32) -> None:
        super().__init__(
            nn.Conv2d(3, stem, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1),
            nn.Conv2d(stem, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017) over tokens [N, T, width].

    In basic operations: for so few tokens on a CPU, the backward pass of torch's fused
    scaled_dot_product_attention takes several times as long.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = qkv[0] * self.scale, qkv[1], qkv[2]  # each [N, heads, T, width/heads]
        mixed = (query @ key.transpose(2, 3)).softmax(-1) @ value
        return self.proj(mixed.transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """Attention and a two-layer network, each with LayerNorm before it and a shortcut."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class CompactViT(nn.Module):
    """A Vision Transformer (Dosovitskiy et al., arXiv 2010.11929) for 32x32 colour images.

    64 tokens from a compact convolutional stem (Hassani et al., arXiv 2104.05704), a class token,
    learned positions, pre-norm blocks, and a classifier on the class token.
    Input float [N, 3, 32, 32], output logits [N, classes].
    """

    def __init__(self, width: int = 96, depth: int = 4, heads: int = 4, classes: int = 10) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(width)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + 8 * 8, width))
        self.blocks = nn.Sequential(
            *[TransformerBlock(width, heads, 2 * width) for _ in range(depth)]
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patch_embed(x)
        tokens = torch.cat((self.cls_token.expand(patches.shape[0], -1, -1), patches), 1)
        tokens = self.norm(self.blocks(tokens + self.pos_embed))
        return self.head(tokens[:, 0])


@dataclass(frozen=True)
class Entry:
    """A model of the zoo: its factory, the images it expects, its weights file, if any, and its
    classes' names."""

    build: Callable[[int], nn.Module]  # the number of classes -> the model
    spec: InputSpec
    weights: str | None = None
    class_names: tuple[str, ...] = ()


_CIFAR_MEAN, _CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_CIFAR10 = (
    "airplane, plane", "automobile, car", "bird", "cat", "deer", "dog", "frog", "horse", "ship",
    "truck",
)  # fmt: skip
_MNIST = InputSpec((1, 28, 28), (0.1307,), (0.3081,), "stated by the zoo")
_CIFAR = InputSpec((3, 32, 32), _CIFAR_MEAN, _CIFAR_STD, "stated by the zoo")
_CIFAR_RESNET = InputSpec((3, 32, 32), IMAGENET_MEAN, IMAGENET_STD, "stated by the zoo")
ZOO: dict[str, Entry] = {
    "lenet5": Entry(LeNet5, _MNIST, "lenet5.safetensors", _DIGITS),
    "lenet5_golden": Entry(LeNet5, _MNIST, "lenet5_golden.safetensors", _DIGITS),
    "karpathynet": Entry(KarpathyNet, _CIFAR, "karpathynet.safetensors", _CIFAR10),
    "karpathynet_golden": Entry(KarpathyNet, _CIFAR, "karpathynet_golden.safetensors", _CIFAR10),
    "resnet20_cifar": Entry(lambda n: CifarResNet(3, n), _CIFAR_RESNET, None, _CIFAR10),
    "resnet56_cifar": Entry(lambda n: CifarResNet(9, n), _CIFAR_RESNET, None, _CIFAR10),
    "vit_cifar": Entry(lambda n: CompactViT(classes=n), _CIFAR, "vit_cifar.safetensors", _CIFAR10),
}


def build(name: str, classes: int = 10) -> nn.Module:
    """Builds a zoo model with random weights, in eval mode, with its ``input_spec``.

    Raises:
        ArgumentError: no such name.
    """
    if name not in ZOO:
        raise ArgumentError("model", f"got {name!r}", f"Pass one of {', '.join(ZOO)}.")
    model = ZOO[name].build(classes).eval()
    model.input_spec = ZOO[name].spec  # type: ignore[assignment]
    if len(names := ZOO[name].class_names) == classes:
        model.class_names = names  # type: ignore[assignment]
    return model


def load(name: str) -> nn.Module:
    """Builds a zoo model with the weights in the package.

    Raises:
        ArgumentError: no such name, or the package does not include its weights.
    """
    model = build(name)
    file = ZOO[name].weights
    if file is None:
        raise ArgumentError(
            "model", f"the package has no weights of {name!r}", "Pass a weights file."
        )
    checkpoint.load_into(model, ASSETS / file, keep_dtype=True)  # some are stored as float16
    return model
