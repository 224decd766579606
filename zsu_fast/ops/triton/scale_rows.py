"""Triton kernel of `zsu_fast.ops.scale_rows`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from ..validation import check_scale_rows
from .common import accumulator

PROGRAMS = 512  # that take turns with rows


@triton.jit
def scale_rows_kernel(
    rows_ptr, row_stride, coef_ptr, grad_ptr, last, rows, classes, ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Each program takes every `PROGRAMS`-th row. If all factors are 1, each leaves at once.

    The factor is ``grad[0]`` for a negative coef and ``grad[last]`` otherwise.
    """
    of_negative = tl.load(grad_ptr).to(ACC)
    of_others = tl.load(grad_ptr + last).to(ACC)
    if (of_negative != 1) | (of_others != 1):  # the device decides: Python never waits for it
        for row in range(tl.program_id(0), rows, tl.num_programs(0)):
            factor = tl.where(tl.load(coef_ptr + row) < 0, of_negative, of_others)
            if factor != 1:
                p = rows_ptr + tl.cast(row, tl.int64) * row_stride
                for begin in range(0, classes, BLOCK):
                    at = begin + tl.arange(0, BLOCK)
                    value = tl.load(p + at, mask=at < classes).to(ACC) * factor
                    tl.store(p + at, value.to(rows_ptr.dtype.element_ty), mask=at < classes)


@triton_op("zsu_fast::scale_rows_triton_", mutates_args={"rows"})
def scale_rows_(rows: Tensor, coef: Tensor, grad: Tensor) -> None:
    """As `reference.scale_rows_`."""
    check_scale_rows(rows, coef, grad)
    count, classes = rows.shape
    if count:
        block = min(4096, max(16, triton.next_power_of_2(classes)))
        wrap_triton(scale_rows_kernel)[(min(count, PROGRAMS),)](
            rows, rows.stride(0), coef.contiguous(), grad.reshape(-1).contiguous(),
            grad.numel() - 1, count, classes, ACC=accumulator(rows), BLOCK=block, num_warps=4,
        )  # fmt: skip
