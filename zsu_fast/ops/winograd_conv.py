"""Convolutions of 3x3 with constant weights, by Winograd's minimal filtering F(4x4, 3x3).

Winograd, "Arithmetic Complexity of Computations", 1980; Lavin and Gray, "Fast Algorithms for
Convolutional Neural Networks", 2015 (arXiv 1509.09308), section 4.3.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from . import backends
from .reference import WINOGRAD_WEIGHTS

_BLOCKS = (64, 48, 32, 16)  # outputs that a kernel computes at once
_NO_BOUNDS = (-math.inf, math.inf)


def winograd_weight(weight: Tensor) -> Tensor:
    """The transform of a convolution's weights, which `winograd_conv` takes.

    Args:
        weight: float32 [outputs, inputs, 3, 3].

    Returns:
        float32 [36, blocks, inputs, block], contiguous: for each position of a tile the weights of
        ``block`` outputs at a time, 16, 32, 48 or 64, with zeros after the last output. It takes
        four times the memory of ``weight``. Computed in float64 and rounded once.

    Raises:
        RuntimeError: the weights have another dtype or shape.
    """
    if weight.dtype != torch.float32 or weight.ndim != 4 or weight.shape[2:] != (3, 3):
        raise RuntimeError("weight must be float32 [outputs, inputs, 3, 3]")
    outputs, inputs = weight.shape[:2]
    block = min(_BLOCKS, key=lambda size: (-(-outputs // size) * size, -size))
    g = torch.tensor(WINOGRAD_WEIGHTS, dtype=torch.float64, device=weight.device)
    positions = torch.einsum("ak,oikl,bl->abio", g, weight.detach().double(), g)
    padded = F.pad(positions, (0, -outputs % block)).reshape(36, inputs, -1, block)
    return padded.permute(0, 2, 1, 3).float().contiguous()


def winograd_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    outputs: int,
    padding: int,
    bounds: tuple[float, float] = _NO_BOUNDS,
    *,
    other: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """A convolution of 3x3 without stride, groups or dilation, plus ``other``, within ``bounds``.

    It needs a quarter of a convolution's multiplications, and loses accuracy by adding large
    numbers that cancel: the output's error, relative to its norm, is 1e-6 to 3e-6, four times that
    of a direct convolution (16 to 512 inputs, normally distributed). A NaN or an infinity reaches
    the outputs of its whole tile. It has no derivative: `FrozenConv` has.

    Args:
        x: float32 [N, inputs, H, W]; a layout other than channels-last costs a copy.
        weight: from `winograd_weight`.
        bias: float32 [outputs], or None.
        outputs: of the convolution, which ``weight`` holds with its padding.
        padding: zeros on each side, 0, 1 or 2.
        bounds: of the output: (0, inf) is relu, (0, 6) relu6.
        other: float32 of the output's shape, such as a residual connection, or None; a layout other
            than channels-last costs a copy.
        backend: see `backends`; there are no GPU kernels.

    Returns:
        float32 [N, outputs, H + 2 padding - 2, W + 2 padding - 2], channels-last.

    Raises:
        RuntimeError: shapes, dtypes or devices do not match.
        BackendUnavailable: an explicit backend cannot run here.
    """
    if x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    if other is not None and other.ndim == 4:
        other = other.contiguous(memory_format=torch.channels_last)
    op = backends.choose("winograd_conv", x.device, backend)
    out: Tensor = op(x, weight, bias, other, outputs, padding, *bounds)
    return out


@torch.library.register_fake("zsu_fast::winograd_conv")
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor | None, outputs: int,
    padding: int, *_: float,
) -> Tensor:  # fmt: skip
    torch._check(x.ndim == 4, lambda: "x must be [batch, inputs, height, width]")
    for t in (weight, bias, other):
        torch._check(t is None or t.device == x.device, lambda: "all tensors must be on one device")
    height, width = (size + 2 * padding - 2 for size in x.shape[2:])
    return x.new_empty(x.shape[0], height, width, outputs).permute(0, 3, 1, 2)
