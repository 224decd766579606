"""Triton kernels of `zsu_fast.ops.ascent_step_`."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from .common import alignment

MODES = {"adam": 0, "sgd": 1, "sign": 2}


@triton.jit
def one_minus_exp(y):
    """1 - exp(y) for y <= 0, by its series near 0, where the difference would lose five digits."""
    series = 1 + y / 8
    series = 1 + y / 7 * series
    series = 1 + y / 6 * series
    series = 1 + y / 5 * series
    series = 1 + y / 4 * series
    series = 1 + y / 3 * series
    series = 1 + y / 2 * series
    return tl.where(y > -0.5, -y * series, 1 - tl.exp(y))


@triton.jit
def philox(seed, element, row, step):
    """First word of Philox-4x32-10, as in csrc/math.h."""
    c0 = (element & 0xFFFFFFFF).to(tl.uint32)
    c1 = (element >> 32).to(tl.uint32)
    c2 = row.to(tl.uint32)
    c3 = step.to(tl.uint32)
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    a = tl.full(c0.shape, 0xD2511F53, tl.uint32)
    b = tl.full(c0.shape, 0xCD9E8D57, tl.uint32)
    c2 = tl.zeros(c0.shape, tl.uint32) + c2
    c3 = tl.zeros(c0.shape, tl.uint32) + c3
    for _ in tl.static_range(10):
        n0 = tl.umulhi(b, c2) ^ c1 ^ k0
        n2 = tl.umulhi(a, c0) ^ c3 ^ k1
        c1 = b * c2
        c3 = a * c0
        c0 = n0
        c2 = n2
        k0 = k0 + tl.full([], 0x9E3779B9, tl.uint32)
        k1 = k1 + tl.full([], 0xBB67AE85, tl.uint32)
    return c0


@triton.jit
def grad_scale_kernel(grad_ptr, scale_ptr, row_size, ALIGN: tl.constexpr, BLOCK: tl.constexpr):
    """1 / ||grad|| of one row a program; 0 for a zero row, NaN for one that holds a NaN."""
    row = tl.program_id(0).to(tl.int64)
    n = row_size * ALIGN
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for begin in range(0, n, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        g = tl.load(grad_ptr + row * n + at, mask=at < n, other=0.0)
        total += g * g
    norm = tl.sqrt(tl.sum(total, 0))
    tl.store(scale_ptr + row, tl.where(norm == 0, 0.0, 1 / norm))


@triton.jit
def ascent_step_kernel(
    x_ptr, grad_ptr, moment_ptr, variance_ptr, step_ptr, active_ptr, low_ptr, high_ptr, lr_ptr,
    beta_ptr, scale_ptr, jitter_ptr, seed_ptr, found_nan_ptr,
    row_size, lr_stride, channels, plane, beta1, beta2, gain1, gain2, log_beta1, log_beta2, eps,
    MODE: tl.constexpr, NORMALIZE: tl.constexpr, JITTER: tl.constexpr, FLAG: tl.constexpr,
    BOUNDS: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of one row a program; row_size in units of ALIGN elements, offsets in 64 bits."""
    row = tl.program_id(1).to(tl.int64)
    if tl.load(active_ptr + row) != 0:
        n = row_size * ALIGN
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        ok = at < n
        offset = row * n + at
        x = tl.load(x_ptr + offset, mask=ok, other=0.0)
        raw = tl.load(grad_ptr + offset, mask=ok, other=0.0)
        g = raw
        if NORMALIZE:
            g = g * tl.load(scale_ptr + row)
        g = g - 2 * tl.load(beta_ptr) * x
        taken = tl.load(step_ptr + row) + 1
        if MODE == 0:
            t = taken.to(tl.float32)
            m = beta1 * tl.load(moment_ptr + offset, mask=ok, other=0.0) + gain1 * g
            v = beta2 * tl.load(variance_ptr + offset, mask=ok, other=0.0) + gain2 * (g * g)
            tl.store(moment_ptr + offset, m, mask=ok)
            tl.store(variance_ptr + offset, v, mask=ok)
            mean = m / one_minus_exp(t * log_beta1)
            root = tl.sqrt_rn(v / one_minus_exp(t * log_beta2))
            direction = tl.div_rn(mean, root + eps)
        elif MODE == 1:
            direction = g
        else:
            direction = g - g + tl.where(g > 0, 1.0, tl.where(g < 0, -1.0, 0.0))
        moved = x + tl.load(lr_ptr + row * lr_stride) * direction
        channel = tl.zeros([BLOCK], tl.int32)
        if (BOUNDS > 1) | JITTER:
            channel = at % channels if CHANNELS_LAST else at // plane
        if JITTER:
            element = channel * plane + at // channels if CHANNELS_LAST else at
            bits = philox(tl.load(seed_ptr), element.to(tl.int64), row, taken) >> 8
            noise = (bits.to(tl.int32) - 8388608).to(tl.float32) * (1.0 / 8388608)
            moved += tl.load(jitter_ptr) * noise
        if BOUNDS > 1:
            low = tl.load(low_ptr + channel, mask=ok, other=0.0)
            high = tl.load(high_ptr + channel, mask=ok, other=0.0)
        else:
            low = tl.load(low_ptr)
            high = tl.load(high_ptr)
        # not minimum and maximum: they would turn a NaN into a bound
        moved = tl.where(moved < low, low, moved)
        moved = tl.where(moved > high, high, moved)
        tl.store(x_ptr + offset, moved, mask=ok)
        if FLAG:
            wrong = (raw + moved) * 0 != 0  # NaN where either is not finite
            if tl.max((ok & wrong).to(tl.int32), 0) != 0:
                tl.store(found_nan_ptr + row, 1)


