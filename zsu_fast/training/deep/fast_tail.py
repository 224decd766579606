"""A copy of the tail that computes the same with less work, and trains the same parameters.

In it, the last layer is the frozen original one, so that no second one is computed. On a CPU, batch
norms, whose statistics are fixed, are folded into the weights of the convolutions before them in
every step: their parameters are trained all the same, and neither pass touches another map of
features. Convolutions run in channels-last layout, those of single pixels as matrix products, max
pooling runs ahead of relu, and the gradient of a mean over pixels is not written out.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import ModelError
from ...models.parameters import UNCOPYABLE, deep_copy
from ...runtime.fx_tracing import break_reference_cycles
from ...runtime.hooks import forward_hooks, recorded_inputs
from ...splitting.batch_dim import BoundaryTensors
from ...synthesis.inference_copy import conv_norm_pairs, pool_before_relu

_PROBED = 16  # rows that both tails are compared on
_TOLERANCE = 1e-3  # as a share of the norms
_log = logging.getLogger(__name__)


class FoldedConv(nn.Module):
    """``norm(conv(x))`` as one convolution.

    Args:
        conv: a plain convolution; its parameters stay what they are.
        norm: in eval mode, with fixed statistics; None for none.
    """

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d | None) -> None:
        super().__init__()
        self.conv, self.norm = conv, norm
        single = conv.kernel_size == conv.stride == (1, 1) and conv.padding in ((0, 0), "valid")
        self.pointwise = single and conv.groups == 1

    def forward(self, x: Tensor) -> Tensor:
        """float [N, I, H, W] -> [N, O, H', W']."""
        weight, bias = self._folded()
        if self.pointwise:
            pixels = F.linear(x.permute(0, 2, 3, 1), weight[:, :, 0, 0], bias)
            return pixels.permute(0, 3, 1, 2)
        return self.conv._conv_forward(x, weight, bias)

    @property
    def weight(self) -> Tensor:
        """The convolution's, which some models read the dtype from."""
        return self.conv.weight

    def _folded(self) -> tuple[Tensor, Tensor | None]:
        weight, bias, norm = self.conv.weight, self.conv.bias, self.norm
        if norm is None:
            return weight, bias
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = (norm.running_var + norm.eps).rsqrt()
        scale = scale if norm.weight is None else scale * norm.weight
        shift = -norm.running_mean if bias is None else bias - norm.running_mean
        shift = scale * shift if norm.bias is None else torch.addcmul(norm.bias, scale, shift)
        return weight * scale[:, None, None, None], shift


class PixelMean(nn.Module):
    """The mean over the pixels of each map.

    The gradient of ``x.mean((2, 3))`` is as large as x, and in another layout if x is
    channels-last; that of a sum is one value per map, expanded.
    """

    def __init__(self, keepdim: bool) -> None:
        super().__init__()
        self.keepdim = keepdim

    def forward(self, x: Tensor) -> Tensor:
        """float [N, C, H, W] -> [N, C], or [N, C, 1, 1]."""
        return x.sum((2, 3), keepdim=self.keepdim) / (x.shape[2] * x.shape[3])


def is_plain(conv: nn.Module) -> bool:
    """Whether `FoldedConv` computes ``conv``."""
    return type(conv) is nn.Conv2d and conv.padding_mode == "zeros"


