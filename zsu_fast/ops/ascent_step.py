"""One step of gradient ascent on a batch of class impressions (paper, equation 3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import backends
from .validation import check_devices


def ascent_step_(
    x: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    active: Tensor,
    low: Tensor,
    high: Tensor,
    lr: Tensor,
    beta: Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    *,
    backend: str | None = None,
) -> None:
    """One Adam ascent step on ``objective - beta * ||x||^2``, clamped to valid images, in place.

    Rows that are not active keep every bit of x, exp_avg, exp_avg_sq and step. A NaN stays NaN:
    clamping does not turn it into a bound. Everything that changes between steps is a tensor on
    the device, so a captured step can be replayed with new values.

    Args:
        x: float32 [N, ...], changed. Fastest if x, grad and the moments are all contiguous or all
            channels-last; any other layout costs copies.
        grad: float32 [N, ...], gradient of the objective without the L2 term.
        exp_avg, exp_avg_sq: float32 [N, ...], Adam's first and second moments, changed.
        step: int32 [N], steps taken by each row, changed.
        active: bool [N].
        low, high: float32, broadcastable to x: the valid range. One number or one per channel
            runs fused; other bounds run on the eager backend.
        lr: float32, scalar or one number per row ([N, 1, ...]); other shapes as for the bounds.
        beta: float32 scalar, weight of the L2 term.
        betas, eps: Adam's (Kingma and Ba, 2015, Algorithm 1).
        backend: see `backends`.

    Raises:
        RuntimeError: shapes, dtypes or devices do not match.
        BackendUnavailable: an explicit backend cannot run here, or not with these bounds.
    """
    if x.ndim == 0:
        raise RuntimeError("x must have a batch dimension")
    op, low, high, lr = _op_and_constants(x, low, high, lr, backend)
    tensors = (x, grad, exp_avg, exp_avg_sq)
    dense = x, grad, exp_avg, exp_avg_sq = _same_layout(tensors)
    with torch.no_grad():
        op(x, grad, exp_avg, exp_avg_sq, step, active, low, high, lr, beta, *betas, eps)
        for target, source in zip(tensors, dense, strict=True):
            if target is not source and target is not tensors[1]:
                target.copy_(source)


def _op_and_constants(
    x: Tensor, low: Tensor, high: Tensor, lr: Tensor, backend: str | None
) -> tuple[Callable[..., Any], Tensor, Tensor, Tensor]:
    """Returns the op to run, and bounds and lr in the shapes that it takes."""
    flat_low, flat_high, flat_lr = _per_channel(x, low), _per_channel(x, high), _per_row(x, lr)
    if flat_low is None or flat_high is None or flat_lr is None:
        wanted = backend or backends.forced_backend()
        if wanted not in (None, "auto", "eager", "compile"):
            raise backends.BackendUnavailable(
                f"backend {wanted!r} needs bounds per channel and lr per row; use 'eager'"
            )
        op = backends.choose("ascent_step_", x.device, wanted or "eager")
        return op, low.expand(x.shape), high.expand(x.shape), lr.expand(x.shape)
    op = backends.choose("ascent_step_", x.device, backend)
    count = max(flat_low.numel(), flat_high.numel())
    return op, flat_low.expand(count).contiguous(), flat_high.expand(count).contiguous(), flat_lr


def _per_channel(x: Tensor, bound: Tensor) -> Tensor | None:
    """Returns ``bound`` as [1] or [channels]; None if it varies along other dimensions."""
    if bound.numel() == 1:
        return bound.reshape(1)
    padded = (1,) * (x.ndim - bound.ndim) + tuple(bound.shape)
    if x.ndim > 1 and padded == (1, x.shape[1], *(1,) * (x.ndim - 2)):
        return bound.reshape(-1)
    return None


def _per_row(x: Tensor, lr: Tensor) -> Tensor | None:
    """Returns ``lr`` as [1] or [N]; None if it varies within a row."""
    if lr.numel() == 1:
        return lr.reshape(1)
    return lr.reshape(-1) if tuple(lr.shape) == (x.shape[0], *(1,) * (x.ndim - 1)) else None


def _same_layout(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Returns the tensors if all are contiguous or all channels-last, else contiguous copies."""
    if all(t.is_contiguous() for t in tensors):
        return tensors
    if tensors[0].ndim == 4:
        if all(t.is_contiguous(memory_format=torch.channels_last) for t in tensors):
            return tensors
        x, grad, *moments = tensors
        if all(t.is_contiguous(memory_format=torch.channels_last) for t in (x, *moments)):
            return (x, grad.contiguous(memory_format=torch.channels_last), *moments)
    return tuple(t.contiguous() for t in tensors)


@torch.library.register_fake("zsu_fast::ascent_step_")
def _(
    x: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    active: Tensor,
    *others: Any,
    **_: Any,
) -> None:
    tensors = (t for t in others if isinstance(t, Tensor))
    check_devices(x, grad, exp_avg, exp_avg_sq, step, active, *tensors)
    torch._check(grad.shape == x.shape, lambda: "grad must have the shape of x")
    torch._check(exp_avg.shape == x.shape and exp_avg_sq.shape == x.shape)
    torch._check(step.shape[0] == x.shape[0] and active.shape[0] == x.shape[0])
