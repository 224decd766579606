"""Max pooling with square windows, channels-last, and with relu in the same pass.

torch's own takes 5 to 40 times as long as a copy of the input, forward and backward together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backends

_MOST = 15  # largest kernel


def max_pool(
    x: Tensor,
    kernel: int,
    stride: int,
    padding: int = 0,
    *,
    ceil_mode: bool = False,
    relu: bool = False,
    backend: str | None = None,
) -> Tensor:
    """The largest value of each window, as `torch.nn.functional.max_pool2d` without dilation.

    The places of the values take a byte each, and the gradient needs nothing else. It gathers, so
    that it is the same on any number of threads.

    Args:
        x: float32 or bfloat16 [N, C, H, W]; a layout other than channels-last costs a copy.
        kernel, stride, padding: of square windows; kernel 1 to 15, padding at most half of it.
        ceil_mode: whether a window may reach beyond the input, and its padding, at the end.
        relu: whether relu follows.
        backend: see `backends`; there are no GPU kernels.

    Returns:
        [N, C, H', W'], channels-last; autograd differentiates it.

    Raises:
        RuntimeError: x has another dtype or no windows, or a number is out of range.
        BackendUnavailable: an explicit backend cannot run here.
    """
    out: Tensor = _MaxPool.apply(x, kernel, stride, padding, ceil_mode, relu, backend)
    return out


def supported_windows(
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: Any = False,
    return_indices: Any = False,
) -> tuple[int, int, int, bool] | None:
    """Kernel, stride, padding and ceil_mode for `max_pool`, from the arguments of
    `torch.nn.functional.max_pool2d` after its input; None if they stand for other windows.
    """
    if stride is None or stride == []:
        stride = kernel_size
    kernel, step, border, apart = map(_square, (kernel_size, stride, padding, dilation))
    if kernel is None or step is None or border is None or apart != 1:
        return None
    return None if kernel > _MOST or return_indices else (kernel, step, border, bool(ceil_mode))


def _square(value: Any) -> int | None:
    """The one size for both dimensions; None if they differ."""
    sizes = set(value) if isinstance(value, list | tuple) else {value}
    size = sizes.pop() if len(sizes) == 1 else None
    return size if isinstance(size, int) else None


def output_size(size: int, kernel: int, stride: int, padding: int, ceil_mode: bool) -> int:
    """The number of windows along a dimension; like torch's, the last begins in the input."""
    reach = size + 2 * padding - kernel
    count = (-(-reach // stride) if ceil_mode else reach // stride) + 1
    return count - (ceil_mode and (count - 1) * stride >= size + padding)


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, kernel: int, stride: int, padding: int, ceil_mode: bool, relu: bool,
        backend: str | None,
    ) -> Tensor:  # fmt: skip
        x = x.contiguous(memory_format=torch.channels_last)
        size = [output_size(n, kernel, stride, padding, ceil_mode) for n in x.shape[2:]]
        op = backends.choose("max_pool", x.device, backend)
        out: Tensor
        out, place = op(x, kernel, stride, padding, *size, relu)
        ctx.save_for_backward(place)
        ctx.windows, ctx.size, ctx.backend = (kernel, stride, padding), x.shape[2:], backend
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (place,) = ctx.saved_tensors
        grad = grads[0].contiguous(memory_format=torch.channels_last)
        op = backends.choose("max_pool_backward", grad.device, ctx.backend)
        return op(grad, place, *ctx.windows, *ctx.size), *[None] * 6


@torch.library.register_fake("zsu_fast::max_pool")
def _(
    x: Tensor, _kernel: int, _stride: int, _padding: int, out_height: int, out_width: int, *_: bool
) -> tuple[Tensor, Tensor]:
    torch._check(x.ndim == 4, lambda: "x must be [batch, channels, height, width]")
    shape = x.shape[0], out_height, out_width, x.shape[1]
    out, place = x.new_empty(shape), x.new_empty(shape, dtype=torch.uint8)
    return out.permute(0, 3, 1, 2), place.permute(0, 3, 1, 2)


@torch.library.register_fake("zsu_fast::max_pool_backward")
def _(grad: Tensor, place: Tensor, _k: int, _s: int, _p: int, height: int, width: int) -> Tensor:
    torch._check(place.device == grad.device, lambda: "all tensors must be on one device")
    torch._check(place.shape == grad.shape, lambda: "place must be of the shape of grad")
    return grad.new_empty(grad.shape[0], height, width, grad.shape[1]).permute(0, 3, 1, 2)
