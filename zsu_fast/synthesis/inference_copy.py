"""A copy of the model for the ascent: the same logits, with a cheaper forward and input gradient.

Batch norms are folded into the convolutions before them, images and weights are channels-last,
depthwise convolutions have a faster input gradient, and convolutions run in bfloat16 where the
hardware computes in it. Those of few channels run in blocks of 16 images instead. Each of these is
used only where it leaves logits and gradient as they are.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..errors import ModelError
from ..models.wrapper import LogitsModel
from ..ops.reference import BLOCK
from ..runtime.fx_tracing import break_reference_cycles, trace_or_none
from ..runtime.hooks import forward_hooks
from ..runtime.inference import channels_last
from ..runtime.torch_settings import Precision, fp32_precision, has_bfloat16
from .depthwise import DepthwiseMode, is_depthwise_conv
from .fuse_pools import fuse_pools
from .image_blocks import block_images

_log = logging.getLogger(__name__)

# The most channels with which blocks of images in float32 are as fast as channels-last layout in
# bfloat16: with more, oneDNN's vectors are full.
_FEW_CHANNELS = 32


@dataclass
class InferenceCopy:
    """A model for the ascent, and how to run it.

    Attributes:
        module: images -> logits; its parameters need no gradients.
        channels_last: whether it takes images in channels-last layout.
        dtype: of convolutions and matrix products.
        folded: whether batch norms were folded away.
        depthwise: whether it runs in a `DepthwiseMode`.
        block: images that are computed at once: fewer take as long, and as much memory.
    """

    module: nn.Module
    channels_last: bool
    dtype: torch.dtype
    folded: bool
    depthwise: bool = False
    block: int = 1

    def __call__(self, images: Tensor) -> Tensor:
        """Images float32 [N, ...] -> logits float32 [N, C]."""
        with (
            DepthwiseMode() if self.depthwise else nullcontext(),
            torch.autocast(images.device.type, self.dtype, self.dtype != torch.float32),
        ):
            logits: Tensor = self.module(images)
        return logits.float()

    def layout(self, images: Tensor) -> Tensor:
        """``images`` in the memory layout that the copy takes."""
        return channels_last(images) if self.channels_last else images.contiguous()


# With cuDNN's TF32, equivalent copies of a deep model would differ by more than the tolerance.
@fp32_precision(torch.backends.cudnn.conv, "ieee")  # type: ignore[attr-defined]
def inference_copy(
    model: LogitsModel, images: Tensor, precision: Precision = "auto"
) -> InferenceCopy:
    """Copies ``model`` and makes the copy cheaper, as far as its function stays the same.

    Args:
        model: from `working_copy`; it is not changed.
        images: two or more, [N, ...], to compare the functions on.
        precision: "auto" is bfloat16 where this device computes in it, else float32.
    """
    best = InferenceCopy(copy.deepcopy(model).requires_grad_(False), False, torch.float32, False)
    want = _logits_and_gradient(best, images)

    def try_change(**changes: Any) -> InferenceCopy:
        return keep_if_equivalent(replace(best, **changes), best, images, want)

    folded = fold_batch_norms(best.module, images)
    if folded is not None:
        best = try_change(module=folded, folded=True)
    if precision != "bfloat16":
        blocks = block_images(best.module, images, _FEW_CHANNELS)
        if blocks is not None:
            blocked = try_change(module=blocks, block=BLOCK)
            if blocked is not best:
                return blocked
    pooled = pool_before_relu(best.module)
    if pooled is not None:
        best = try_change(module=pooled)
    if images.ndim == 4:
        module = copy.deepcopy(best.module).to(memory_format=torch.channels_last)
        best = try_change(module=module, channels_last=True)
    if images.device.type == "cpu" and best.channels_last:
        pooled = fuse_pools(copy.deepcopy(best.module))
        best = best if pooled is None else try_change(module=pooled)
    if images.device.type == "cpu" and any(map(is_depthwise_conv, best.module.modules())):
        best = try_change(depthwise=True)
    if precision == "bfloat16" or (precision == "auto" and has_bfloat16(images.device)):
        module = copy.deepcopy(best.module)
        for layer in module.modules():  # otherwise autocast would cast these weights at every step
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.to(torch.bfloat16)
        best = try_change(module=module, dtype=torch.bfloat16)
    return best


def fold_batch_norms(model: nn.Module, images: Tensor) -> nn.Module | None:
    """A copy with each batch norm folded into the convolution before it; None if there is none.

    One forward pass shows which layer feeds which, so that models which torch.fx can't trace are
    folded too. A batch norm that does more (timm's also drops out and activates) is replaced by
    its children.
    """
    folded = copy.deepcopy(model)
    names = {module: name for name, module in folded.named_modules()}
    pairs = conv_norm_pairs(folded, images)
    for conv, norm in pairs:
        folded.set_submodule(names[conv], fuse_conv_bn_eval(conv, norm_alone(norm)))
        folded.set_submodule(names[norm], nn.Sequential(*norm.children()))
    return folded if pairs else None


def conv_norm_pairs(model: nn.Module, *inputs: Tensor) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Each convolution with the batch norm that takes its output, seen in a forward pass. Both run
    once in it; of what the batch norm does, its children do the rest.
    """
    runs = Counter[nn.Module]()
    outputs: dict[int, tuple[nn.Conv2d, Tensor]] = {}
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d, Tensor]] = []

    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        runs[module] += 1
        if isinstance(module, nn.Conv2d):
            outputs[id(output)] = module, output  # the reference keeps the id unique
        elif isinstance(module, nn.BatchNorm2d) and args and id(args[0]) in outputs:
            pairs.append((outputs[id(args[0])][0], module, args[0]))

    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
    with forward_hooks(layers, note), torch.no_grad():
        model(*inputs)
    return [
        (conv, norm) for conv, norm, x in pairs
        if runs[conv] == runs[norm] == 1 and _is_norm_then_children(norm, x)
    ]  # fmt: skip