@triton_op(
    "zsu_fast::ascent_step_triton_",
    mutates_args={"x", "moment", "variance", "step", "found_nan"},
)
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
    beta1: float,
    beta2: float,
    eps: float,
    rule: str,
    normalize: bool,
    jitter: Tensor | None,
    seed: Tensor | None,
    found_nan: Tensor | None,
) -> None:
    """As `reference.ascent_step_`; x, grad and the moments are laid out alike and float32.

    No defaults: torch 2.11 drops arguments that equal theirs, and then looks for found_nan.
    """
    if rule not in MODES:
        raise RuntimeError(f"mode must be adam, sgd or sign, got {rule}")
    if any(t.shape != x.shape for t in (grad, moment, variance)):
        raise RuntimeError("grad, moment and variance must have the shape of x")
    if any(t.dtype != torch.float32 for t in (x, grad, moment, variance)):
        raise RuntimeError("x, grad, moment and variance must be float32")
    rows, size = len(x), x[0].numel() if len(x) else 0
    if size == 0:
        return
    align = min(alignment(t, size) for t in (x, grad, moment, variance))
    scale = x.new_empty(rows if normalize else 0)
    if normalize:
        wrap_triton(grad_scale_kernel)[(rows,)](
            grad, scale, size // align, ALIGN=align, BLOCK=2048, num_warps=8
        )
    channels = x.shape[1] if x.ndim > 1 else 1
    block = 1024
    wrap_triton(ascent_step_kernel)[(triton.cdiv(size, block), rows)](
        x, grad, moment, variance, step, active.view(torch.uint8), low, high, lr, beta, scale,
        x if jitter is None else jitter, step if seed is None else seed,
        active.view(torch.uint8) if found_nan is None else found_nan.view(torch.uint8),
        size // align, int(lr.numel() > 1), channels, size // channels,
        beta1, beta2, 1 - beta1, 1 - beta2, math.log(beta1), math.log(beta2), eps,
        MODE=MODES[rule], NORMALIZE=normalize, JITTER=jitter is not None,
        FLAG=found_nan is not None, BOUNDS=low.numel(), CHANNELS_LAST=not x.is_contiguous(),
        ALIGN=align, BLOCK=block, num_warps=4,
    )  # fmt: skip
    step.add_(active)  # after every program has read it
