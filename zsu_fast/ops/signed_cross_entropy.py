"""Signed cross-entropy: descend on retain rows, ascend on forget rows (paper, equations 4 to 6)."""

from __future__ import annotations

import torch
from torch import Tensor

from . import fused_loss
from .validation import check_devices


def signed_cross_entropy(
    logits: Tensor, target: Tensor, coef: Tensor, *, backend: str | None = None
) -> Tensor:
    """``sum(coef * CE(logits, target))``, the forget and the retain rows apart.

    Differentiable in ``logits``, once.

    Args:
        logits: float32, float64, float16 or bfloat16 [B, C], any strides (classes that are not
            contiguous cost a copy).
        target: int64 or int32 [B], in 0..C-1 where coef is not 0, ignored elsewhere.
        coef: float [B], sign x weight / N of each row; 0 ignores the row.
        backend: see `backends`.

    Returns:
        [2], float32 (float64 for float64 logits): the sum over rows with a negative coef (forget)
        and the sum over the others (retain); both carry gradients. 0 without rows.

    Raises:
        RuntimeError: shapes, dtypes or devices do not match; on the CPU also if a target is out of
            range (on other devices its row becomes NaN, without a device synchronisation).
    """
    return fused_loss.fused_loss("signed_cross_entropy", (logits, target, coef), backend)


def signed_cross_entropy_and_grad(
    logits: Tensor, target: Tensor, coef: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Returns the losses of `signed_cross_entropy` and the gradient of their sum.

    The fastest training step: ``logits.backward(dlogits)`` starts the backward pass at the logits,
    and autograd never sees the loss.

    Returns:
        losses: [2].
        dlogits: [B, C] in the dtype of ``logits``.
    """
    return fused_loss.loss_and_grad("signed_cross_entropy", (logits, target, coef), backend)


@torch.library.register_fake("zsu_fast::signed_cross_entropy")
def _(logits: Tensor, target: Tensor, coef: Tensor) -> tuple[Tensor, Tensor]:
    check_devices(logits, target, coef)
    torch._check(logits.ndim == 2, lambda: "logits must be [batch, classes]")
    torch._check(target.ndim == 1 and target.shape[0] == logits.shape[0])
    torch._check(coef.ndim == 1 and coef.shape[0] == logits.shape[0])
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.new_empty(2, dtype=wide), logits.new_empty(logits.shape)


fused_loss.register("signed_cross_entropy")
