"""What the row kernels share: tiles, alignment, and the sum of row losses in a fixed order."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

ONE_PASS_LIMIT = 8192  # classes; longer rows would not fit in registers and are read twice
LOOP_BLOCK = 4096


def row_tile(classes: int) -> dict[str, int]:
    """ROWS x BLOCK elements a program, at most 32 a thread so that nothing spills."""
    if classes > ONE_PASS_LIMIT:
        return {"ROWS": 1, "BLOCK": LOOP_BLOCK, "num_warps": 8}
    block = max(16, triton.next_power_of_2(classes))
    rows = max(1, 256 // block)  # several short rows a program
    return {"ROWS": rows, "BLOCK": block, "num_warps": min(16, max(1, rows * block // 256))}


def alignment(t: Tensor, row_stride: int) -> int:
    """Elements, a power of two, that row starts are known to be multiples of (16 bytes at most).

    Triton specialises on divisibility by 16 only. 1000 classes are 8 x 125: without this fact not
    one load of such rows is vectorised.
    """
    align = 16 // t.element_size()
    while align > 1 and (row_stride % align or t.data_ptr() % (align * t.element_size())):
        align //= 2
    return align


def accumulator(t: Tensor) -> Any:
    """The type sums are taken in."""
    return tl.float64 if t.dtype == torch.float64 else tl.float32


@triton.jit
def sum_rows_kernel(
    row_loss_ptr, coef_ptr, losses_ptr, rows, SPLIT: tl.constexpr, BLOCK: tl.constexpr
):
    """Losses of forget and retain rows (one sum unless SPLIT), in one order: no atomics."""
    acc = row_loss_ptr.dtype.element_ty
    forget = tl.zeros([BLOCK], dtype=acc)
    retain = tl.zeros([BLOCK], dtype=acc)
    for begin in range(0, rows, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        loss = tl.load(row_loss_ptr + at, mask=at < rows, other=0.0)
        negative = tl.load(coef_ptr + at, mask=at < rows, other=0.0) < 0
        if SPLIT:
            forget += tl.where(negative, loss, 0.0)
            retain += tl.where(negative, 0.0, loss)
        else:
            retain += loss
    if SPLIT:
        tl.store(losses_ptr, tl.sum(forget, 0))
        tl.store(losses_ptr + 1, tl.sum(retain, 0))
    else:
        tl.store(losses_ptr, tl.sum(retain, 0))


def sum_rows(row_loss: Tensor, coef: Tensor, split: bool) -> Tensor:
    """[2] (forget, retain) if split, else a scalar."""
    losses = row_loss.new_empty((2,) if split else ())
    wrap_triton(sum_rows_kernel)[(1,)](
        row_loss, coef, losses, len(row_loss), SPLIT=split, BLOCK=1024, num_warps=4
    )
    return losses
