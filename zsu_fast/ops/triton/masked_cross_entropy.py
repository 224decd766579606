"""Triton kernels of `zsu_fast.ops.masked_cross_entropy`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from .. import fused_loss
from ..validation import check_masked_cross_entropy
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
def masked_sums(
    x_rows, z_rows, forget_ptr, row_ok, shift,
    CLASSES: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Largest logit and softmax denominator of long rows of student and teacher, block by block."""
    column = tl.arange(0, BLOCK)[None, :]
    top_x = tl.full([ROWS], float("-inf"), dtype=ACC)
    top_z = tl.full([ROWS], float("-inf"), dtype=ACC)
    sum_x = tl.zeros([ROWS], dtype=ACC)
    sum_z = tl.zeros([ROWS], dtype=ACC)
    for begin in range(0, CLASSES, BLOCK):
        at = begin + column
        ok = row_ok[:, None] & (at < CLASSES)
        forgotten = tl.load(forget_ptr + at, mask=at < CLASSES, other=1) != 0
        x = tl.load(x_rows + at, mask=ok, other=float("-inf")).to(ACC)
        z = tl.load(z_rows + at, mask=ok, other=float("-inf")).to(ACC)
        x += tl.where(forgotten, shift, 0.0)
        z = tl.where(forgotten, float("-inf"), z)
        higher_x = tl.maximum(top_x, tl.max(x, 1))
        higher_z = tl.maximum(top_z, tl.max(z, 1))
        # in a block without a retain class, -inf - -inf would be NaN
        shift_x = tl.where(higher_x == float("-inf"), 0.0, higher_x)
        shift_z = tl.where(higher_z == float("-inf"), 0.0, higher_z)
        sum_x = sum_x * tl.exp(top_x - shift_x) + tl.sum(tl.exp(x - shift_x[:, None]), 1)
        sum_z = sum_z * tl.exp(top_z - shift_z) + tl.sum(tl.exp(z - shift_z[:, None]), 1)
        top_x = higher_x
        top_z = higher_z
    return top_x, top_z, sum_x, sum_z


