"""The gradient of the input of a convolution with few inputs, the first layer of most classifiers.

oneDNN takes three times as long for it as for the forward pass, as it computes eight or more inputs
at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends


def packed_weight(weight: Tensor) -> Tensor:
    """A convolution's weights [O, I, K, L] as `conv_input_gradient` takes them, [K, L, I, O]."""
    return weight.detach().permute(2, 3, 1, 0).contiguous()


def conv_input_gradient(
    grad: Tensor,
    weight: Tensor,
    stride: int,
    padding: tuple[int, int],
    size: tuple[int, int],
    *,
    backend: str | None = None,
) -> Tensor:
    """The gradient of the input of a convolution without dilation, from that of its output.

    It is the same on any number of threads. It has no derivative: `FrozenConv` has.

    Args:
        grad: float32 [N, O, H', W']; a layout other than channels-last costs a copy.
        weight: float32 [K, L, I, O] of `packed_weight`; I is at most 4.
        stride: of both dimensions.
        padding: zeros ahead of the input's first row, and column; less than the kernel. Those
            after the last ones are whatever the sizes leave.
        size: height and width of the input.
        backend: see `backends`; there are no GPU kernels.

    Returns:
        float32 [N, I, *size], channels-last.

    Raises:
        RuntimeError: shapes, dtypes or devices do not match, or a number is out of range.
        BackendUnavailable: an explicit backend cannot run here.
    """
    if grad.ndim == 4:
        grad = grad.contiguous(memory_format=torch.channels_last)
    op = backends.choose("conv_input_gradient", grad.device, backend)
    found: Tensor = op(grad, weight, stride, *padding, *size)
    return found


@torch.library.register_fake("zsu_fast::conv_input_gradient")
def _(grad: Tensor, weight: Tensor, _s: int, _t: int, _l: int, height: int, width: int) -> Tensor:
    torch._check(weight.device == grad.device, lambda: "all tensors must be on one device")
    torch._check(grad.ndim == 4, lambda: "grad must be [batch, channels, height, width]")
    return grad.new_empty(grad.shape[0], height, width, weight.shape[2]).permute(0, 3, 1, 2)
