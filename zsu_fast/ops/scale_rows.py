"""Multiply the rows of a saved gradient, in place: the backward pass of `fused_loss`."""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends
from .validation import check_devices


def scale_rows_(rows: Tensor, coef: Tensor, grad: Tensor, *, backend: str | None = None) -> None:
    """Multiply each row by the gradient of its term: ``grad[0]`` where coef < 0, else ``grad[-1]``.

    The device decides whether a factor is 1, in which case nothing is read or written: Python
    never waits for it. Autograd does not track it: `fused_loss` owns the gradient it scales.

    Args:
        rows: float32, float64, float16 or bfloat16 [B, C], changed; classes contiguous.
        coef: float [B], the coefficients of the loss.
        grad: the incoming gradient: [2] (forget, retain), or a scalar for every row, in float32
            (float64 for float64 rows).
        backend: see `backends`.

    Raises:
        RuntimeError: shapes, dtypes or devices do not match.
    """
    backends.choose("scale_rows_", rows.device, backend)(rows, coef, grad)


@torch.library.register_fake("zsu_fast::scale_rows_")
def _(rows: Tensor, coef: Tensor, grad: Tensor) -> None:
    check_devices(rows, coef, grad)
    torch._check(rows.ndim == 2, lambda: "rows must be [batch, classes]")