@triton.jit
def masked_cross_entropy_kernel(
    logits_ptr, logits_stride, teacher_ptr, teacher_stride, teacher_rows, index_ptr, forget_ptr,
    dlogits_ptr, coef_ptr, keep_ptr, row_loss_ptr, rows, shift,
    CLASSES: tl.constexpr, INDEXED: tl.constexpr, KEEP: tl.constexpr, FORGET_ONLY: tl.constexpr,
    LOOP: tl.constexpr, ALIGN_X: tl.constexpr, ALIGN_Z: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows per program; the teacher's masked softmax stays in registers.

    Logits are loaded whether or not a row is used, so that they don't wait for the coefficients.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_ok = row < rows
    of_teacher = row
    valid = row_ok
    if INDEXED:
        of_teacher = tl.load(index_ptr + row, mask=row_ok, other=0)
        valid = (of_teacher >= 0) & (of_teacher < teacher_rows)
        of_teacher = tl.where(valid, of_teacher, 0)
    x_rows = logits_ptr + (row * logits_stride * ALIGN_X)[:, None]
    z_rows = teacher_ptr + (of_teacher * teacher_stride * ALIGN_Z)[:, None]
    dx_rows = dlogits_ptr + (row * CLASSES)[:, None]
    column = tl.arange(0, BLOCK)[None, :]

    if LOOP:
        top_x, top_z, sum_x, sum_z = masked_sums(
            x_rows, z_rows, forget_ptr, row_ok, shift, CLASSES, ACC, ROWS, BLOCK
        )
    else:
        ok = row_ok[:, None] & (column < CLASSES)
        x = tl.load(x_rows + column, mask=ok, other=float("-inf")).to(ACC)
        z = tl.load(z_rows + column, mask=ok, other=float("-inf")).to(ACC)
        forgotten = tl.load(forget_ptr + column, mask=column < CLASSES, other=1) != 0
        change = tl.where(forgotten, 0.0, x - z) if KEEP else x
        x += tl.where(forgotten, shift, 0.0)
        z = tl.where(forgotten, float("-inf"), z)
        top_x = tl.max(x, 1)
        top_z = tl.max(z, 1)
        ex = tl.exp(x - top_x[:, None])
        ez = tl.exp(z - top_z[:, None])
        sum_x = tl.sum(ex, 1)
        sum_z = tl.sum(ez, 1)

    coef = tl.load(coef_ptr + row, mask=row_ok, other=0.0)
    used = coef != 0
    # a teacher's row that does not exist gives NaN: the caller must notice it, and a kernel cannot
    # raise
    factor = tl.where(valid, coef, float("nan"))
    scale_x = factor / sum_x
    scale_z = factor / sum_z
    log_ratio = tl.log(sum_x) - tl.log(sum_z)
    loss = tl.zeros([ROWS], dtype=ACC)
    squares = tl.zeros([ROWS], dtype=ACC)
    if KEEP:
        keep = tl.load(keep_ptr + row, mask=row_ok, other=0.0)
        kept = keep != 0
    for begin in range(0, CLASSES, BLOCK):
        at = begin + column
        ok = row_ok[:, None] & (at < CLASSES)
        if LOOP:
            forgotten = tl.load(forget_ptr + at, mask=at < CLASSES, other=1) != 0
            x = tl.load(x_rows + at, mask=ok, other=0.0).to(ACC)
            z = tl.load(z_rows + at, mask=ok, other=0.0).to(ACC)
            change = tl.where(forgotten, 0.0, x - z) if KEEP else x
            x += tl.where(forgotten, shift, 0.0)
            ex = tl.exp(x - top_x[:, None])
            ez = tl.where(forgotten, 0.0, tl.exp(z - top_z[:, None]))
        log_q_over_p = (z - top_z[:, None]) - (x - top_x[:, None]) + log_ratio[:, None]
        loss += tl.sum(tl.where(ok & (ez != 0), ez * log_q_over_p, 0.0), 1)
        dx = ex * scale_x[:, None] - ez * scale_z[:, None]
        if KEEP:
            change = tl.where(
                ok & kept[:, None], change, 0.0
            )  # where keep is 0, it may be infinite
            squares += tl.sum(change * change, 1)
            dx += 2 * keep[:, None] * change
        if FORGET_ONLY:
            dx = tl.where(forgotten, dx, 0.0)
        dx = tl.where(used[:, None], dx, 0.0)
        tl.store(dx_rows + at, dx.to(dlogits_ptr.dtype.element_ty), mask=ok)
    loss = scale_z * loss
    if KEEP:
        loss += keep * squares
    tl.store(row_loss_ptr + row, tl.where(used, loss, 0.0), mask=row_ok)


@triton_op("zsu_fast::masked_cross_entropy_triton", mutates_args=())
def masked_cross_entropy(
    logits: Tensor,
    teacher: Tensor,
    forget: Tensor,
    coef: Tensor,
    index: Tensor | None = None,
    keep: Tensor | None = None,
    shift: float = 0.0,
    forget_only: bool = False,
) -> tuple[Tensor, Tensor]:
    """Loss (scalar) and dlogits [B, C], as `reference.masked_cross_entropy`."""
    check_masked_cross_entropy(logits, teacher, forget, coef, index, keep, shift, forget_only)
    rows, classes = logits.shape
    dtype = accumulator_dtype(logits)
    if teacher.dtype != logits.dtype:
        teacher = teacher.to(dtype)
    logits, teacher = with_dense_rows(logits), with_dense_rows(teacher)
    coef = coef.to(dtype).contiguous()
    dlogits = torch.empty((rows, classes), dtype=logits.dtype, device=logits.device)
    row_loss = torch.empty(rows, dtype=dtype, device=logits.device)
    if rows:
        aligned = alignment(logits, logits.stride(0)), alignment(teacher, teacher.stride(0))
        tile = row_tile(classes)
        wrap_triton(masked_cross_entropy_kernel)[(triton.cdiv(rows, tile["ROWS"]),)](
            logits, logits.stride(0) // aligned[0], teacher, teacher.stride(0) // aligned[1],
            len(teacher), coef if index is None else index.contiguous(),
            forget.contiguous().view(torch.uint8), dlogits, coef,
            coef if keep is None else keep.to(dtype).contiguous(), row_loss, rows, shift,
            CLASSES=classes, INDEXED=index is not None, KEEP=keep is not None,
            FORGET_ONLY=forget_only, LOOP=classes > ONE_PASS_LIMIT, ALIGN_X=aligned[0],
            ALIGN_Z=aligned[1], ACC=accumulator(logits), **tile,
        )  # fmt: skip
    return sum_rows(row_loss, coef, split=False), dlogits


masked_cross_entropy.register_autograd(fused_loss.backward, setup_context=fused_loss.setup_context)
