"""Triton kernels of `zsu_fast.ops.ascent_step_`."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from ..validation import check_ascent_step
from .common import alignment


@triton.jit
def one_minus_exp(y):
    """1 - exp(y) for y <= 0; near 0 by a series, as the difference would lose five digits."""
    series = 1 + y / 8
    series = 1 + y / 7 * series
    series = 1 + y / 6 * series
    series = 1 + y / 5 * series
    series = 1 + y / 4 * series
    series = 1 + y / 3 * series
    series = 1 + y / 2 * series
    return tl.where(y > -0.5, -y * series, 1 - tl.exp(y))


@triton.jit
def ascent_step_kernel(
    x_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, step_ptr, active_ptr, low_ptr, high_ptr, lr_ptr,
    beta_ptr,
    blocks_per_row, row_size, lr_stride, channels, plane,
    beta1, beta2, gain1, gain2, log_beta1, log_beta2, eps,
    BOUNDS: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of one row per program; row_size in units of ALIGN elements, offsets in 64 bits.

    All programs are along one axis, the only one that takes more than 65,535 of them.
    """
    row = (tl.program_id(0) // blocks_per_row).to(tl.int64)
    if tl.load(active_ptr + row) != 0:
        n = row_size * ALIGN
        at = tl.program_id(0) % blocks_per_row * BLOCK + tl.arange(0, BLOCK)
        ok = at < n
        offset = row * n + at
        x = tl.load(x_ptr + offset, mask=ok, other=0.0)
        g = tl.load(grad_ptr + offset, mask=ok, other=0.0)
        g = g - 2 * tl.load(beta_ptr) * x
        t = (tl.load(step_ptr + row) + 1).to(tl.float32)
        m = beta1 * tl.load(exp_avg_ptr + offset, mask=ok, other=0.0) + gain1 * g
        v = beta2 * tl.load(exp_avg_sq_ptr + offset, mask=ok, other=0.0) + gain2 * (g * g)
        tl.store(exp_avg_ptr + offset, m, mask=ok)
        tl.store(exp_avg_sq_ptr + offset, v, mask=ok)
        mean = m / one_minus_exp(t * log_beta1)
        root = tl.sqrt_rn(v / one_minus_exp(t * log_beta2))
        direction = tl.div_rn(mean, root + eps)
        moved = x + tl.load(lr_ptr + row * lr_stride) * direction
        if BOUNDS > 1:
            channel = at % channels if CHANNELS_LAST else at // plane
            low = tl.load(low_ptr + channel, mask=ok, other=0.0)
            high = tl.load(high_ptr + channel, mask=ok, other=0.0)
        else:
            low = tl.load(low_ptr)
            high = tl.load(high_ptr)
        # not minimum and maximum: they would turn a NaN into a bound
        moved = tl.where(moved < low, low, moved)
        moved = tl.where(moved > high, high, moved)
        tl.store(x_ptr + offset, moved, mask=ok)


@triton_op("zsu_fast::ascent_step_triton_", mutates_args={"x", "exp_avg", "exp_avg_sq", "step"})
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
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """As `reference.ascent_step_`; x, grad and the moments are float32 and share one layout."""
    check_ascent_step(x, grad, exp_avg, exp_avg_sq, step, active, low, high, lr, beta)
    rows, size = x.shape[0], x.numel() // max(1, x.shape[0])
    if size:
        align = min(alignment(t, size) for t in (x, grad, exp_avg, exp_avg_sq))
        channels = x.shape[1] if x.ndim > 1 else 1
        block = 1024
        blocks_per_row = triton.cdiv(size, block)
        wrap_triton(ascent_step_kernel)[(rows * blocks_per_row,)](
            x, grad, exp_avg, exp_avg_sq, step, active.view(torch.uint8), low, high, lr, beta,
            blocks_per_row, size // align, int(lr.numel() > 1), channels, size // channels,
            beta1, beta2, 1 - beta1, 1 - beta2, math.log(beta1), math.log(beta2), eps,
            BOUNDS=low.numel(), CHANNELS_LAST=not x.is_contiguous(), ALIGN=align, BLOCK=block,
            num_warps=4,
        )  # fmt: skip
    step.add_(active)  # after every program has read it
