"""The truth about every op, in plain torch: slow, exact, and able to run in float64.

Kernels are tested against these functions, and the package falls back to them. Arithmetic is in
float32 for half types and float32, in float64 for float64; results are rounded once, at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def signed_cross_entropy(logits: Tensor, target: Tensor, coef: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each row times its coefficient, with the gradient, accurate where p -> 1.

    For a saturated row ``softmax - onehot`` rounds to 0 at the target. Here it is minus the sum
    of the *other* probabilities, and the loss of a row whose target leads is ``log1p`` of that
    sum's odds: neither subtracts two numbers that are nearly equal.

    Args:
        logits: float [B, C].
        target: int64 [B], values in 0..C-1.
        coef: float [B], sign x weight / N; 0 leaves a row out.

    Returns:
        losses: [2], the sums of ``coef * CE`` over rows with negative and with positive coef.
        dlogits: [B, C] in the dtype of ``logits``, the gradient of ``losses.sum()``.
    """
    x, c = _wide(logits), coef.to(_wide(logits).dtype)
    rows = torch.arange(len(x), device=x.device)
    top = x.max(1, keepdim=True).values
    e = (x - top).exp()
    others = e.clone()
    others[rows, target] = 0
    rest = others.sum(1)
    at_target = e[rows, target]
    denominator = at_target + rest
    shifted = x[rows, target] - top[:, 0]
    loss = torch.where(shifted == 0, rest.log1p(), denominator.log() - shifted)
    used = c != 0
    loss = torch.where(used, c * loss, torch.zeros_like(loss))
    dlogits = others / denominator[:, None]
    dlogits[rows, target] = -rest / denominator
    dlogits = torch.where(used[:, None], c[:, None] * dlogits, torch.zeros_like(dlogits))
    losses = torch.stack([loss[c < 0].sum(), loss[c > 0].sum()])
    return losses, dlogits.to(logits.dtype)


def masked_cross_entropy(
    logits: Tensor, teacher: Tensor, forget: Tensor, coef: Tensor
) -> tuple[Tensor, Tensor]:
    """KL from the teacher's softmax without the forgotten classes to the student's softmax.

    ``q`` is the teacher's softmax over the retain classes, renormalised (0 at the forgotten
    ones), ``p`` the student's over all classes: ``loss = sum(coef * KL(q || p))`` and
    ``dlogits = coef * (p - q)``. It is 0 exactly where the student equals the masked teacher.

    Args:
        logits: float [B, C], the student's.
        teacher: float [B, C], the original model's, unmasked.
        forget: bool [C], True at forgotten classes; at least one is False.
        coef: float [B], weight / N; 0 leaves a row out.

    Returns:
        loss: scalar.
        dlogits: [B, C] in the dtype of ``logits``.
    """
    x, c = _wide(logits), coef.to(_wide(logits).dtype)
    log_p = x.log_softmax(1)
    log_q = _wide(teacher).to(x.dtype).masked_fill(forget, -torch.inf).log_softmax(1)
    q = log_q.exp()
    terms = torch.where(forget, torch.zeros_like(q), q * (log_q - log_p))
    used = c != 0
    loss = torch.where(used, c * terms.sum(1), torch.zeros_like(c)).sum()
    dlogits = torch.where(used[:, None], c[:, None] * (log_p.exp() - q), torch.zeros_like(q))
    return loss, dlogits.to(logits.dtype)


def ascent_step_(
    x: Tensor,
    grad: Tensor,
    moment: Tensor,
    variance: Tensor,
    step: Tensor,
    active: Tensor,
    low: Tensor,
    high: Tensor,
    lr: Tensor,
    beta: Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> None:
    """One Adam ascent step on ``objective - beta * ||x||^2``, clamped to valid images, in place.

    Rows that are not active keep every bit of x, moment, variance and step. A NaN in the gradient
    stays visible: clamping does not turn it into a bound.

    Args:
        x: float32 [N, ...], changed.
        grad: float32 [N, ...], gradient of the objective (without the L2 term).
        moment, variance: float32 [N, ...], Adam's first and second moment, changed.
        step: int32 [N], steps taken by each row, changed.
        active: bool [N].
        low, high: float32, broadcastable to x: the valid range.
        lr: float32, scalar or broadcastable to x.
        beta: float32 scalar, weight of the L2 term.
        betas, eps: Adam's (Kingma and Ba, 2015, Algorithm 1).
    """
    b1, b2 = betas
    shape = (-1, *[1] * (x.ndim - 1))
    rows = active.view(shape)
    g = grad - 2 * beta * x
    m = b1 * moment + (1 - b1) * g
    v = b2 * variance + (1 - b2) * g * g
    t = (step + 1).double().view(shape)
    # 1 - b**t loses five digits in float32 at t = 1; expm1 keeps them
    fix1 = -torch.expm1(t * torch.log(torch.tensor(b1, dtype=torch.float64)))
    fix2 = -torch.expm1(t * torch.log(torch.tensor(b2, dtype=torch.float64)))
    update = (m / fix1.to(x.dtype)) / ((v / fix2.to(x.dtype)).sqrt() + eps)
    moved = torch.minimum(torch.maximum(x + lr * update, low), high)
    x.copy_(torch.where(rows, moved, x))
    moment.copy_(torch.where(rows, m, moment))
    variance.copy_(torch.where(rows, v, variance))
    step.add_(active.to(step.dtype))