def norm_alone(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    """A copy of ``norm`` that does nothing but normalise."""
    alone = nn.BatchNorm2d(norm.num_features, norm.eps, affine=norm.affine)
    alone.load_state_dict(norm.state_dict(), strict=False)
    return alone.eval().to(next(norm.buffers()).device)


def _is_norm_then_children(norm: nn.BatchNorm2d, x: Tensor) -> bool:
    """Whether a layer computes a batch norm and, after it, its children one after the other."""
    if norm.running_mean is None or norm.running_var is None:
        return False
    want = nn.Sequential(norm_alone(norm), *norm.children())(x)
    return bool(torch.allclose(norm(x), want, rtol=1e-4, atol=1e-5))


def pool_before_relu(model: nn.Module) -> nn.Module | None:
    """Replaces ``max_pool2d(relu(x))`` by ``relu(max_pool2d(x))``: the same bits, and relu has a
    quarter of the work. None if there is nothing to replace; may change ``model``'s graph.
    """
    if not any(isinstance(m, nn.Conv2d) for m in model.modules()):
        return None
    traced = trace_or_none(model, "pooling stays after relu")
    if traced is None:
        return None
    modules = dict(traced.named_modules())

    def runs(node: Any, functions: tuple[Any, ...], kind: type[nn.Module]) -> bool:
        if node.op == "call_module":
            return isinstance(modules[node.target], kind)
        return node.op in ("call_function", "call_method") and node.target in functions

    changed = False
    for pool in list(traced.graph.nodes):
        if not runs(pool, (F.max_pool2d, torch.max_pool2d), nn.MaxPool2d):
            continue
        relu = pool.args[0] if pool.args else None
        if (
            not isinstance(relu, torch.fx.Node)
            or len(relu.users) > 1
            or not relu.args
            or not runs(relu, (F.relu, torch.relu, "relu"), nn.ReLU)
        ):
            continue
        with traced.graph.inserting_after(pool):
            moved = traced.graph.node_copy(
                relu, dict.fromkeys(relu.all_input_nodes, pool).__getitem__
            )
        pool.replace_all_uses_with(moved, delete_user_cb=lambda user, new=moved: user is not new)
        pool.replace_input_with(relu, relu.args[0])
        traced.graph.erase_node(relu)
        changed = True
    if not changed:
        return None
    traced.recompile()
    return traced


def _logits_and_gradient(model: InferenceCopy, images: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        x = model.layout(images).requires_grad_(True)
        logits = model(x)
        if not logits.requires_grad:
            raise ModelError(
                "no gradient reaches its images: part of its forward() runs under torch.no_grad() "
                "or torch.inference_mode(), or is detached",
                "Pass space='tail-input', the default, or a module without that.",
            )
        (gradient,) = torch.autograd.grad(logits.sum(), x)
    return logits.detach(), gradient


def keep_if_equivalent(
    new: InferenceCopy, old: InferenceCopy, images: Tensor, want: tuple[Tensor, Tensor]
) -> InferenceCopy:
    """``new`` if it runs and gives the logits and the input gradient of ``want``, else ``old``."""
    break_reference_cycles(new.module)
    difference: object
    try:
        got = _logits_and_gradient(new, images)
    except RuntimeError as error:  # such as x.view() on channels-last maps
        difference = error
    else:
        difference = _difference(new.dtype, *got, *want)
    if difference is None:
        return new
    _log.info("the synthesis runs without one speed-up: %s", difference)
    return old


def is_equivalent(new: InferenceCopy, old: InferenceCopy, images: Tensor) -> bool:
    """Whether ``new`` runs and gives the logits and the input gradient of ``old``."""
    return keep_if_equivalent(new, old, images, _logits_and_gradient(old, images)) is new


def _relative_error(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm().clamp(min=1e-12))


def _difference(
    dtype: torch.dtype, logits: Tensor, gradient: Tensor, want: Tensor, want_gradient: Tensor
) -> str | None:
    """How a copy differs from the model, in words; None if it is accurate enough for the ascent.

    In float32 it has to be the same function. In bfloat16, rounding changes logits by half a per
    cent, or by 6 % in EfficientNet-lite0; but it switches some relus on or off and so changes
    single elements of the gradient by much more: by 30 % of its norm in ResNet-20, with a cosine of
    0.91 to 0.97. The ascent needs a direction, so each image's gradient has to point the same way
    and to be of similar length.
    """
    error = _relative_error(logits, want)
    if dtype != torch.bfloat16:
        gradient_error = _relative_error(gradient, want_gradient)
        if error <= 0.01 and gradient_error <= 0.01:  # False for NaN
            return None
        return f"logits off by {error:.2g}, gradient by {gradient_error:.2g}"
    got, right = gradient.flatten(1), want_gradient.flatten(1)
    cosine = float(F.cosine_similarity(got, right).min())
    lengths = (got.norm(dim=1) / right.norm(dim=1).clamp(min=1e-12)).aminmax()
    if error <= 0.1 and cosine >= 0.8 and lengths.min >= 0.5 and lengths.max <= 2:
        return None
    return f"bfloat16 logits off by {error:.2g}, gradient's cosine {cosine:.2g}"
