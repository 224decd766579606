"""Convolutions with frozen weights: forward pass and input gradient are made for the ascent.

oneDNN computes them, or `winograd_conv` where it is asked for and faster. On one thread and below a
batch of 16, torch itself would compute those of 1x1 by its fallback, which copies channels-last
maps to another layout and back. The activation that follows is computed in the same pass, and its
gradient needs only the output. The input gradient of a convolution is a convolution again, with
weights that are flipped once.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import backends
from ..ops.conv_input_gradient import conv_input_gradient, packed_weight
from ..ops.winograd_conv import winograd_conv, winograd_weight
from .depthwise import dilated, library_gradient, library_is_fast

_CHANNELS_LAST = torch.channels_last
_FEW = 4  # channels of an image, at most
_CHANNELS = 8  # least number for which `winograd_conv` is faster
_PIXELS = 6  # of a tile's 16 outputs, on average, likewise


class Activation(NamedTuple):
    """What follows a convolution: "none", "relu", or "hardtanh", a clamp to ``bounds``."""

    name: str = "none"
    bounds: tuple[float, ...] = ()

    def backward(self, grad: Tensor, out: Tensor) -> Tensor:
        """The gradient of its input, from ``grad``, that of its output ``out``."""
        if self.name == "relu":
            grad = torch.ops.aten.threshold_backward(grad, out, 0)
        if self.name == "hardtanh":
            grad = torch.ops.aten.hardtanh_backward(grad, out, *self.bounds)
        return grad

    def limits(self) -> tuple[float, float]:
        """The bounds of its output."""
        if self.name == "hardtanh":
            return self.bounds[0], self.bounds[1]
        return (0.0 if self.name == "relu" else -math.inf), math.inf


NONE = Activation()


def is_supported(conv: nn.Module) -> bool:
    """Whether `FrozenConv` computes ``conv``, a plain or a depthwise convolution without dilation
    that is padded by zeros.
    """
    if type(conv) is not nn.Conv2d or isinstance(conv.padding, str):
        return False
    depthwise = conv.groups == conv.in_channels == conv.out_channels
    return (
        (conv.groups == 1 or depthwise)
        and conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and all(p < k for p, k in zip(conv.padding, conv.kernel_size, strict=True))
    )


def is_winograd_supported(conv: nn.Module) -> bool:
    """Whether `FrozenConv` can compute ``conv`` by `winograd_conv`, and the channels are enough."""
    return (
        is_supported(conv)
        and isinstance(conv, nn.Conv2d)
        and (conv.kernel_size, conv.stride, conv.groups) == ((3, 3), (1, 1), 1)
        and conv.padding in ((0, 0), (1, 1), (2, 2))
        and min(conv.in_channels, conv.out_channels) >= _CHANNELS
        and _has_float32_kernels(conv)
    )


def _has_float32_kernels(conv: nn.Conv2d) -> bool:
    """Whether the native ops can compute with its weights."""
    known = conv.weight.dtype == torch.float32 and conv.weight.device.type == "cpu"
    return known and backends.why_unavailable("cpp", "cpu") is None


class FrozenConv(nn.Module):
    """``activation(conv(x) + other)`` on a CPU; weights and bias get no gradient.

    Args:
        conv: a convolution that `is_supported`; its dtype is the one that is computed in.
        activation: what follows.
        winograd: whether `winograd_conv` computes what it computes faster, if it
            `is_winograd_supported`. Its weights take eight times the memory.
    """

    def __init__(
        self, conv: nn.Conv2d, activation: Activation = NONE, winograd: bool = False
    ) -> None:
        super().__init__()
        assert not isinstance(conv.padding, str)
        self.activation, self.stride, self.groups = activation, conv.stride, conv.groups
        self.kernel, self.padding = conv.kernel_size, conv.padding
        weight = conv.weight.detach()
        flipped = weight.flip(2, 3) if conv.groups > 1 else weight.flip(2, 3).transpose(0, 1)
        self.bias = None if conv.bias is None else nn.Parameter(conv.bias.detach(), False)
        self.weight = nn.Parameter(weight.contiguous(memory_format=_CHANNELS_LAST), False)
        self.register_buffer("flipped", flipped.contiguous(memory_format=_CHANNELS_LAST))
        few = conv.groups == 1 and conv.in_channels <= _FEW and conv.stride[0] == conv.stride[1]
        gathers = few and _has_float32_kernels(conv)
        self.register_buffer("packed", packed_weight(weight) if gathers else None)
        phases = few and not gathers and conv.stride[0] > 1
        self.register_buffer("phases", _phase_weights(weight, conv.stride[0]) if phases else None)
        self.winograd = winograd and is_winograd_supported(conv)
        if self.winograd:
            self.register_buffer("winograd_weight", winograd_weight(weight))
            self.register_buffer("winograd_flipped", winograd_weight(flipped))

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """float [N, I, H, W] -> [N, O, H', W'], in the weights' dtype; ``other`` is added ahead of
        the activation, which must not be "hardtanh" then.
        """
        dtype = self.weight.dtype
        out: Tensor = _Convolve.apply(x.to(dtype), None if other is None else other.to(dtype), self)
        return out

    def output(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """The forward pass, without autograd."""
        x = x.contiguous(memory_format=_CHANNELS_LAST)
        if self.winograd and _suits_winograd(x, self.padding[0]):
            weight, outputs = self.get_buffer("winograd_weight"), self.weight.shape[0]
            if other is not None:
                size = [n + 2 * self.padding[0] - 2 for n in x.shape[2:]]
                other = other.expand(len(x), outputs, *size)
            return winograd_conv(
                x, weight, self.bias, outputs, self.padding[0], self.activation.limits(),
                other=other, backend="cpp",
            )  # fmt: skip
        return _onednn(
            x, self.weight, self.bias, self.padding, self.stride, self.groups, self.activation,
            other,
        )  # fmt: skip

    def input_gradient(self, grad: Tensor, shape: torch.Size) -> Tensor:
        """The gradient of x, of shape [N, I, H, W], from that of the convolution's output."""
        if self.packed is not None:
            weight, padding = self.get_buffer("packed"), (self.padding[0], self.padding[1])
            size = shape[2], shape[3]
            return conv_input_gradient(grad, weight, self.stride[0], padding, size, backend="cpp")
        if self.phases is not None:
            return self._gradient_by_phases(grad, shape)
        strided = self.stride != (1, 1) and self.kernel != (1, 1)
        if strided and library_is_fast(grad.dtype, self.groups):
            return library_gradient(
                grad, shape, self.weight, self.stride, self.padding, self.groups
            )
        padding = [k - 1 - p for k, p in zip(self.kernel, self.padding, strict=True)]
        flipped: Tensor = self.get_buffer("flipped")
        if self.stride != (1, 1) and self.kernel == (1, 1):  # each output has one input
            small = _onednn(grad, flipped, None, padding, (1, 1), self.groups, NONE)
            return dilated(small, self.stride, shape[2:])
        if self.stride != (1, 1):  # its convolution has the input's size
            pairs = zip(shape[2:], self.kernel, padding, strict=True)
            grad = dilated(grad, self.stride, [n + k - 1 - 2 * p for n, k, p in pairs])
        if self.winograd and _suits_winograd(grad, padding[0]):
            weight = self.get_buffer("winograd_flipped")
            return winograd_conv(grad, weight, None, shape[1], padding[0], backend="cpp")
        return _onednn(grad, flipped, None, padding, (1, 1), self.groups, NONE)

    def _gradient_by_phases(self, grad: Tensor, shape: torch.Size) -> Tensor:
        """`input_gradient` of a strided convolution of an image: one without stride gives the
        pixels of each phase as channels. For the first layer of SqueezeNet or ResNet, oneDNN's
        own gradient takes 2.5 times as long.
        """
        phases = self.get_buffer("phases")
        reach = [n - 1 for n in phases.shape[2:]]
        padded = _onednn(grad, phases, None, reach, (1, 1), 1, NONE)
        padded = F.pixel_shuffle(padded, self.stride[0])
        (top, left), (height, width) = self.padding, shape[2:]
        out = padded[:, :, top : top + height, left : left + width]
        # the last rows and columns may be beyond the reach of any output
        return F.pad(out, (0, width - out.shape[3], 0, height - out.shape[2]))


