"""Every op in plain torch: slow, exact, and able to run in float64.

Kernels are tested against these functions, and the package falls back to them. Half types and
float32 are computed in float32, float64 in float64; results are rounded once, at the end.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

# Winograd's F(4x4, 3x3) with points 0, 1, -1, 2, -2 and infinity: B^T, G and A^T of Lavin and Gray.
WINOGRAD_INPUTS = (
    (4, 0, -5, 0, 1, 0), (0, -4, -4, 1, 1, 0), (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0), (0, 2, -1, -2, 1, 0), (0, 4, 0, -5, 0, 1),
)  # fmt: skip
WINOGRAD_WEIGHTS = (
    (1 / 4, 0, 0), (-1 / 6, -1 / 6, -1 / 6), (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6), (1 / 24, -1 / 12, 1 / 6), (0, 0, 1),
)  # fmt: skip
WINOGRAD_OUTPUTS = (
    (1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1),
)  # fmt: skip

BLOCK = 16  # images that `blocked_conv` computes at once


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def signed_cross_entropy(logits: Tensor, target: Tensor, coef: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each row times its coefficient, and the gradient, accurate where p -> 1.

    For a saturated row ``softmax - onehot`` rounds to 0 at the target. Here the gradient at the
    target is minus the sum of the *other* probabilities, and the loss of a row whose target has
    the largest logit is ``log1p(sum of exp(x - largest) over the others)``: neither subtracts two
    nearly equal numbers.

    Args:
        logits: float [B, C].
        target: int64 or int32 [B], values in 0..C-1 where coef is not 0.
        coef: float [B], sign x weight / N; 0 ignores the row.

    Returns:
        losses: [2], the sums of ``coef * CE`` over rows with a negative coef and over the others.
        dlogits: [B, C] in the dtype of ``logits``, the gradient of ``losses.sum()``.

    Raises:
        RuntimeError: a target is out of range, on the CPU; on other devices its row becomes NaN.
    """
    x, c = _wide(logits), coef.to(_wide(logits).dtype)
    rows = torch.arange(x.shape[0], device=x.device)
    used = c != 0
    valid = (target >= 0) & (target < x.shape[1])
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        bad = (used & ~valid).nonzero()
        if len(bad):
            row = int(bad[0])
            raise RuntimeError(
                f"target {int(target[row])} of row {row} is out of range for {x.shape[1]} classes"
            )
    y = torch.where(valid, target, torch.zeros_like(target)).long()
    top = x.amax(1, keepdim=True) if x.numel() else x.new_zeros(x.shape[0], 1)
    e = (x - top).exp()
    others = e.scatter(1, y[:, None], 0.0)
    rest = others.sum(1)
    denominator = e[rows, y] + rest
    shifted = x[rows, y] - top[:, 0]
    loss = torch.where(shifted == 0, rest.log1p(), denominator.log() - shifted)
    zero = torch.zeros_like(loss)
    loss = torch.where(used, torch.where(valid, c * loss, torch.nan), zero)
    dlogits = others.scatter(1, y[:, None], -rest[:, None]) / denominator[:, None]
    dlogits = torch.where(valid[:, None], c[:, None] * dlogits, torch.nan)
    dlogits = torch.where(used[:, None], dlogits, torch.zeros_like(dlogits))
    losses = torch.stack(
        [torch.where(c < 0, loss, zero).sum(), torch.where(c < 0, zero, loss).sum()]
    )
    return losses, dlogits.to(logits.dtype)


