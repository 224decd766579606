"""Autograd for ops that return their gradient with their loss: ``(loss, dlogits) = op(...)``.

The backward pass returns ``dlogits`` itself. If the incoming gradient is not 1, it is scaled in
place. Python never reads that gradient, which would stall a CUDA stream and break graph capture.
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
    """Save dlogits and coef for the backward pass."""
    dlogits = output[1]
    ctx.mark_non_differentiable(dlogits)
    ctx.set_materialize_grads(False)  # None instead of a matrix of zeros
    ctx.save_for_backward(dlogits, _coef(inputs))


def _coef(inputs: tuple[Any, ...]) -> Tensor:
    coef: Tensor = inputs[2] if len(inputs) == 3 else inputs[3]
    return coef


def backward(ctx: Any, grad: Tensor | None, _: Tensor | None = None) -> tuple[Tensor | None, ...]:
    """Returns the gradients of the op's inputs: logits, the first, alone has one."""
    dlogits, coef = ctx.saved_tensors
    gradient = None if grad is None else _scaled(dlogits, coef, grad)
    return (gradient, *(None,) * (len(ctx.needs_input_grad) - 1))


def _scaled(dlogits: Tensor, coef: Tensor, grad: Tensor) -> Tensor:
    """Returns dlogits times the incoming gradient of each row's term."""
    if torch.is_grad_enabled():
        raise RuntimeError("fused losses are differentiable once: create_graph is not supported")
    if type(dlogits) is not Tensor:  # traced by torch.compile, which fuses this
        flat = grad.reshape(-1)
        factor = torch.where(coef < 0, flat[0], flat[-1]).to(dlogits.dtype)
        product: Tensor = dlogits * factor[:, None]
        return product
    if graph_is_kept():  # another backward pass may follow, and the caller owns the result
        dlogits = dlogits.clone()
    scale_rows_(dlogits, coef, grad)
    return dlogits


class FusedLoss(torch.autograd.Function):
    """``FusedLoss.apply(op, logits, ..., coef)`` is the loss, differentiable in logits.

    The ops of `torch.ops.zsu_fast` have autograd of their own; this does the same for every
    backend, in half of the Python time per call.
    """

    @staticmethod
    def forward(ctx: Any, op: Callable[..., tuple[Tensor, Tensor]], *inputs: Any) -> Tensor:
        ctx.native = isinstance(op, torch._ops.OpOverload)
        if ctx.native:
            with torch._C._AutoDispatchBelowAutograd():  # skips the op's own autograd
                loss, dlogits = op(*inputs)
        else:
            loss, dlogits = op(*inputs)
        ctx.save_for_backward(dlogits, _coef(inputs))
        ctx.other_inputs = len(inputs) - 1
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dlogits, coef = ctx.saved_tensors
        if ctx.native and not torch.is_grad_enabled() and not graph_is_kept():
            _scale_rows_(dlogits, coef, grads[0])  # what `_scaled` does, without its checks
        else:
            dlogits = _scaled(dlogits, coef, grads[0])
        return (None, dlogits, *(None,) * ctx.other_inputs)


_scale_rows_ = torch.ops.zsu_fast.scale_rows_.default


def fused_loss(name: str, inputs: tuple[Any, ...], backend: str | None) -> Tensor:
    """Returns the loss of op ``name`` on a backend; ``inputs`` in the order of its schema."""
    logits = inputs[0]
    op = backends.choose(name, logits.device, backend)
    compiling = torch.compiler.is_compiling()  # then the op's own autograd is traced
    if logits.requires_grad and torch.is_grad_enabled() and not compiling:
        loss: Tensor = FusedLoss.apply(op, *inputs)
    else:
        loss = op(*inputs)[0]
    return loss


def loss_and_grad(name: str, inputs: tuple[Any, ...], backend: str | None) -> tuple[Tensor, Tensor]:
    """Returns loss and gradient of op ``name`` on a backend, without autograd."""
    op = backends.choose(name, inputs[0].device, backend)
    if isinstance(op, torch._ops.OpOverload) and not torch.compiler.is_compiling():
        with torch._C._AutoDispatchBelowAutograd():  # a third of what no_grad() costs
            loss, dlogits = op(*inputs)
    else:
        with torch.no_grad():
            loss, dlogits = op(*inputs)
    return loss, dlogits
