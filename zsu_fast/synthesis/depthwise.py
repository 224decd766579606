"""Depthwise convolutions whose input gradient is a depthwise convolution again.

On a CPU, the library's gradient of a strided depthwise convolution in bfloat16 takes up to 20 times
as long as its forward pass, that of one without stride twice as long. The gradient is the output's
gradient, dilated by the stride, convolved with the flipped kernel: a forward pass again. Strided in
float32, the library's is faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class DepthwiseMode(TorchFunctionMode):
    """Inside, depthwise convolutions with frozen weights run as `_Depthwise`, which gives weights
    and biases no gradient, and computes in the weights' dtype under autocast.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.conv2d and not kwargs and _is_supported(*args):
            x, weight, *others = args[:5]
            x = x.to(weight.dtype) if torch.is_autocast_enabled("cpu") else x
            return _Depthwise.apply(x, weight, *others)
        return func(*args, **(kwargs or {}))


def is_depthwise_conv(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == len(module.weight) > 1


def dilated(x: Tensor, stride: Sequence[int], size: Sequence[int]) -> Tensor:
    """``x`` [N, C, H, W] with zeros between its rows and columns, and at the end up to ``size``."""
    out = torch.empty(*x.shape[:2], *size, dtype=x.dtype, memory_format=torch.channels_last).zero_()
    out[:, :, :: stride[0], :: stride[1]] = x
    return out


def library_is_fast(dtype: torch.dtype, groups: int) -> bool:
    """Whether `library_gradient` of a strided convolution is the fastest."""
    return groups == 1 or dtype == torch.float32


def library_gradient(
    grad: Tensor, shape: torch.Size, weight: Tensor, stride: Sequence[int], padding: Sequence[int],
    groups: int,
) -> Tensor:  # fmt: skip
    """The gradient of a convolution's input of that shape, as torch computes it on a CPU."""
    like = torch.empty(shape, dtype=grad.dtype, memory_format=torch.channels_last)  # not read
    found: Tensor = torch.ops.aten.convolution_backward(
        grad, like, weight, None, stride, padding, (1, 1), False, (0, 0), groups,
        (True, False, False),
    )[0]  # fmt: skip
    return found


def _is_supported(
    x: Tensor, weight: Tensor, bias: Tensor | None = None,
    stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1,
) -> bool:  # fmt: skip
    """Whether `_Depthwise` computes the convolution with these arguments of `torch.conv2d`."""
    if not isinstance(padding, tuple) or not isinstance(stride, tuple) or groups == 1:
        return False
    return (
        x.ndim == 4
        and x.device.type == "cpu"
        and x.shape[1] == groups == len(weight)
        and dilation in (1, (1, 1))
        and all(p < k for p, k in zip(padding, weight.shape[2:], strict=True))
        and not weight.requires_grad
        and not (bias is not None and bias.requires_grad)
    )


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None,
        stride: tuple[int, int], padding: tuple[int, int],
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(weight)
        ctx.shape, ctx.stride, ctx.padding = x.shape, stride, padding
        return F.conv2d(x, weight, bias, stride, padding, groups=len(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        if ctx.stride != (1, 1) and library_is_fast(grad.dtype, len(weight)):
            out = library_gradient(grad, ctx.shape, weight, ctx.stride, ctx.padding, len(weight))
            return out, None, None, None, None
        kernel = weight.shape[2:]
        padding = [k - 1 - p for k, p in zip(kernel, ctx.padding, strict=True)]
        # its convolution has the input's size
        size = [n + k - 1 - 2 * p for n, k, p in zip(ctx.shape[2:], kernel, padding, strict=True)]
        if ctx.stride != (1, 1):
            grad = dilated(grad, ctx.stride, size)
        flipped = weight.flip(2, 3)
        out = F.conv2d(grad, flipped, None, 1, tuple(padding), groups=len(weight))
        return out, None, None, None, None