def scale_rows_(rows: Tensor, coef: Tensor, grad: Tensor) -> None:
    """Multiply each row by the gradient of its term: ``grad[0]`` where coef < 0, else ``grad[-1]``.

    Args:
        rows: float [B, C], changed.
        coef: float [B].
        grad: [2], or a scalar for every row.
    """
    flat = grad.reshape(-1)
    rows.mul_(torch.where(coef < 0, flat[0], flat[-1])[:, None].to(rows.dtype))


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
    """KL(q || p) of the teacher's masked softmax q and the student's softmax p, with its gradient.

    ``q`` is the teacher's softmax over the retain classes, renormalised (0 at the forgotten
    ones), ``p`` the student's over all classes, after ``shift`` is added to the forgotten logits:
    ``loss = sum(coef * KL(q || p))`` and ``dlogits = coef * (p - q)``. Both are 0 exactly where the
    student equals the masked teacher. ``keep`` adds ``keep * sum((x - z)^2)`` over the retain
    classes.

    Args:
        logits: float [B, C], of the student.
        teacher: float [N, C], unmasked logits of the original model.
        forget: bool [C], True at forgotten classes; at least one is False.
        coef: float [B], weight / N; 0 ignores the row, with all its terms.
        index: int64 [B], rows of ``teacher``; None if N is B and rows correspond.
        keep: float [B]; None for 0.
        shift: added to the logits of forgotten classes.
        forget_only: make the gradient of retain classes 0.

    Returns:
        loss: scalar.
        dlogits: [B, C] in the dtype of ``logits``.

    Raises:
        RuntimeError: an index is out of range, on the CPU; on other devices its row becomes NaN.
    """
    x, c = _wide(logits), coef.to(_wide(logits).dtype)
    z = _wide(teacher).to(x.dtype)
    if index is not None:
        z = _rows(z, index, c != 0)
    log_p = (x + shift * forget.to(x.dtype) if shift else x).log_softmax(1)
    log_q = z.masked_fill(forget, -torch.inf).log_softmax(1)
    q = log_q.exp()
    terms = torch.where(q == 0, torch.zeros_like(q), q * (log_q - log_p))  # 0 log 0 = 0
    used = c != 0
    losses, dlogits = c * terms.sum(1), c[:, None] * (log_p.exp() - q)
    if keep is not None:
        k = keep.to(x.dtype)
        # where keep is 0, an infinite change counts for nothing
        counts = ~forget & (k != 0)[:, None]
        change = torch.where(counts, x - z, torch.zeros_like(x))
        losses, dlogits = losses + k * change.square().sum(1), dlogits + 2 * k[:, None] * change
    if forget_only:
        dlogits = torch.where(forget, dlogits, torch.zeros_like(dlogits))
    loss = torch.where(used, losses, torch.zeros_like(c)).sum()
    dlogits = torch.where(used[:, None], dlogits, torch.zeros_like(q))
    return loss, dlogits.to(logits.dtype)


def _rows(teacher: Tensor, index: Tensor, used: Tensor) -> Tensor:
    """The rows of ``teacher`` at ``index``; NaN where there is none, or, on the CPU, an error."""
    count = teacher.shape[0]
    valid = (index >= 0) & (index < count)
    if index.device.type == "cpu" and not torch.compiler.is_compiling():
        bad = (used & ~valid).nonzero()
        if len(bad):
            row = int(bad[0])
            raise RuntimeError(
                f"index {int(index[row])} of row {row} is out of range for {count} rows"
            )
    rows = teacher.index_select(0, torch.where(valid, index, torch.zeros_like(index)))
    return torch.where(valid[:, None], rows, torch.nan)


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
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
) -> None:
    """One Adam ascent step on ``objective - beta * ||x||^2``, clamped to valid images, in place.

    The arguments are those of the public `zsu_fast.ops.ascent_step_`, except that bounds may also
    be [1] or [channels] and lr [1] or [N].
    """
    shape = (-1, *[1] * (x.ndim - 1))
    per_channel = (1, -1, *[1] * (x.ndim - 2)) if x.ndim > 1 else (-1,)
    low, high = (b.view(per_channel) if b.ndim == 1 else b for b in (low, high))
    lr = lr.view(shape) if lr.ndim == 1 else lr
    rows = active.view(shape)
    g = grad - 2 * beta * x
    m = beta1 * exp_avg + (1 - beta1) * g
    v = beta2 * exp_avg_sq + (1 - beta2) * g * g
    t = (step + 1).double().view(shape)
    # 1 - b**t loses five digits in float32 at t = 1; expm1 keeps them
    fix1, fix2 = (-torch.expm1(t * math.log(b)) for b in (beta1, beta2))
    update = (m / fix1.to(x.dtype)) / ((v / fix2.to(x.dtype)).sqrt() + eps)
    moved = torch.minimum(torch.maximum(x + lr * update, low), high)
    x.copy_(torch.where(rows, moved, x))
    exp_avg.copy_(torch.where(rows, m, exp_avg))
    exp_avg_sq.copy_(torch.where(rows, v, exp_avg_sq))
    step.add_(active.to(step.dtype))


