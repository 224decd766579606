"""Frozen convolutions that pad as TensorFlow's "same": by the input's size, and more at the end."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F

from .frozen_conv import NONE, Activation, FrozenConv, is_supported


def is_same_conv(conv: nn.Module) -> bool:
    """Whether ``conv`` is timm's ``Conv2dSame``, and `SameConv` computes it."""
    kind = type(conv)
    if not isinstance(conv, nn.Conv2d) or kind.__name__ != "Conv2dSame":
        return False
    return kind.__module__.startswith("timm.") and is_supported(_padded(conv, [0, 0], [0, 0]))


class SameConv(nn.Module):
    """``activation(conv(x) + other)``, as `FrozenConv`, without a copy of the padded input.

    Where more zeros are needed at the end than at the start, the kernel gets a zero in front, so
    that both sides are padded alike.

    Args:
        conv: for which `is_same_conv` holds.
        activation: what follows.
        winograd: as `FrozenConv`.
    """

    def __init__(
        self, conv: nn.Conv2d, activation: Activation = NONE, winograd: bool = False
    ) -> None:
        super().__init__()
        self.conv, self.activation, self.winograd = conv, activation, winograd
        self.by_padding = nn.ModuleDict()

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """float [N, I, H, W] -> [N, O, ceil(H / stride), ceil(W / stride)]."""
        sizes = zip(x.shape[2:], self.conv.kernel_size, self.conv.stride, strict=True)
        total = [max((math.ceil(n / s) - 1) * s + k - n, 0) for n, k, s in sizes]
        key = "x".join(map(str, total))
        if key not in self.by_padding:
            padded = _padded(self.conv, [n // 2 for n in total], [n - n // 2 for n in total])
            self.by_padding[key] = FrozenConv(padded, self.activation, self.winograd)
        out: Tensor = self.by_padding[key](x, other)
        return out


def _padded(conv: nn.Conv2d, before: list[int], after: list[int]) -> nn.Conv2d:
    """``conv`` as a plain convolution with that padding, where ``after`` is at most 1 more."""
    down, right = (b - a for a, b in zip(before, after, strict=True))
    weight = F.pad(conv.weight.detach(), (right, 0, down, 0))
    plain = nn.Conv2d(
        conv.in_channels, conv.out_channels, (weight.shape[2], weight.shape[3]),
        (conv.stride[0], conv.stride[1]), (after[0], after[1]),
        (conv.dilation[0], conv.dilation[1]), conv.groups, conv.bias is not None, device="meta",
    )  # fmt: skip
    plain.weight = nn.Parameter(weight, requires_grad=False)
    plain.bias = conv.bias
    return plain
