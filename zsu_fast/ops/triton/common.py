"""Shared by the Triton kernels: tiles, alignment, and the sum of row losses in a fixed order."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

ONE_PASS_LIMIT = 8192  # classes; longer rows do not fit in registers and are read twice
LOOP_BLOCK = 4096
SUM_BLOCK = 4096  # row losses that one program sums


def row_tile(classes: int) -> dict[str, int]:
    """ROWS x BLOCK elements per program, at most 32 per thread so that nothing spills."""
    if classes > ONE_PASS_LIMIT:
        return {"ROWS": 1, "BLOCK": LOOP_BLOCK, "num_warps": 8}
    block = max(16, triton.next_power_of_2(classes))
    rows = max(1, 256 // block)  # several short rows per program
    return {"ROWS": rows, "BLOCK": block, "num_warps": min(16, max(1, rows * block // 256))}


def alignment(t: Tensor, row_stride: int) -> int:
    """Largest power of two of elements (at most 16 bytes) that divides the offset of every row.

    Triton specialises on divisibility by 16 only. 1000 classes are 8 x 125: without this hint
    no load of such rows is vectorised.
    """
    align = 16 // t.element_size()
    while align > 1 and (row_stride % align or t.data_ptr() % (align * t.element_size())):
        align //= 2
    return align


def accumulator(t: Tensor) -> Any:
    """Triton's type for sums over ``t``."""
    return tl.float64 if t.dtype == torch.float64 else tl.float32


def accumulator_dtype(t: Tensor) -> torch.dtype:
    """The dtype of `accumulator`: that of losses and coefficients."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def with_dense_rows(t: Tensor) -> Tensor:
    """``t`` [B, C] with contiguous classes; rows may be any distance apart."""
    return t if t.shape[1] <= 1 or t.stride(1) == 1 else t.contiguous()


@triton.jit
def sum_rows_kernel(
    row_loss_ptr, coef_ptr, sums_ptr, rows, SPLIT: tl.constexpr, BLOCK: tl.constexpr
):
    """Sum the losses of a block of forget and retain rows, apart if SPLIT, in one order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    loss = tl.load(row_loss_ptr + at, mask=at < rows, other=0.0)
    if SPLIT:
        negative = tl.load(coef_ptr + at, mask=at < rows, other=0.0) < 0
        tl.store(sums_ptr + tl.program_id(0), tl.sum(tl.where(negative, loss, 0.0), 0))
        retain = tl.sum(tl.where(negative, 0.0, loss), 0)
        tl.store(sums_ptr + tl.num_programs(0) + tl.program_id(0), retain)
    else:
        tl.store(sums_ptr + tl.program_id(0), tl.sum(loss, 0))


def sum_rows(row_loss: Tensor, coef: Tensor, split: bool) -> Tensor:
    """[2] (forget, retain) if split, else a scalar; no atomics, so that the order is fixed."""
    blocks = max(1, triton.cdiv(len(row_loss), SUM_BLOCK))
    sums = row_loss.new_empty((2 if split else 1, blocks))
    wrap_triton(sum_rows_kernel)[(blocks,)](
        row_loss, coef, sums, len(row_loss), SPLIT=split, BLOCK=SUM_BLOCK, num_warps=4
    )
    losses = sums[:, 0] if blocks == 1 else sums.sum(1)
    return losses if split else losses[0]