class FastTail:
    """The copy of a tail, and how to run it.

    Attributes:
        module: boundary tensors -> logits.
        last: the frozen last layer in it.
        channels_last: whether it takes its rows in that layout.
    """

    def __init__(self, module: nn.Module, last: nn.Module, channels_last: bool) -> None:
        self.module, self.last, self.channels_last = module, last, channels_last

    def __call__(self, *boundary: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and the input of the last layer."""
        with recorded_inputs(self.last) as inputs:
            logits: Tensor = self.module(*boundary)
        return logits, inputs[0]

    def layout(self, features: BoundaryTensors) -> BoundaryTensors:
        """``features`` in the memory layout that the copy takes."""
        if not self.channels_last:
            return features
        return tuple(
            f.contiguous(memory_format=torch.channels_last) if f.ndim == 4 else f for f in features
        )


@torch.enable_grad()
def fast_tail(
    tail: nn.Module, last: nn.Module, parameters: Sequence[nn.Parameter], features: BoundaryTensors
) -> FastTail | None:
    """The copy of ``tail``; None if there is none that gives the same outputs and gradients.

    Args:
        tail: in eval mode; it is not changed.
        last: the module in it whose parameters are not trained, as the original has it.
        parameters: those that are trained, which the copy shares.
        features: the rows, each [N, ...]; a few are run.
    """
    probe = tuple(f[:_PROBED] for f in features)
    with recorded_inputs(last) as inputs:
        logits = tail(*probe)
    if len(inputs) != 1:
        return None
    want = _with_gradients(logits, inputs[0], parameters)
    on_cpu = logits.device.type == "cpu"
    ways = [(True, True), (True, False), (False, False)]
    for folded, channels_last in ways if on_cpu else ways[-1:]:
        try:
            found = frozen_copy(tail, last)
            if found is None:
                return None
            if folded:
                found = _folded(found, probe, channels_last)
            got = _with_gradients(*found(*found.layout(probe)), parameters)
        except (
            RuntimeError,  # such as x.view() on channels-last maps
            AttributeError,  # such as another attribute of a convolution
            IndexError,
            ModelError,
        ) as error:
            _log.info("the tail is trained without one speed-up: %s", error)
            continue
        pairs = zip(got, want, strict=True)
        if all(float((a - b).norm()) <= _TOLERANCE * float(b.norm()) for a, b in pairs):
            return found
        _log.info("the tail is trained without one speed-up: it would change the gradients")
    return None


def _with_gradients(
    logits: Tensor, features: Tensor, parameters: Sequence[nn.Parameter]
) -> list[Tensor]:
    """Logits, features, and a gradient of both for each parameter."""
    total = logits.square().sum() + features.square().sum()
    grads = torch.autograd.grad(total, list(parameters), allow_unused=True)
    return [logits.detach(), features.detach(), *(g for g in grads if g is not None)]


def frozen_copy(tail: nn.Module, last: nn.Module) -> FastTail | None:
    """The copy without any other change; None if ``last`` is no module of ``tail``."""
    modules = tail.named_modules(remove_duplicate=False)  # a replay of a replay has it twice
    names = [name for name, module in modules if module is last]
    if not names:
        return None
    shared: dict[int, Tensor] = {id(t): t for t in chain(tail.parameters(), tail.buffers())}
    module = deep_copy(tail, UNCOPYABLE, shared, hooks=False)
    frozen = deep_copy(last, UNCOPYABLE, hooks=False).eval().requires_grad_(False)
    for name in names:
        module.set_submodule(name, frozen)
    break_reference_cycles(module)
    return FastTail(module, frozen, False)


def _folded(copied: FastTail, probe: BoundaryTensors, channels_last: bool) -> FastTail:
    """``copied``, made faster on a CPU."""
    module = copied.module
    convs = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    channels_last &= bool(convs) and all(conv.groups == 1 for conv in convs)
    _fold(module, copied.last, probe)
    _replace_means(module, probe)
    if isinstance(module, torch.fx.GraphModule):
        module = pool_before_relu(module) or module
        break_reference_cycles(module)
    return FastTail(module, copied.last, channels_last)


def _fold(module: nn.Module, frozen: nn.Module, probe: BoundaryTensors) -> None:
    """Puts a `FoldedConv` in the place of each plain convolution of ``module`` ahead of ``frozen``,
    and the children of the batch norm behind it in the place of that.
    """
    names = {part: name for name, part in module.named_modules()}
    norms = dict(conv_norm_pairs(module, *probe))
    last = set(frozen.modules())
    for conv, name in names.items():
        if isinstance(conv, nn.Conv2d) and is_plain(conv) and conv not in last:
            norm = norms.get(conv)
            module.set_submodule(name, FoldedConv(conv, norm))
            if norm is not None:
                module.set_submodule(names[norm], nn.Sequential(*norm.children()))


def _replace_means(module: nn.Module, probe: BoundaryTensors) -> None:
    """Puts a `PixelMean` in the place of each module that computes one, and of each mean that is a
    step of the graph itself.
    """
    means: dict[nn.Module, bool] = {}  # whether both dimensions of pixels are kept

    def note(part: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if len(args) == 1 and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            keepdim = output.ndim == 4
            if args[0].ndim == 4 and args[0][0, 0].numel() > 1:
                mean = args[0].mean((2, 3), keepdim)
                same = output.shape == mean.shape and torch.allclose(output, mean, rtol=1e-5)
                means.update({part: keepdim} if same else {})

    names = {part: name for name, part in module.named_modules()}
    without_weights = [part for part in names if next(part.parameters(), None) is None]
    with forward_hooks(without_weights, note), torch.no_grad():
        module(*probe)
    for part, keepdim in means.items():
        module.set_submodule(names[part], PixelMean(keepdim))
    if isinstance(module, torch.fx.GraphModule):
        for node in module.graph.nodes:
            dims = node.args[1:] or (node.kwargs.get("dim"),)
            if node.op == "call_method" and node.target == "mean" and _are_pixels(dims):
                name = f"pixel_{node.name}"
                module.add_submodule(name, PixelMean(bool(node.kwargs.get("keepdim", False))))
                node.op, node.target = "call_module", name
                node.args, node.kwargs = node.args[:1], {}
        module.recompile()


def _are_pixels(dims: tuple[Any, ...]) -> bool:
    pair = dims[0] if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else ()
    return tuple(pair) in ((2, 3), (-2, -1))
