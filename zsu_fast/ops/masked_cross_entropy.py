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
    logits: Tensor,
    teacher: Tensor,
    forget: Tensor,
    coef: Tensor,
    *,
    index: Tensor | None = None,
    keep: Tensor | None = None,
    shift: float = 0.0,
    forget_only: bool = False,
    backend: str | None = None,
) -> Tensor:
    """The divergence from a masked teacher, plus the squared change of retained logits.

    With x the logits, z those of the teacher and s = ``shift`` at forgotten classes, else 0::

        sum over rows of coef * KL(masked softmax of z || softmax of x + s)
                         + keep * sum over retained classes of (x - z)^2

    Differentiable in ``logits``, once.

    Args:
        logits: float32, float64, float16 or bfloat16 [B, C], of the student, any strides.
        teacher: float [N, C], unmasked logits of the original model. Another dtype than that of
            ``logits`` is read in float32 (float64 for float64 logits).
        forget: bool [C], True at forgotten classes; at least one is False.
        coef: float [B], weight / N; 0 ignores the row, with all its terms.
        index: int64 [B], the row of ``teacher`` for each row of ``logits``, in 0..N-1. None if N is
            B and rows correspond.
        keep: float [B]; None for 0.
        shift: added to the logits of forgotten classes.
        forget_only: leave out the gradient of retained logits, as if they were constants.
        backend: see `backends`.

    Returns:
        Scalar, float32 (float64 for float64 logits). With coefficients of at least 0 it is at
        least 0, up to rounding. 0 without rows.

    Raises:
        RuntimeError: shapes, dtypes or devices do not match, or, on the CPU, an index is out of
            range; on other devices the loss and the row's gradient become NaN.
    """
    inputs = (logits, teacher, forget, coef, index, keep, shift, forget_only)
    return fused_loss.fused_loss("masked_cross_entropy", inputs, backend)


def masked_cross_entropy_and_grad(
    logits: Tensor,
    teacher: Tensor,
    forget: Tensor,
    coef: Tensor,
    *,
    index: Tensor | None = None,
    keep: Tensor | None = None,
    shift: float = 0.0,
    forget_only: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns the loss of `masked_cross_entropy` (scalar) and its gradient, without autograd.

    The gradient is [B, C] in the dtype of ``logits``.
    """
    inputs = (logits, teacher, forget, coef, index, keep, shift, forget_only)
    return fused_loss.loss_and_grad("masked_cross_entropy", inputs, backend)


@torch.library.register_fake("zsu_fast::masked_cross_entropy")
def _(
    logits: Tensor,
    teacher: Tensor,
    forget: Tensor,
    coef: Tensor,
    index: Tensor | None = None,
    keep: Tensor | None = None,
    shift: float = 0.0,  # noqa: ARG001
    forget_only: bool = False,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    check_devices(logits, teacher, forget, coef, *(t for t in (index, keep) if t is not None))
    torch._check(logits.ndim == 2, lambda: "logits must be [batch, classes]")
    rows, classes = logits.shape
    torch._check(teacher.ndim == 2 and teacher.shape[1] == classes)
    torch._check(index is not None or teacher.shape[0] == rows)
    torch._check(forget.ndim == 1 and forget.shape[0] == classes)
    for per_row in (coef, index, keep):
        torch._check(per_row is None or (per_row.ndim == 1 and per_row.shape[0] == rows))
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.new_empty((), dtype=wide), logits.new_empty(logits.shape)


fused_loss.register("masked_cross_entropy")
