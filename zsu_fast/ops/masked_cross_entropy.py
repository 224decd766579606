"""Masked cross-entropy: match the original model with its forgotten classes masked out.

The loss of the default objective. It is bounded below by 0, so unlike the signed cross-entropy it
cannot be minimised by destroying the model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import fused_loss
from .validation import check_devices


def masked_cross_entropy(
    logits: Tensor, teacher: Tensor, forget: Tensor, coef: Tensor, *, backend: str | None = None
) -> Tensor:
    """``sum(coef * KL(masked softmax of teacher || softmax of logits))``.

    Differentiable in ``logits``, once.

    Args:
        logits: float32, float64, float16 or bfloat16 [B, C], of the student, any strides.
        teacher: float [B, C], unmasked logits of the original model.
        forget: bool [C], True at forgotten classes; at least one is False.
        coef: float [B], weight / N; 0 ignores the row.
        backend: see `backends`.

    Returns:
        Scalar, float32 (float64 for float64 logits). With coefficients of at least 0 it is at
        least 0, up to rounding. 0 without rows.

    Raises:
        RuntimeError: shapes, dtypes or devices do not match.
    """
    return fused_loss.fused_loss("masked_cross_entropy", (logits, teacher, forget, coef), backend)


def masked_cross_entropy_and_grad(
    logits: Tensor, teacher: Tensor, forget: Tensor, coef: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Returns the loss of `masked_cross_entropy` (scalar) and its gradient, without autograd.

    The gradient is [B, C] in the dtype of ``logits``.
    """
    inputs = (logits, teacher, forget, coef)
    return fused_loss.loss_and_grad("masked_cross_entropy", inputs, backend)


@torch.library.register_fake("zsu_fast::masked_cross_entropy")
def _(logits: Tensor, teacher: Tensor, forget: Tensor, coef: Tensor) -> tuple[Tensor, Tensor]:
    check_devices(logits, teacher, forget, coef)
    torch._check(logits.ndim == 2, lambda: "logits must be [batch, classes]")
    torch._check(teacher.shape == logits.shape, lambda: "teacher must have the shape of logits")
    torch._check(forget.ndim == 1 and forget.shape[0] == logits.shape[1])
    torch._check(coef.ndim == 1 and coef.shape[0] == logits.shape[0])
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.new_empty((), dtype=wide), logits.new_empty(logits.shape)


fused_loss.register("masked_cross_entropy")
