"""Masked cross-entropy: be the original model with the forgotten classes taken out (DESIGN)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference


def masked_cross_entropy(logits: Tensor, teacher: Tensor, forget: Tensor, coef: Tensor) -> Tensor:
    """``sum(coef * KL(masked softmax of teacher || softmax of logits))``, differentiable in logits.

    Args:
        logits: float [B, C], the student's.
        teacher: float [B, C], the original model's, unmasked.
        forget: bool [C].
        coef: float [B], weight / N; 0 leaves the row out.

    Returns:
        Scalar, at least 0 for coefficients that are.
    """
    loss: Tensor = _MaskedCrossEntropy.apply(logits, teacher, forget, coef)
    return loss


class _MaskedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, teacher: Tensor, forget: Tensor, coef: Tensor) -> Tensor:
        loss, dlogits = reference.masked_cross_entropy(logits, teacher, forget, coef)
        ctx.save_for_backward(dlogits)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:
        (dlogits,) = ctx.saved_tensors
        return dlogits * grads[0].to(dlogits.dtype), None, None, None
