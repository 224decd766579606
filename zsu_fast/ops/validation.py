"""Checks of the arguments of every op, in Python: the rules and the words of ``csrc/checks.h``.

Backends without native code run them: Triton, which would read out of bounds, and plain torch,
which would broadcast or convert in silence.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _check(condition: bool, problem: str) -> None:
    if not condition:
        raise RuntimeError(problem)


def accumulator_dtype(t: Tensor) -> torch.dtype:
    """The dtype of losses and coefficients of logits ``t``."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _check_float(t: Tensor, name: str) -> None:
    _check(t.dtype in _FLOATS, f"{name} must be float32, float64, float16 or bfloat16")


def _check_device(t: Tensor, first: Tensor, name: str) -> None:
    _check(t.device == first.device, f"{name} must be on the device of the first argument")


def check_devices(first: Tensor, *others: Tensor) -> None:
    """Checks that all tensors are on one device; for fake implementations, which run whenever any
    of them is on the meta device.
    """
    for t in others:
        torch._check(t.device == first.device, lambda: "all tensors must be on one device")


def _check_logits(logits: Tensor) -> None:
    _check(logits.ndim == 2, f"logits must be [batch, classes], got {logits.ndim} dimensions")
    rows, classes = logits.shape
    _check(rows == 0 or classes > 0, "logits must have at least one class")
    _check_float(logits, "logits")


def _check_per_row(t: Tensor, logits: Tensor, name: str) -> None:
    rows = logits.shape[0]
    _check(t.ndim == 1 and t.shape[0] == rows, f"{name} must be [batch] = [{rows}]")
    _check_device(t, logits, name)


def check_signed_cross_entropy(logits: Tensor, target: Tensor, coef: Tensor) -> None:
    """Checks all but the values of ``target``.

    Raises:
        RuntimeError: an argument can't be used; the message names it.
    """
    _check_logits(logits)
    _check_per_row(target, logits, "target")
    _check(target.dtype in (torch.int64, torch.int32), "target must be int64 or int32")
    _check_per_row(coef, logits, "coef")
    _check_float(coef, "coef")


def check_masked_cross_entropy(
    logits: Tensor, teacher: Tensor, forget: Tensor, coef: Tensor, index: Tensor | None = None,
    keep: Tensor | None = None, *_: Any,
) -> None:  # fmt: skip
    """Checks all but the values of ``index``, as `check_signed_cross_entropy`."""
    _check_logits(logits)
    _check_per_row(coef, logits, "coef")
    _check_float(coef, "coef")
    _check_float(teacher, "teacher")
    _check_device(teacher, logits, "teacher")
    _check_device(forget, logits, "forget")
    rows, classes = logits.shape
    if index is None:
        _check(teacher.shape == logits.shape, "teacher must have the shape of logits")
    else:
        _check_per_row(index, logits, "index")
        _check(index.dtype == torch.int64, "index must be int64")
        wide = teacher.ndim == 2 and teacher.shape[1] == classes
        _check(wide, f"teacher must be [rows, {classes}]")
        _check(rows == 0 or teacher.shape[0] > 0, "teacher must have rows for the index")
    if keep is not None:
        _check_per_row(keep, logits, "keep")
        _check_float(keep, "keep")
    _check(
        forget.ndim == 1 and forget.shape[0] == classes and forget.dtype == torch.bool,
        f"forget must be bool [classes] = [{classes}]",
    )


def check_scale_rows(rows: Tensor, coef: Tensor, grad: Tensor) -> None:
    """Checks all arguments, as `check_signed_cross_entropy`."""
    _check_logits(rows)
    _check_per_row(coef, rows, "coef")
    flat = grad.numel() == 1 or (grad.ndim == 1 and grad.numel() == 2)
    _check(flat, "grad must hold 1 or 2 numbers")
    _check(grad.dtype == accumulator_dtype(rows), "grad must have the dtype of the loss")
    dense = rows.shape[1] <= 1 or rows.stride(1) == 1
    _check(dense, "the classes of a row must be contiguous")
    _check_device(grad, rows, "grad")


