"""Triton kernel of `zsu_fast.ops.scale_rows`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from ..validation import check_scale_rows
from .common import accumulator


@triton.jit
def scale_rows_kernel(
    rows_ptr, row_stride, coef_ptr, grad_ptr, last, classes, ACC: tl.constexpr, BLOCK: tl.constexpr
):
    """One block of one row per program. A factor of 1 costs no memory traffic.

    The factor is ``grad[0]`` for a negative coef and ``grad[last]`` otherwise.
    """
    row = tl.program_id(0).to(tl.int64)
    negative = tl.load(coef_ptr + row) < 0
    factor = tl.load(grad_ptr + tl.where(negative, 0, last)).to(ACC)
    if factor != 1:  # the device decides: Python never waits for it
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        pointers = rows_ptr + row * row_stride + at
        value = tl.load(pointers, mask=at < classes).to(ACC) * factor
        tl.store(pointers, value.to(rows_ptr.dtype.element_ty), mask=at < classes)


@triton_op("zsu_fast::scale_rows_triton_", mutates_args={"rows"})
def scale_rows_(rows: Tensor, coef: Tensor, grad: Tensor) -> None:
    """As `reference.scale_rows_`."""
    check_scale_rows(rows, coef, grad)
    count, classes = rows.shape
    if count:
        block = min(4096, max(16, triton.next_power_of_2(classes)))
        wrap_triton(scale_rows_kernel)[(count, triton.cdiv(classes, block))](
            rows, rows.stride(0), coef.contiguous(), grad.reshape(-1).contiguous(),
            grad.numel() - 1, classes, ACC=accumulator(rows), BLOCK=block, num_warps=4,
        )  # fmt: skip
