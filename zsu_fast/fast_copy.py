"""A copy of the model to make impressions on: same logits, cheaper forward and input gradient.

Batch norms are folded into the convolutions before them, images and weights are channels-last,
and convolutions run in bfloat16 where the hardware has it. The tail is never trained on this copy.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from .classifier import LogitsModel

Precision = Literal["auto", "float32", "bfloat16"]
PRECISIONS = ("auto", "float32", "bfloat16")

_log = logging.getLogger(__name__)


@dataclass
class FastCopy:
    """What `fast_copy` made.

    Attributes:
        model: images -> logits; its parameters need no gradients.
        channels_last: whether images are to be channels-last.
        dtype: in which convolutions and products run.
        folded: whether batch norms were folded away.
    """

    model: nn.Module
    channels_last: bool
    dtype: torch.dtype
    folded: bool

    def __call__(self, images: Tensor) -> Tensor:
        """Images float32 [N, ...] -> logits float32 [N, C]."""
        if self.dtype == torch.float32:
            logits: Tensor = self.model(images)
            return logits
        with torch.autocast(images.device.type, self.dtype):
            return self.model(images).float()

    def layout(self, images: Tensor) -> Tensor:
        """``images`` in the memory format of the copy."""
        if not self.channels_last:
            return images.contiguous()
        # strides of its own: with one channel, torch takes any layout for channels-last
        n, c, h, w = images.shape
        out = torch.empty_strided((n, c, h, w), (c * h * w, 1, w * c, c), device=images.device)
        return out.copy_(images)


def fast_copy(model: LogitsModel, images: Tensor, precision: Precision = "auto") -> FastCopy:
    """A cheaper copy of ``model``, as far as each step leaves the logits what they are.

    Args:
        model: from `working_copy`; not changed.
        images: two or more, [N, ...], to check with.
        precision: "auto" is bfloat16 where this device computes in it, else float32.
    """
    plain = FastCopy(copy.deepcopy(model).requires_grad_(False), False, torch.float32, False)
    want = _logits_and_gradient(plain, images)
    made = plain
    folded = _folded(plain.model)
    if folded is not None:
        made = _if_same(FastCopy(folded, False, torch.float32, True), made, images, want)
    if images.ndim == 4:
        moved = copy.deepcopy(made.model).to(memory_format=torch.channels_last)
        made = _if_same(FastCopy(moved, True, torch.float32, made.folded), made, images, want)
    if precision == "bfloat16" or (precision == "auto" and has_bfloat16(images.device)):
        halved = copy.deepcopy(made.model)
        for module in halved.modules():  # else autocast would cast these weights at every step
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.to(torch.bfloat16)
        half = FastCopy(halved, made.channels_last, torch.bfloat16, made.folded)
        made = _if_same(half, made, images, want)
    return made


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware (on a CPU: AVX512_BF16 or AMX)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _folded(model: nn.Module) -> nn.Module | None:
    if not any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
        return None
    try:
        return fuse(model)
    except Exception as error:  # noqa: BLE001  what torch.fx can't trace is left as it is
        _log.info("batch norms are not folded: %s", error)
        return None


def _logits_and_gradient(made: FastCopy, images: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        x = made.layout(images).requires_grad_(True)
        logits = made(x)
        (gradient,) = torch.autograd.grad(logits.sum(), x)
    return logits.detach(), gradient


def _if_same(new: FastCopy, old: FastCopy, images: Tensor, want: tuple[Tensor, Tensor]) -> FastCopy:
    """``new`` if it runs and gives the logits and the input gradient ``want``, else ``old``."""
    tolerance = 0.2 if new.dtype == torch.bfloat16 else 0.01
    try:
        got = _logits_and_gradient(new, images)
    except RuntimeError as error:  # such as x.view() on channels-last maps
        _log.info("impressions are made without one speed-up: %s", error)
        return old
    off = [
        float((g - w).norm() / w.norm().clamp(min=1e-12)) for g, w in zip(got, want, strict=True)
    ]
    if not all(o <= tolerance for o in off):  # NaN too
        _log.info("impressions are made without one speed-up: off by %.2g, gradient %.2g", *off)
        return old
    return new