def check_ascent_step(
    x: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, active: Tensor,
    low: Tensor, high: Tensor, lr: Tensor, beta: Tensor, *_: float, flat: bool = True,
) -> None:  # fmt: skip
    """Checks all arguments, as `check_signed_cross_entropy`.

    Args:
        x, grad, exp_avg, exp_avg_sq, step, active, low, high, lr, beta: of the op.
        flat: whether bounds and lr must be flat, as kernels take them; else they must have, or be
            broadcast to, the shape of x.
    """
    _check(x.ndim >= 1, "x must have a batch dimension")
    state = {"x": x, "grad": grad, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    last = flat and x.numel() > 0 and not x.is_contiguous()
    layout = torch.channels_last if last and x.ndim == 4 else torch.contiguous_format
    for name, t in state.items():
        _check_device(t, x, name)
        _check(t.dtype == torch.float32, f"{name} must be float32")
        _check(t.shape == x.shape, f"{name} must have the shape of x")
        _check(
            not flat or t.numel() == 0 or t.is_contiguous(memory_format=layout),
            f"{name} must be contiguous or channels-last, with the layout of x",
        )
    rows, channels = x.shape[0], x.shape[1] if x.ndim > 1 else 1

    def check_flat(t: Tensor, dtype: torch.dtype, count: int, name: str, what: str) -> None:
        _check_device(t, x, name)
        fits = t.dtype == dtype and t.numel() == count and t.is_contiguous()
        _check(fits, f"{name} must be {what}")

    check_flat(step, torch.int32, rows, "step", "int32 [rows], contiguous")
    check_flat(active, torch.bool, rows, "active", "bool [rows], contiguous")
    check_flat(beta, torch.float32, 1, "beta", "float32, one number")
    if not flat:
        for name, t in (("low", low), ("high", high), ("lr", lr)):
            _check_device(t, x, name)
            _check(t.dtype == torch.float32, f"{name} must be float32")
        return
    bounds = low.numel()
    _check(bounds in (1, channels), "low must hold 1 or x.shape[1] numbers")
    check_flat(low, torch.float32, bounds, "low", "float32, contiguous")
    check_flat(high, torch.float32, bounds, "high", "float32, contiguous, as long as low")
    _check(lr.numel() in (1, rows), "lr must hold 1 or rows numbers")
    check_flat(lr, torch.float32, lr.numel(), "lr", "float32, contiguous")


def check_winograd_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor | None, outputs: int,
    padding: int, *_: float,
) -> None:  # fmt: skip
    """Checks all arguments, as `check_signed_cross_entropy`."""
    _check(x.ndim == 4, f"x must be [batch, inputs, height, width], got {x.ndim} dimensions")
    _check(x.dtype == torch.float32, "x must be float32")
    last = x.numel() == 0 or x.is_contiguous(memory_format=torch.channels_last)
    _check(last, "x must be channels-last")
    _check_device(weight, x, "weight")
    inputs = x.shape[1]
    fits = weight.ndim == 4 and weight.shape[0] == 36 and weight.shape[2] == inputs > 0
    _check(
        fits and weight.dtype == torch.float32 and weight.is_contiguous(),
        "weight must be float32 [36, blocks, inputs, block], contiguous, with the inputs of x",
    )
    blocks, block = weight.shape[1], weight.shape[3]
    _check(block in (16, 32, 48, 64), "a block of weight must have 16, 32, 48 or 64 outputs")
    last_block = (blocks - 1) * block < outputs <= blocks * block
    _check(outputs > 0 and last_block, "outputs must end in the last block of weight")
    _check(padding in (0, 1, 2), "padding must be 0, 1 or 2")
    large = all(size + 2 * padding >= 3 for size in x.shape[2:])
    _check(large, "x must be at least 3x3 with its padding")
    if other is not None:
        _check_device(other, x, "other")
        height, width = (size + 2 * padding - 2 for size in x.shape[2:])
        last = other.ndim == 4 and other.is_contiguous(memory_format=torch.channels_last)
        _check(
            other.shape == (len(x), outputs, height, width)
            and other.dtype == torch.float32
            and (last or other.numel() == 0),
            "other must be float32 of the shape of the output, channels-last",
        )
    _check_bias(bias, x, outputs)


def _check_bias(bias: Tensor | None, x: Tensor, outputs: int) -> None:
    if bias is not None:
        _check_device(bias, x, "bias")
        flat = bias.shape == (outputs,) and bias.dtype == torch.float32 and bias.is_contiguous()
        _check(flat, "bias must be float32 [outputs], contiguous")


def _check_maps(x: Tensor, name: str) -> None:
    _check(x.ndim == 4, f"{name} must be [batch, channels, height, width], got {x.ndim} dimensions")
    known = x.dtype in (torch.float32, torch.bfloat16)
    _check(known, f"{name} must be float32 or bfloat16")
    last = x.numel() == 0 or x.is_contiguous(memory_format=torch.channels_last)
    _check(last, f"{name} must be channels-last")


