"""Signed cross-entropy: descend on retain rows, ascend on forget rows (paper, equations 4 to 6)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference


def signed_cross_entropy(logits: Tensor, target: Tensor, coef: Tensor) -> Tensor:
    """``sum(coef * CE(logits, target))`` by term, differentiable in ``logits``.

    Args:
        logits: float [B, C].
        target: int64 [B].
        coef: float [B], one coefficient a row: sign x weight / N; 0 leaves the row out.

    Returns:
        Float [2]: the sum over rows with a negative coef (forget) and with a positive one
        (retain). Their sum is the loss; both carry gradients.
    """
    losses: Tensor = _SignedCrossEntropy.apply(logits, target, coef)
    return losses


class _SignedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, coef: Tensor) -> Tensor:
        losses, dlogits = reference.signed_cross_entropy(logits, target, coef)
        ctx.save_for_backward(dlogits, coef)
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        (grad,) = grads
        dlogits, coef = ctx.saved_tensors
        by_row = torch.where(coef < 0, grad[0], grad[1]).to(dlogits.dtype)
        return dlogits * by_row[:, None], None, None
