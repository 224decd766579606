"""Triton kernels of `zsu_fast.ops.signed_cross_entropy`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from .. import fused_loss
from ..validation import check_signed_cross_entropy
from .common import (
    ONE_PASS_LIMIT,
    accumulator,
    accumulator_dtype,
    alignment,
    row_tile,
    sum_rows,
    with_dense_rows,
)


@triton.jit
def sum_of_others(
    x_rows, target, row_ok,
    CLASSES: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Largest logit of long rows, and the sum of exp(x - largest) without the target's term."""
    column = tl.arange(0, BLOCK)[None, :]
    top = tl.full([ROWS], float("-inf"), dtype=ACC)
    rest = tl.zeros([ROWS], dtype=ACC)
    for begin in range(0, CLASSES, BLOCK):
        at = begin + column
        x = tl.load(x_rows + at, mask=row_ok[:, None] & (at < CLASSES), other=float("-inf"))
        x = x.to(ACC)
        higher = tl.maximum(top, tl.max(x, 1))
        # if every logit so far is -inf, exp(-inf - -inf) would be NaN
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        e = tl.where(at == target[:, None], 0.0, tl.exp(x - shift[:, None]))
        rest = rest * tl.exp(top - shift) + tl.sum(e, 1)
        top = higher
    return top, rest


@triton.jit
def signed_cross_entropy_kernel(
    logits_ptr, logits_stride, dlogits_ptr, dlogits_stride, target_ptr, coef_ptr, row_loss_ptr,
    rows,
    CLASSES: tl.constexpr, LOOP: tl.constexpr, ALIGN_IN: tl.constexpr, ALIGN_OUT: tl.constexpr,
    ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows per program; strides in units of ALIGN elements, offsets in 64 bits.

    Logits are loaded whether or not a row is used, so that they don't wait for the coefficients.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_ok = row < rows
    target = tl.load(target_ptr + row, mask=row_ok, other=0)
    valid = (target >= 0) & (target < CLASSES)
    x_rows = logits_ptr + (row * logits_stride * ALIGN_IN)[:, None]
    dx_rows = dlogits_ptr + (row * dlogits_stride * ALIGN_OUT)[:, None]
    column = tl.arange(0, BLOCK)[None, :]

    if LOOP:
        x_target = tl.load(
            logits_ptr + row * logits_stride * ALIGN_IN + target, mask=row_ok & valid, other=0.0
        ).to(ACC)
        top, rest = sum_of_others(x_rows, target, row_ok, CLASSES, ACC, ROWS, BLOCK)
    else:
        x = tl.load(x_rows + column, mask=row_ok[:, None] & (column < CLASSES), other=float("-inf"))
        x = x.to(ACC)
        is_target = column == target[:, None]
        x_target = tl.sum(tl.where(is_target, x, 0.0), 1)
        top = tl.max(x, 1)
        e = tl.exp(x - top[:, None])
        others = tl.where(is_target, 0.0, e)
        rest = tl.sum(tl.where(column < CLASSES, others, 0.0), 1)

    coef = tl.load(coef_ptr + row, mask=row_ok, other=0.0)
    used = coef != 0
    shifted = x_target - top
    denominator = tl.exp(shifted) + rest
    lead = shifted == 0  # then the loss is log1p(rest), in a form that keeps a small rest
    loss = tl.log(denominator) + tl.where(lead, (rest - (denominator - 1)) / denominator, -shifted)
    # an invalid target gives NaN: the caller must notice it, and a kernel cannot raise
    factor = tl.where(valid, coef / denominator, float("nan"))
    loss = tl.where(used, tl.where(valid, coef * loss, float("nan")), 0.0)
    tl.store(row_loss_ptr + row, loss, mask=row_ok)

    # rest is 1 - p times the denominator; softmax minus one would round to 0 where p -> 1
    for begin in range(0, CLASSES, BLOCK):
        at = begin + column
        ok = row_ok[:, None] & (at < CLASSES)
        if LOOP:
            x = tl.load(x_rows + at, mask=ok, other=0.0)
            e = tl.exp(x.to(ACC) - top[:, None])
        dx = tl.where(at == target[:, None], -rest[:, None], e) * factor[:, None]
        dx = tl.where(used[:, None], dx, 0.0)
        tl.store(dx_rows + at, dx.to(dlogits_ptr.dtype.element_ty), mask=ok)


@triton_op("zsu_fast::signed_cross_entropy_triton", mutates_args=())
def signed_cross_entropy(logits: Tensor, target: Tensor, coef: Tensor) -> tuple[Tensor, Tensor]:
    """Losses [2] and dlogits [B, C], as `reference.signed_cross_entropy`."""
    check_signed_cross_entropy(logits, target, coef)
    rows, classes = logits.shape
    logits = with_dense_rows(logits)
    dtype = accumulator_dtype(logits)
    coef = coef.to(dtype).contiguous()
    dlogits = torch.empty((rows, classes), dtype=logits.dtype, device=logits.device)
    row_loss = torch.empty(rows, dtype=dtype, device=logits.device)
    if rows:
        strides = logits.stride(0), dlogits.stride(0)
        aligned = alignment(logits, strides[0]), alignment(dlogits, strides[1])
        tile = row_tile(classes)
        wrap_triton(signed_cross_entropy_kernel)[(triton.cdiv(rows, tile["ROWS"]),)](
            logits, strides[0] // aligned[0], dlogits, strides[1] // aligned[1],
            target.contiguous(), coef, row_loss, rows,
            CLASSES=classes, LOOP=classes > ONE_PASS_LIMIT, ALIGN_IN=aligned[0],
            ALIGN_OUT=aligned[1], ACC=accumulator(logits), **tile,
        )  # fmt: skip
    return sum_rows(row_loss, coef, split=True), dlogits


signed_cross_entropy.register_autograd(fused_loss.backward, setup_context=fused_loss.setup_context)