def winograd_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor | None, outputs: int,
    padding: int, low: float, high: float,
) -> Tensor:  # fmt: skip
    """A convolution of 3x3 without stride, as `zsu_fast.ops.winograd_conv.winograd_conv`.

    Args:
        x: float [N, I, H, W].
        weight: [36, blocks, I, block] of `winograd_weight`, in the dtype of ``x``.
        bias: [outputs] or None.
        other: added ahead of the bounds, of the output's shape; or None.
        outputs: of the convolution.
        padding: zeros on each side.
        low, high: bounds of the output.

    Returns:
        [N, outputs, H + 2 padding - 2, W + 2 padding - 2], channels-last.
    """
    height, width = (size + 2 * padding - 2 for size in x.shape[2:])
    rows, columns = -(-height // 4), -(-width // 4)
    right, below = 4 * columns + 2 - x.shape[3] - padding, 4 * rows + 2 - x.shape[2] - padding
    tiles = F.pad(x, (padding, right, padding, below)).unfold(2, 6, 4).unfold(3, 6, 4)
    b, a = x.new_tensor(WINOGRAD_INPUTS), x.new_tensor(WINOGRAD_OUTPUTS)
    inputs = torch.einsum("ak,nirckl,bl->abnrci", b, tiles, b)
    weights = weight.transpose(1, 2).flatten(2)[..., :outputs].unflatten(0, (6, 6))
    products = torch.einsum("abnrci,abio->abnrco", inputs, weights)
    out = torch.einsum("pa,abnrco,qb->nrpcqo", a, products, a)
    out = out.reshape(x.shape[0], 4 * rows, 4 * columns, outputs)[:, :height, :width]
    if bias is not None:
        out = out + bias
    if other is not None:
        out = out + other.permute(0, 2, 3, 1)
    return out.clamp(low, high).contiguous().permute(0, 3, 1, 2)


def max_pool(
    x: Tensor, kernel: int, stride: int, padding: int, out_height: int, out_width: int, relu: bool
) -> tuple[Tensor, Tensor]:
    """The largest value of each window, as `zsu_fast.ops.max_pool.max_pool`.

    Args:
        x: float [N, C, H, W].
        kernel, stride, padding: of square windows.
        out_height, out_width: of the output; windows end at the input's border.
        relu: whether relu follows.

    Returns:
        [N, C, out_height, out_width], and uint8 of the same shape: the place of the value in its
        window, row by row, or 255 where relu cuts it off. Both channels-last.
    """
    windows = _windows(x, kernel, stride, padding, out_height, out_width, -torch.inf)
    inside = _windows(torch.ones_like(x), kernel, stride, padding, out_height, out_width, 0.0) > 0
    # the last NaN of a window, or the first of its largest values, never one of the padding
    rank = torch.where(inside, windows, -torch.inf)
    nan = windows.isnan()
    order = torch.arange(kernel**2, device=x.device)
    first = (rank == rank.masked_fill(nan, -torch.inf).amax(-1, keepdim=True)) & inside & ~nan
    place = torch.where(first, order, kernel**2).amin(-1)
    place = torch.where(nan.any(-1), torch.where(nan, order, -1).amax(-1), place)
    out = windows.gather(-1, place[..., None])[..., 0]
    if relu:
        cut = out <= 0
        out, place = out.masked_fill(cut, 0.0), place.masked_fill(cut, 255)
    return _channels_last(out), _channels_last(place.to(torch.uint8))


def max_pool_backward(
    grad: Tensor, place: Tensor, kernel: int, stride: int, padding: int, height: int, width: int
) -> Tensor:
    """The gradient of the input of `max_pool`, [N, C, height, width], channels-last.

    Args:
        grad: of the output, float [N, C, H, W].
        place: from `max_pool`.
        kernel, stride, padding: as there.
        height, width: of the input.
    """
    own = place[..., None] == torch.arange(kernel**2, device=grad.device)
    columns = (own * grad[..., None].float()).permute(0, 1, 4, 2, 3).flatten(3).flatten(1, 2)
    rows, wide = (stride * (n - 1) + kernel for n in grad.shape[2:])
    summed = F.fold(columns, (rows, wide), kernel, stride=stride)
    below, right = max(0, height + padding - rows), max(0, width + padding - wide)
    summed = F.pad(summed, (0, right, 0, below))
    summed = summed[:, :, padding : padding + height, padding : padding + width]
    return _channels_last(summed.to(grad.dtype))


def conv_input_gradient(
    grad: Tensor, weight: Tensor, stride: int, top: int, left: int, height: int, width: int
) -> Tensor:
    """The gradient of the input of a convolution, [N, I, height, width], channels-last, as
    `zsu_fast.ops.conv_input_gradient.conv_input_gradient`.

    Args:
        grad: of the output, float [N, O, H, W].
        weight: [K, L, I, O], in the dtype of ``grad``.
        stride: of both dimensions.
        top, left: zeros ahead of the input's first row and column.
        height, width: of the input.
    """
    full = F.conv_transpose2d(grad, weight.permute(3, 2, 0, 1), None, stride)
    below, right = max(0, height + top - full.shape[2]), max(0, width + left - full.shape[3])
    full = F.pad(full, (0, right, 0, below))
    return _channels_last(full[:, :, top : top + height, left : left + width])


def blocked_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    top: int,
    left: int,
    out_height: int,
    out_width: int,
) -> Tensor:
    """A convolution of blocks of images, as `zsu_fast.ops.blocked_conv.blocked_conv`.

    Args:
        x: float [B, I, H, W, 16].
        weight: [I, K, L, O], in the dtype of ``x``.
        bias: [O]; None for none.
        top, left: zeros ahead of the first row and column.
        out_height, out_width: of the output.
    """
    images = x.movedim(4, 1).flatten(0, 1)
    below = out_height - 1 + weight.shape[1] - top - x.shape[2]
    right = out_width - 1 + weight.shape[2] - left - x.shape[3]  # negative: pixels in no window
    out = F.conv2d(F.pad(images, (left, right, top, below)), weight.permute(3, 0, 1, 2), bias)
    return out.unflatten(0, (len(x), BLOCK)).movedim(1, 4).contiguous()


def _windows(
    x: Tensor, kernel: int, stride: int, padding: int, height: int, width: int, fill: float
) -> Tensor:
    """The windows of [N, C, H, W], with ``fill`` beyond it: [N, C, height, width, kernel^2]."""
    needed = [stride * (n - 1) + kernel - padding for n in (height, width)]
    below, right = (max(0, n - s) for n, s in zip(needed, x.shape[2:], strict=True))
    padded = F.pad(x, (padding, right, padding, below), value=fill)
    windows = padded.unfold(2, kernel, stride).unfold(3, kernel, stride)
    return windows[:, :, :height, :width].flatten(4)


def _channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
