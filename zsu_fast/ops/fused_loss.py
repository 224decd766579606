"""Autograd for ops that return their gradient with their loss: ``(loss, dlogits) = op(...)``.

The backward pass hands out ``dlogits`` itself. Only where the incoming gradient is not 1 is it
scaled, in place and without asking the device from Python (which would stall a CUDA stream and
could not be captured in a graph).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import _get_current_graph_task_keep_graph as graph_is_kept

from . import backends
from .scale_rows import scale_rows_


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Save what the backward pass needs: dlogits, and coef, the last input of every such op."""
    dlogits = output[1]
    ctx.mark_non_differentiable(dlogits)
    ctx.set_materialize_grads(False)  # the gradient of dlogits would be a matrix of zeros
    ctx.save_for_backward(dlogits, inputs[-1])


def backward(ctx: Any, grad: Tensor | None, _: Tensor | None = None) -> tuple[Tensor | None, ...]:
    """Gradients of the op's inputs: of the first, logits, only."""
    dlogits, coef = ctx.saved_tensors
    gradient = None if grad is None else _hand_out(dlogits, coef, grad)
    return (gradient, *(None,) * (len(ctx.needs_input_grad) - 1))


def _hand_out(dlogits: Tensor, coef: Tensor, grad: Tensor) -> Tensor:
    """dlogits times the incoming gradient of each row's term."""
    if torch.is_grad_enabled():
        raise RuntimeError("fused losses are differentiable once: create_graph is not supported")
    if type(dlogits) is not Tensor:  # torch.compile traces: plain arithmetic, which it can fuse
        ends = grad.reshape(-1)
        by_row = torch.where(coef < 0, ends[0], ends[-1]).to(dlogits.dtype)
        scaled: Tensor = dlogits * by_row[:, None]
        return scaled
    if graph_is_kept():  # another backward pass may come, and the caller owns what we return
        dlogits = dlogits.clone()
    scale_rows_(dlogits, coef, grad)
    return dlogits


class FusedLoss(torch.autograd.Function):
    """``FusedLoss.apply(op, logits, ..., coef)`` is the loss, differentiable in logits.

    The ops of `torch.ops.zsu_fast` differentiate by themselves too; this does the same for every
    backend, and saves half of the Python time that a registered op spends per call.
    """

    @staticmethod
    def forward(ctx: Any, op: Callable[..., tuple[Tensor, Tensor]], *inputs: Tensor) -> Tensor:
        ctx.native = isinstance(op, torch._ops.OpOverload)
        if ctx.native:
            with torch._C._AutoDispatchBelowAutograd():  # past the op's own registration
                loss, dlogits = op(*inputs)
        else:
            loss, dlogits = op(*inputs)
        ctx.save_for_backward(dlogits, inputs[-1])
        ctx.nothing = (None,) * (len(inputs) - 1)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dlogits, coef = ctx.saved_tensors
        if ctx.native and not torch.is_grad_enabled() and not graph_is_kept():
            _scale_rows_(dlogits, coef, grads[0])  # `_hand_out` in the usual case
        else:
            dlogits = _hand_out(dlogits, coef, grads[0])
        return (None, dlogits, *ctx.nothing)


_scale_rows_ = torch.ops.zsu_fast.scale_rows_.default


def fused_loss(name: str, inputs: tuple[Tensor, ...], backend: str | None) -> Tensor:
    """The loss of op ``name`` (arguments in the order of its schema) on a backend."""
    logits = inputs[0]
    op = backends.choose(name, logits.device, backend)
    compiling = torch.compiler.is_compiling()  # then the op's own autograd registration serves
    if logits.requires_grad and torch.is_grad_enabled() and not compiling:
        loss: Tensor = FusedLoss.apply(op, *inputs)
    else:
        loss = op(*inputs)[0]
    return loss


def loss_and_grad(
    name: str, inputs: tuple[Tensor, ...], backend: str | None
) -> tuple[Tensor, Tensor]:
    """What op ``name`` returns, past autograd."""
    op = backends.choose(name, inputs[0].device, backend)
    if isinstance(op, torch._ops.OpOverload) and not torch.compiler.is_compiling():
        with torch._C._AutoDispatchBelowAutograd():  # a third of what no_grad() costs
            loss, dlogits = op(*inputs)
    else:
        with torch.no_grad():
            loss, dlogits = op(*inputs)
    return loss, dlogits
