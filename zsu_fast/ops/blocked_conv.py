"""Convolutions without stride of blocks of 16 images, for maps of few channels.

The images of a block are the lanes of the kernel's vectors. In channels-last layout, channels are,
and the 6 of LeNet5's first map fill less than half of a vector of 16: oneDNN takes three to five
times as long for such a layer. Its documentation calls this layout NChw16n.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from . import backends
from .reference import BLOCK


def to_blocks(images: Tensor) -> Tensor:
    """[N, C, H, W] -> [ceil(N / 16), C, H, W, 16], with zeros in place of missing images."""
    missing = -len(images) % BLOCK
    images = F.pad(images, (0, 0, 0, 0, 0, 0, 0, missing)) if missing else images
    return images.unflatten(0, (-1, BLOCK)).movedim(1, 4).contiguous()


def from_blocks(blocks: Tensor, count: int) -> Tensor:
    """A copy of the first ``count`` images, [N, C, H, W], of blocks [B, C, H, W, 16].

    A view, which is possible of a single block, would be changed by what changes the blocks.
    """
    images = blocks.movedim(4, 1).clone(memory_format=torch.contiguous_format)
    return images.flatten(0, 1)[:count]


def blocked_weight(weight: Tensor) -> Tensor:
    """A convolution's weights [O, I, K, L] as `blocked_conv` takes them, [I, K, L, O]."""
    return weight.detach().permute(1, 2, 3, 0).contiguous()


def blocked_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: tuple[int, int],
    size: tuple[int, int],
    *,
    backend: str | None = None,
) -> Tensor:
    """A convolution without stride or dilation of blocks of images.

    An image's result depends on that image alone, and is the same on any number of threads. It has
    no derivative: `BlockedConv` has, which is a convolution of the same kind.

    Args:
        x: float32 [B, I, H, W, 16] of `to_blocks`.
        weight: float32 [I, K, L, O] of `blocked_weight`.
        bias: float32 [O]; None for none.
        padding: zeros ahead of the input's first row, and column; less than the kernel.
        size: height and width of the output; zeros after the last row and column are whatever it
            leaves.
        backend: see `backends`; there are no GPU kernels.

    Returns:
        float32 [B, O, *size, 16].

    Raises:
        RuntimeError: shapes, dtypes or devices do not match, or a number is out of range.
        BackendUnavailable: an explicit backend cannot run here.
    """
    op = backends.choose("blocked_conv", x.device, backend)
    found: Tensor = op(x, weight, bias, *padding, *size)
    return found


@torch.library.register_fake("zsu_fast::blocked_conv")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, _t: int, _l: int, *size: int) -> Tensor:
    same = {x.device, weight.device, (x if bias is None else bias).device}
    torch._check(len(same) == 1, lambda: "all tensors must be on one device")
    torch._check(x.ndim == 5, lambda: "x must be [blocks, channels, height, width, 16]")
    return x.new_empty(x.shape[0], weight.shape[3], *size, x.shape[4])
