"""Masked cross-entropy: be the original model with the forgotten classes taken out (DESIGN)."""

from __future__ import annotations

import torch
from torch import Tensor

from . import fused_loss


def masked_cross_entropy(
    logits: Tensor, teacher: Tensor, forget: Tensor, coef: Tensor, *, backend: str | None = None
) -> Tensor:
    """``sum(coef * KL(masked softmax of teacher || softmax of logits))``, differentiable in logits.

    Args:
        logits: float32, float64, float16 or bfloat16 [B, C], the student's, any strides.
        teacher: float [B, C], the original model's, unmasked.
        forget: bool [C]; at least one class stays.
        coef: float [B], weight / N; 0 leaves the row out.
        backend: see `backends`.

    Returns:
        Scalar, float32 (float64 for float64 logits), at least 0 (but for rounding) for coefficients
        that are. No rows: 0.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit.
    """
    return fused_loss.fused_loss("masked_cross_entropy", (logits, teacher, forget, coef), backend)


def masked_cross_entropy_and_grad(
    logits: Tensor, teacher: Tensor, forget: Tensor, coef: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """The loss of `masked_cross_entropy` (scalar) and its gradient [B, C], without autograd."""
    inputs = (logits, teacher, forget, coef)
    return fused_loss.loss_and_grad("masked_cross_entropy", inputs, backend)


@torch.library.register_fake("zsu_fast::masked_cross_entropy")
def _(logits: Tensor, teacher: Tensor, forget: Tensor, coef: Tensor) -> tuple[Tensor, Tensor]:
    torch._check(logits.ndim == 2, lambda: "logits must be [batch, classes]")
    torch._check(teacher.shape == logits.shape, lambda: "teacher must have the shape of logits")
    torch._check(forget.ndim == 1 and forget.shape[0] == logits.shape[1])
    torch._check(coef.ndim == 1 and coef.shape[0] == logits.shape[0])
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.new_empty((), dtype=wide), logits.new_empty(logits.shape)


torch.library.register_autograd(
    "zsu_fast::masked_cross_entropy",
    fused_loss.backward,
    setup_context=fused_loss.setup_context,
)