def _suits_winograd(x: Tensor, padding: int) -> bool:
    """Whether `winograd_conv` of such a map is faster: if enough of each tile is used. It does not
    depend on the batch, so that a comparison of two images covers every layer.
    """
    height, width = (size + 2 * padding - 2 for size in x.shape[2:])
    return height * width >= _PIXELS * (-(-height // 4) * -(-width // 4))


def _phase_weights(weight: Tensor, stride: int) -> Tensor:
    """Weights [O, I, K, L] -> [I * stride^2, O, ceil(K / stride), ceil(L / stride)], as
    ``pixel_shuffle`` orders them, flipped.
    """
    outputs, inputs, *kernel = weight.shape
    down, right = (-(-k // stride) for k in kernel)
    padded = F.pad(weight, (0, right * stride - kernel[1], 0, down * stride - kernel[0]))
    phases = padded.reshape(outputs, inputs, down, stride, right, stride).permute(1, 3, 5, 0, 2, 4)
    phases = phases.flip(4, 5).reshape(inputs * stride**2, outputs, down, right)
    return phases.contiguous(memory_format=_CHANNELS_LAST)


def _onednn(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: Any, stride: Any, groups: int,
    activation: Activation, other: Tensor | None = None,
) -> Tensor:  # fmt: skip
    out: Tensor
    if other is None:
        out = torch.ops.mkldnn._convolution_pointwise(
            x, weight, bias, padding, stride, (1, 1), groups,
            activation.name, list(activation.bounds), "",
        )  # fmt: skip
    else:
        name = None if activation == NONE else activation.name
        out = torch.ops.mkldnn._convolution_pointwise.binary(
            x, other, weight, bias, padding, stride, (1, 1), groups, "add", 1.0, name, [], ""
        )
    return out


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, other: Tensor | None, layer: FrozenConv) -> Tensor:
        out = layer.output(x, other)
        ctx.layer, ctx.shape = layer, x.shape
        ctx.other = None if other is None else other.shape
        if layer.activation != NONE:
            ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.layer.activation != NONE:  # makes a slice of a larger gradient dense
            grad = ctx.layer.activation.backward(grad, *ctx.saved_tensors)
        grad = grad.contiguous(memory_format=_CHANNELS_LAST)
        of_other = None if ctx.other is None else grad.sum_to_size(ctx.other)
        return ctx.layer.input_gradient(grad, ctx.shape), of_other, None
