"""A copy of a small model whose convolutions compute blocks of 16 images by `blocked_conv`."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import backends
from ..ops.blocked_conv import blocked_conv, blocked_weight, from_blocks, to_blocks
from ..runtime.fx_tracing import trace_or_none
from .fuse_pools import MaxPool, fuse_pools

_MOST_PIXELS = 64 * 64  # larger maps of 16 images leave the cache
_ELEMENTWISE = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Tanh, nn.Sigmoid, nn.Identity, nn.Dropout)
_FUNCTIONS = (F.relu, torch.relu, torch.tanh, torch.sigmoid, "relu", "tanh", "sigmoid")


class BlockedConv(nn.Module):
    """A convolution without stride of blocks [B, I, H, W, 16]; its weights get no gradient."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        assert not isinstance(conv.padding, str)
        weight, (top, left) = conv.weight.detach(), conv.padding
        self.kernel, self.padding = (weight.shape[2], weight.shape[3]), (top, left)
        self.flipped_padding = self.kernel[0] - 1 - top, self.kernel[1] - 1 - left
        self.register_buffer("weight", blocked_weight(weight))
        self.register_buffer("flipped", blocked_weight(weight.flip(2, 3).transpose(0, 1)))
        self.bias = None if conv.bias is None else nn.Parameter(conv.bias.detach(), False)

    def forward(self, x: Tensor) -> Tensor:
        """float32 [B, I, H, W, 16] -> [B, O, H', W', 16]."""
        out: Tensor = _Convolve.apply(x, self)
        return out

    def output(self, x: Tensor) -> Tensor:
        """The forward pass, without autograd."""
        (height, width), (top, left) = self.kernel, self.padding
        size = x.shape[2] + 2 * top - height + 1, x.shape[3] + 2 * left - width + 1
        weight = self.get_buffer("weight")
        return blocked_conv(x.contiguous(), weight, self.bias, self.padding, size, backend="cpp")

    def input_gradient(self, grad: Tensor, size: tuple[int, int]) -> Tensor:
        """The gradient of x, of that height and width, from that of the output."""
        flipped, padding = self.get_buffer("flipped"), self.flipped_padding
        return blocked_conv(grad.contiguous(), flipped, None, padding, size, backend="cpp")


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: BlockedConv) -> Tensor:
        ctx.layer, ctx.size = layer, (x.shape[2], x.shape[3])
        return layer.output(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.layer.input_gradient(grad, ctx.size), None


class BlockedPool(nn.Module):
    """`MaxPool` of blocks: to `max_pool`, the images of a block are channels."""

    def __init__(self, pool: MaxPool) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        """float32 [B, C, H, W, 16] -> [B, C, H', W', 16]."""
        out: Tensor = self.pool(x.flatten(0, 1).movedim(3, 1))
        return out.movedim(1, 3).unflatten(0, x.shape[:2])


class ToBlocks(nn.Module):
    """`to_blocks`."""

    def forward(self, images: Tensor) -> Tensor:
        return to_blocks(images)


class FromBlocks(nn.Module):
    """`from_blocks`, of as many images as there are in the batch."""

    def forward(self, blocks: Tensor, images: Tensor) -> Tensor:
        return from_blocks(blocks, len(images))


def block_images(model: nn.Module, images: Tensor, channels: int) -> nn.Module | None:
    """A copy in which `BlockedConv`s take the place of all convolutions; None if they can't, or
    have more ``channels``, or ``images``, [N, C, H, W], too many pixels.

    From the first convolution on, images stay in blocks until a layer other than a convolution, a
    pool or an activation takes them.
    """
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    if images.ndim != 4 or images[0, 0].numel() > _MOST_PIXELS or images.device.type != "cpu":
        return None
    if not convs or not all(_is_supported(conv, channels) for conv in convs):
        return None
    if backends.why_unavailable("cpp", "cpu") is not None:
        return None
    copied = copy.deepcopy(model)
    traced = fuse_pools(copied) or trace_or_none(copied, "images are not computed in blocks")
    if traced is None:
        return None
    modules = dict(traced.named_modules())
    start = next(node for node in traced.graph.nodes if node.op == "placeholder")
    traced.add_submodule("to_blocks", ToBlocks())
    traced.add_submodule("from_blocks", FromBlocks())
    blocked: set[torch.fx.Node] = set()
    for node in list(traced.graph.nodes):
        layer = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(layer, nn.Conv2d):
            if len(node.args) != 1 or not isinstance(source := node.args[0], torch.fx.Node):
                return None  # its input is named
            if source not in blocked:
                with traced.graph.inserting_before(node):
                    node.replace_input_with(
                        source, traced.graph.call_module("to_blocks", (source,))
                    )
            traced.set_submodule(str(node.target), BlockedConv(layer))
            blocked.add(node)
        elif node.args and node.args[0] in blocked and _keeps_blocks(node, layer):
            if isinstance(layer, MaxPool):
                traced.set_submodule(str(node.target), BlockedPool(layer))
            blocked.add(node)
        else:
            for source in [n for n in node.all_input_nodes if n in blocked]:
                with traced.graph.inserting_before(node):
                    images_again = traced.graph.call_module("from_blocks", (source, start))
                node.replace_input_with(source, images_again)
    traced.recompile()
    return traced


def _is_supported(conv: nn.Conv2d, channels: int) -> bool:
    return (
        type(conv) is nn.Conv2d
        and conv.weight.dtype == torch.float32
        and max(conv.in_channels, conv.out_channels) <= channels
        and (conv.stride, conv.dilation, conv.groups) == ((1, 1), (1, 1), 1)
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and all(p < k for p, k in zip(conv.padding, conv.kernel_size, strict=True))
    )


def _keeps_blocks(node: torch.fx.Node, layer: nn.Module | None) -> bool:
    """Whether a node does the same to blocks as to images."""
    if layer is not None:
        return isinstance(layer, MaxPool) or type(layer) in _ELEMENTWISE
    alone = len(node.all_input_nodes) == 1
    return alone and node.op in ("call_function", "call_method") and node.target in _FUNCTIONS
