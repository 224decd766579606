"""Autograd for ops that return their gradient with their loss: ``(loss, dlogits) = op(...)``.

The backward pass returns ``dlogits`` itself. If the incoming gradient is not 1, it is scaled in
place. Python never reads that gradient, which would stall a CUDA stream and break graph capture.

The losses are differentiable in their first input, once, in reverse mode: by autograd and by
``torch.func.grad``. Whatever else is asked for is refused, never answered by None or 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch._C._autograd import _get_current_graph_task_keep_graph as graph_is_kept
from torch._library.autograd import Info, make_autograd_impl
from torch.autograd import forward_ad

from . import backends
from .library import definitions
from .scale_rows import scale_rows_

_functorch_is_active = torch._C._are_functorch_transforms_active


def coef_of(inputs: tuple[Any, ...]) -> Tensor:
    """The coefficients among the inputs of `signed_cross_entropy` or `masked_cross_entropy`."""
    coef: Tensor = inputs[2 if len(inputs) == 3 else 3]
    return coef


def _refuse_other_gradients(inputs: tuple[Any, ...]) -> None:
    """Refuses gradients that the ops don't compute, which would be None.

    Raises:
        RuntimeError: an input after the first requires grad, or one has a tangent.
    """
    for t in inputs[1:]:
        if isinstance(t, Tensor) and t.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "fused losses are differentiable in their logits only: detach the other inputs"
            )
    if forward_ad._current_level >= 0:
        for t in inputs:
            if isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None:
                raise RuntimeError(
                    "fused losses have no forward-mode derivative: use reverse mode, or "
                    "torch.nn.functional.cross_entropy"
                )


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Saves dlogits and coef for the backward pass."""
    dlogits = output[1]
    ctx.mark_non_differentiable(dlogits)
    ctx.set_materialize_grads(False)  # None instead of a matrix of zeros
    ctx.save_for_backward(dlogits, coef_of(inputs))


def backward(ctx: Any, grad: Tensor | None, _: Tensor | None = None) -> tuple[Tensor | None, ...]:
    """Returns the gradients of the op's inputs: logits, the first, alone has one."""
    dlogits, coef = ctx.saved_tensors
    gradient = None if grad is None else _scaled(dlogits, coef, grad)
    return (gradient, *(None,) * (len(ctx.needs_input_grad) - 1))


def register(name: str) -> None:
    """Registers the autograd of op ``name`` of `torch.ops.zsu_fast`."""
    op = getattr(torch.ops.zsu_fast, name).default
    autograd = make_autograd_impl(op, Info(backward, setup_context))

    def kernel(keyset: torch.DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
        _refuse_other_gradients(args)
        return autograd(keyset, *args, **kwargs)

    definitions.impl(name, kernel, "Autograd", with_keyset=True)


def _scaled(dlogits: Tensor, coef: Tensor, grad: Tensor) -> Tensor:
    """Returns dlogits times the incoming gradient of each row's term."""
    transformed = _functorch_is_active()
    if torch.is_grad_enabled() and not transformed:
        raise RuntimeError("fused losses are differentiable once: create_graph is not supported")
    if transformed or type(dlogits) is not Tensor:  # or traced by torch.compile, which fuses this
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
    backend, in half of the Python time per call. A function with ``setup_context``, which
    `torch.func` needs, would take three times as long: see `TransformedLoss`.
    """

    @staticmethod
    def forward(ctx: Any, op: Callable[..., tuple[Tensor, Tensor]], *inputs: Any) -> Tensor:
        ctx.native = isinstance(op, torch._ops.OpOverload)
        loss, dlogits = _without_autograd(op, inputs)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(dlogits, coef_of(inputs))
        ctx.other_inputs = len(inputs) - 1
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        dlogits, coef = ctx.saved_tensors
        if grad is None:
            dlogits = None
        elif ctx.native and not torch.is_grad_enabled() and not graph_is_kept():
            _scale_rows_(dlogits, coef, grad)  # what `_scaled` does, without its checks
        else:
            dlogits = _scaled(dlogits, coef, grad)
        return (None, dlogits, *(None,) * ctx.other_inputs)


class TransformedLoss(torch.autograd.Function):
    """``TransformedLoss.apply(op, logits, ..., coef)[0]``: the same under `torch.func`."""

    @staticmethod
    def forward(op: Callable[..., tuple[Tensor, Tensor]], *inputs: Any) -> tuple[Tensor, Tensor]:
        return _without_autograd(op, inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)  # a second derivative reaches `backward`
        ctx.save_for_backward(output[1], coef_of(inputs[1:]))
        ctx.other_inputs = len(inputs) - 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad, of_gradient = grads
        if of_gradient is not None:
            raise RuntimeError("fused losses are differentiable once")
        dlogits, coef = ctx.saved_tensors
        dlogits = None if grad is None else _scaled(dlogits, coef, grad)
        return (None, dlogits, *(None,) * ctx.other_inputs)


def _without_autograd(
    op: Callable[..., tuple[Tensor, Tensor]], inputs: tuple[Any, ...]
) -> tuple[Tensor, Tensor]:
    """Calls ``op`` where no gradients are recorded; skips the autograd that a native op has."""
    if isinstance(op, torch._ops.OpOverload):
        with torch._C._AutoDispatchBelowAutograd():
            return op(*inputs)
    return op(*inputs)


_scale_rows_ = torch.ops.zsu_fast.scale_rows_.default


def fused_loss(name: str, inputs: tuple[Any, ...], backend: str | None) -> Tensor:
    """Returns the loss of op ``name`` on a backend; ``inputs`` in the order of its schema."""
    logits = inputs[0]
    op = backends.choose(name, logits.device, backend)
    compiling = torch.compiler.is_compiling()  # then the op's own autograd is traced
    if not compiling:
        _refuse_other_gradients(inputs)
    if logits.requires_grad and torch.is_grad_enabled() and not compiling:
        if _functorch_is_active():
            return cast(Tensor, TransformedLoss.apply(op, *inputs)[0])
        loss: Tensor = FusedLoss.apply(op, *inputs)
    else:
        loss = op(*inputs)[0]
    return loss


def loss_and_grad(name: str, inputs: tuple[Any, ...], backend: str | None) -> tuple[Tensor, Tensor]:
    """Returns loss and gradient of op ``name`` on a backend, without autograd."""
    op = backends.choose(name, inputs[0].device, backend)
    if isinstance(op, torch._ops.OpOverload) and not torch.compiler.is_compiling():
        return _without_autograd(op, inputs)  # a third of what no_grad() costs
    with torch.no_grad():
        return op(*inputs)