def _check_pooling(kernel: int, stride: int, padding: int) -> None:
    _check(1 <= kernel <= 15, "kernel must be 1 to 15")
    _check(stride >= 1, "stride must be at least 1")
    _check(0 <= 2 * padding <= kernel, "padding must be 0 to half of kernel")


def _check_windows(
    sizes: Sequence[int], outputs: Sequence[int], stride: int, paddings: Sequence[int]
) -> None:
    """Along each dimension, windows must begin in the input, or in the padding before it."""
    for size, count, padding in zip(sizes, outputs, paddings, strict=True):
        begins = size > 0 and (count - 1) * stride - padding < size
        _check(count == 0 or (count > 0 and begins), "windows must not begin beyond the input")


def check_max_pool(
    x: Tensor, kernel: int, stride: int, padding: int, out_height: int, out_width: int, _relu: bool
) -> None:
    """Checks all arguments, as `check_signed_cross_entropy`."""
    _check_maps(x, "x")
    _check_pooling(kernel, stride, padding)
    _check_windows(x.shape[2:], (out_height, out_width), stride, (padding, padding))


def check_max_pool_backward(
    grad: Tensor, place: Tensor, kernel: int, stride: int, padding: int, height: int, width: int
) -> None:
    """Checks all arguments, as `check_signed_cross_entropy`."""
    _check_maps(grad, "grad")
    _check_device(place, grad, "place")
    fits = place.shape == grad.shape and place.dtype == torch.uint8
    last = fits and (place.numel() == 0 or place.is_contiguous(memory_format=torch.channels_last))
    _check(last, "place must be uint8, channels-last, of the shape of grad")
    _check_pooling(kernel, stride, padding)
    _check_windows((height, width), grad.shape[2:], stride, (padding, padding))


def check_conv_input_gradient(
    grad: Tensor, weight: Tensor, stride: int, top: int, left: int, height: int, width: int
) -> None:
    """Checks all arguments, as `check_signed_cross_entropy`."""
    _check_maps(grad, "grad")
    _check(grad.dtype == torch.float32, "grad must be float32")
    _check_device(weight, grad, "weight")
    fits = weight.ndim == 4 and weight.numel() > 0 and weight.shape[3] == grad.shape[1]
    _check(
        fits and weight.dtype == torch.float32 and weight.is_contiguous(),
        "weight must be float32 [height, width, inputs, outputs], contiguous, with the channels of"
        " grad as outputs",
    )
    _check(weight.shape[2] <= 4, "weight must have at most 4 inputs")
    _check(stride >= 1, "stride must be at least 1")
    less = 0 <= top < weight.shape[0] and 0 <= left < weight.shape[1]
    _check(less, "padding must be less than the kernel")
    _check_windows((height, width), grad.shape[2:], stride, (top, left))


def check_blocked_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, top: int, left: int, height: int, width: int
) -> None:
    """Checks all arguments, as `check_signed_cross_entropy`."""
    blocked = x.ndim == 5 and x.shape[4] == reference.BLOCK
    _check(
        blocked and x.dtype == torch.float32 and x.is_contiguous(),
        "x must be float32 [blocks, channels, height, width, 16], contiguous",
    )
    _check_device(weight, x, "weight")
    fits = weight.ndim == 4 and weight.numel() > 0 and weight.shape[0] == x.shape[1]
    _check(
        fits and weight.dtype == torch.float32 and weight.is_contiguous(),
        "weight must be float32 [inputs, height, width, outputs], contiguous, with the channels of"
        " x as inputs",
    )
    less = 0 <= top < weight.shape[1] and 0 <= left < weight.shape[2]
    _check(less, "padding must be less than the kernel")
    _check_windows(x.shape[2:4], (height, width), 1, (top, left))
    _check_bias(bias, x, weight.shape[3])


# What plain torch needs checked; of the ascent, it takes bounds and layouts that kernels don't.
CHECKS: dict[str, Callable[..., None]] = {
    "signed_cross_entropy": check_signed_cross_entropy,
    "masked_cross_entropy": check_masked_cross_entropy,
    "scale_rows_": check_scale_rows,
    "ascent_step_": functools.partial(check_ascent_step, flat=False),
    "winograd_conv": check_winograd_conv,
    "max_pool": check_max_pool,
    "max_pool_backward": check_max_pool_backward,
    "conv_input_gradient": check_conv_input_gradient,
    "blocked_conv": check_blocked_conv,
}


def checked_reference(name: str, compiled: bool = False) -> Callable[..., Any]:
    """Returns the function of `reference` called ``name``, with its arguments checked."""
    check, function = CHECKS[name], getattr(reference, name)
    run = torch.compile(function) if compiled else function

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        return run(*args, **kwargs)

    return checked
