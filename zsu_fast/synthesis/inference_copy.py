"""A copy of the model to make impressions on: same logits, cheaper forward and input gradient.

Batch norms are folded into the convolutions before them, images and weights are channels-last,
depthwise convolutions have a faster input gradient, and convolutions run in bfloat16 where the
hardware has it. The tail is never trained on this copy.
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

from ..models.wrapper import LogitsModel
from ..runtime.fx_tracing import break_reference_cycles, trace
from ..runtime.precision import Precision, fp32_precision, has_bfloat16
from .depthwise import DepthwiseMode, is_depthwise_conv

_log = logging.getLogger(__name__)


@dataclass
class InferenceCopy:
    """What `inference_copy` made.

    Attributes:
        model: images -> logits; its parameters need no gradients.
        channels_last: whether images are to be channels-last.
        dtype: in which convolutions and products run.
        folded: whether batch norms were folded away.
        depthwise: whether depthwise convolutions run as `depthwise.depthwise`.
    """

    model: nn.Module
    channels_last: bool
    dtype: torch.dtype
    folded: bool
    depthwise: bool = False

    def __call__(self, images: Tensor) -> Tensor:
        """Images float32 [N, ...] -> logits float32 [N, C]."""
        with (
            DepthwiseMode() if self.depthwise else nullcontext(),
            torch.autocast(images.device.type, self.dtype, self.dtype != torch.float32),
        ):
            logits: Tensor = self.model(images)
        return logits.float()

    def layout(self, images: Tensor) -> Tensor:
        """``images`` in the memory format of the copy."""
        if not self.channels_last:
            return images.contiguous()
        # strides of its own: with one channel, torch takes any layout for channels-last
        n, c, h, w = images.shape
        out = torch.empty_strided((n, c, h, w), (c * h * w, 1, w * c, c), device=images.device)
        return out.copy_(images)


# Two copies of a deep model would look like two functions where cuDNN rounds to TF32.
@fp32_precision(torch.backends.cudnn.conv, "ieee")  # type: ignore[attr-defined]
def inference_copy(
    model: LogitsModel, images: Tensor, precision: Precision = "auto"
) -> InferenceCopy:
    """A cheaper copy of ``model``, as far as each step leaves the logits what they are.

    Args:
        model: from `working_copy`; not changed.
        images: two or more, [N, ...], to check with.
        precision: "auto" is bfloat16 where this device computes in it, else float32.
    """
    plain = InferenceCopy(copy.deepcopy(model).requires_grad_(False), False, torch.float32, False)
    want = _logits_and_gradient(plain, images)
    made = plain
    folded = _folded(plain.model, images)
    if folded is not None:
        made = keep_if_equivalent(replace(made, model=folded, folded=True), made, images, want)
    pooled = pool_before_relu(made.model)
    if pooled is not None:
        made = keep_if_equivalent(replace(made, model=pooled), made, images, want)
    if images.ndim == 4:
        moved = copy.deepcopy(made.model).to(memory_format=torch.channels_last)
        made = keep_if_equivalent(
            replace(made, model=moved, channels_last=True), made, images, want
        )
    if images.device.type == "cpu" and any(map(is_depthwise_conv, made.model.modules())):
        made = keep_if_equivalent(replace(made, depthwise=True), made, images, want)
    if precision == "bfloat16" or (precision == "auto" and has_bfloat16(images.device)):
        halved = copy.deepcopy(made.model)
        for module in halved.modules():  # else autocast would cast these weights at every step
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.to(torch.bfloat16)
        half = replace(made, model=halved, dtype=torch.bfloat16)
        made = keep_if_equivalent(half, made, images, want)
    return made


def _folded(model: nn.Module, images: Tensor) -> nn.Module | None:
    """A copy whose convolutions do the work of the batch norms behind them.

    Who feeds whom is seen in one forward pass, so that models which torch.fx can't trace are folded
    too. A batch norm that does more (timm's also drops out and activates) leaves its children.
    """
    made = copy.deepcopy(model)
    runs = Counter[nn.Module]()
    outputs: dict[int, tuple[nn.Module, Tensor]] = {}
    pairs: list[tuple[nn.Module, nn.Module, Tensor]] = []

    def saw(module: nn.Module, given: tuple[Any, ...], got: Any) -> None:
        runs[module] += 1
        if isinstance(module, nn.Conv2d):
            outputs[id(got)] = module, got  # kept alive: an id stays one tensor's
        elif given and id(given[0]) in outputs:
            pairs.append((outputs[id(given[0])][0], module, given[0]))

    layers = [m for m in made.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
    hooks = [layer.register_forward_hook(saw) for layer in layers]
    try:
        with torch.no_grad():
            made(images)
    finally:
        for hook in hooks:
            hook.remove()
    names = {module: name for name, module in made.named_modules()}
    folded = False
    for conv, norm, x in pairs:
        assert isinstance(conv, nn.Conv2d)
        if runs[conv] != 1 or runs[norm] != 1 or not _normalises(norm, x):
            continue
        made.set_submodule(names[conv], fuse_conv_bn_eval(conv, _bare(norm)))
        made.set_submodule(names[norm], nn.Sequential(*norm.children()))
        folded = True
    return made if folded else None


def _bare(norm: nn.Module) -> nn.BatchNorm2d:
    """The batch norm proper, of a layer that may do more."""
    assert isinstance(norm, nn.BatchNorm2d)
    bare = nn.BatchNorm2d(norm.num_features, norm.eps, affine=norm.affine)
    bare.load_state_dict(norm.state_dict(), strict=False)
    return bare.eval().to(next(norm.buffers()).device)


def _normalises(norm: nn.Module, x: Tensor) -> bool:
    """Whether a layer is a batch norm and, behind it, its children one after another."""
    if norm.running_mean is None or norm.running_var is None:
        return False
    want = nn.Sequential(_bare(norm), *norm.children())(x)
    return bool(torch.allclose(norm(x), want, rtol=1e-4, atol=1e-5))


def pool_before_relu(model: nn.Module) -> nn.Module | None:
    """Turns ``max_pool2d(relu(x))`` round: the same bits for a quarter of relu's work."""
    if not any(isinstance(m, nn.Conv2d) for m in model.modules()):
        return None
    try:
        traced = model if isinstance(model, torch.fx.GraphModule) else trace(model)
    except Exception as error:  # noqa: BLE001  what torch.fx can't trace is left as it is
        _log.info("pooling stays behind relu: %s", error)
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


def _logits_and_gradient(made: InferenceCopy, images: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        x = made.layout(images).requires_grad_(True)
        logits = made(x)
        (gradient,) = torch.autograd.grad(logits.sum(), x)
    return logits.detach(), gradient


def keep_if_equivalent(
    new: InferenceCopy, old: InferenceCopy, images: Tensor, want: tuple[Tensor, Tensor]
) -> InferenceCopy:
    """``new`` if it runs and gives the logits and the input gradient ``want``, else ``old``."""
    break_reference_cycles(new.model)
    try:
        logits, gradient = _logits_and_gradient(new, images)
    except RuntimeError as error:  # such as x.view() on channels-last maps
        _log.info("impressions are made without one speed-up: %s", error)
        return old
    same = _agrees_in_bfloat16 if new.dtype == torch.bfloat16 else _agrees
    why_not = same(logits, gradient, *want)
    if why_not:
        _log.info("impressions are made without one speed-up: %s", why_not)
        return old
    return new


def _off(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm().clamp(min=1e-12))


def _agrees(logits: Tensor, gradient: Tensor, want: Tensor, want_gradient: Tensor) -> str | None:
    """Why a float32 copy is not the same function; None if it is."""
    off = _off(logits, want), _off(gradient, want_gradient)
    if not all(o <= 0.01 for o in off):  # NaN too
        return f"logits off by {off[0]:.2g}, gradient by {off[1]:.2g}"
    return None


def _agrees_in_bfloat16(
    logits: Tensor, gradient: Tensor, want: Tensor, want_gradient: Tensor
) -> str | None:
    """Why a copy in bfloat16 is too coarse to make impressions with; None if it is not.

    That it is the same function was shown in float32. Rounding moves logits by half a per cent, or
    by 6 % in EfficientNet-lite0, but it opens and shuts some relus and so moves single elements of
    the gradient by much more: by 30 % of its norm in ResNet-20, with a cosine of 0.91 to 0.97.
    Ascent needs a direction, so each image's gradient has to point the same way and to be about
    as long.
    """
    off = _off(logits, want)
    got, right = gradient.flatten(1), want_gradient.flatten(1)
    cosine = float(F.cosine_similarity(got, right).min())
    lengths = (got.norm(dim=1) / right.norm(dim=1).clamp(min=1e-12)).aminmax()
    good = off <= 0.1 and cosine >= 0.8 and lengths.min >= 0.5 and lengths.max <= 2
    if not good:  # NaN too
        return f"bfloat16 logits off by {off:.2g}, gradient's cosine {cosine:.2g}"
    return None
