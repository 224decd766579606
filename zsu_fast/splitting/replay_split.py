"""Splits a model before one of its modules by recording and replaying its modules' outputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import ArgumentError, ModelError
from ..models.wrapper import LogitsModel
from .batch_dim import Features, Halves, infer_batch_dim, two_batches


class _Reached(Exception):
    """The module at the cut is about to run."""


@dataclass(frozen=True)
class _Call:
    """A finished module's call: its output is ``form`` with tensors in the places ``filled``."""

    name: str
    form: pytree.TreeSpec
    filled: tuple[bool, ...]

    def output(self, tensors: Iterator[Tensor]) -> Any:
        leaves = [next(tensors) if full else None for full in self.filled]
        return pytree.tree_unflatten(leaves, self.form)


class _Slot:
    """What one recorded tensor is to the tail: an input, a constant, or of no influence."""

    def __init__(self, two: Tensor, three: Tensor) -> None:
        self.rule = infer_batch_dim(two, three)
        same = self.rule is None and two.shape == three.shape and torch.equal(two, three)
        self.constant = two.detach() if same else None
        self.example = two.detach().new_zeros(()).expand(two.shape)  # a shape, no memory
        self.used = self.rule is not None

    def stand_in(self, batch: int) -> Tensor:
        """For a tensor of no influence: zeros in its shape, without memory."""
        if self.constant is not None:
            return self.constant
        shape = self.example.shape if self.rule is None else self.rule.shape(self.example, batch)
        return self.example.new_zeros(()).expand(shape)


class ReplayBackbone(nn.Module):
    """Runs the model up to the cut and returns those recorded tensors that the tail reads."""

    def __init__(self, model: LogitsModel, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name
        self.slots: list[_Slot] = []

    def forward(self, x: Tensor) -> Features:
        _, tensors = self.recorded(x)
        return tuple(
            slot.rule.pack(tensor)
            for slot, tensor in zip(self.slots, tensors, strict=True)
            if slot.used and slot.rule is not None
        )

    def recorded(self, x: Tensor) -> tuple[list[_Call], list[Tensor]]:
        """The calls of modules that finish before the cut, without those inside them; the image
        and the tensors that these calls return.
        """
        done: list[tuple[_Call, list[Tensor]]] = []
        hooks = []
        for name, module in self.model.module.named_modules():
            if not name:
                continue

            def after(_m: nn.Module, _a: Any, output: Any, name: str = name) -> None:
                leaves, form = pytree.tree_flatten(output)
                tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
                if tensors and all(leaf is None or isinstance(leaf, Tensor) for leaf in leaves):
                    # a finished parent replaces its finished children
                    while done and done[-1][0].name.startswith(f"{name}."):
                        done.pop()
                    filled = tuple(leaf is not None for leaf in leaves)
                    done.append((_Call(name, form, filled), tensors))

            def before(_m: nn.Module, _a: Any) -> None:
                raise _Reached

            hooks.append(module.register_forward_hook(after))
            if name == self.name:
                hooks.append(module.register_forward_pre_hook(before))
        try:
            self.model(x)
        except _Reached:
            return [call for call, _ in done], [x, *(t for _, ts in done for t in ts)]
        finally:
            for hook in hooks:
                hook.remove()
        raise ArgumentError(
            "tail",
            f"got {self.name!r}, a module that the forward pass never calls",
            "Name a module that takes part in the forward pass.",
        )


class ReplayTail(nn.Module):
    """Runs the model with the modules before the cut answering from their recorded outputs."""

    def __init__(self, model: LogitsModel, calls: list[_Call], slots: list[_Slot]) -> None:
        super().__init__()
        self.model, self.calls, self.slots = model, calls, slots

    def forward(self, *features: Tensor) -> Tensor:
        given, batch = iter(features), len(features[0])
        return self.replay(
            [
                slot.rule.unpack(next(given)) if slot.used and slot.rule else slot.stand_in(batch)
                for slot in self.slots
            ]
        )

    def replay(self, tensors: Sequence[Tensor]) -> Tensor:
        """The logits from the image and every recorded tensor, as the model has them."""
        x, *recorded = tensors
        left = iter(recorded)
        answers: dict[str, list[Any]] = {}
        for call in self.calls:
            answers.setdefault(call.name, []).append(call.output(left))
        modules = dict(self.model.module.named_modules())
        originals = {}
        for name, outputs in answers.items():
            module = modules[name]
            original = module.forward
            queue = iter(outputs)

            def replay(
                *args: Any, queue: Iterator[Any] = queue, original: Any = original, **kw: Any
            ) -> Any:
                for output in queue:
                    return output
                return original(*args, **kw)

            originals[name] = module.__dict__.get("forward")
            module.forward = replay
        try:
            logits: Tensor = self.model(x)
        finally:
            for name, own in originals.items():
                if own is None:
                    del modules[name].__dict__["forward"]
                else:
                    modules[name].forward = own
        return logits


class _ReadsValues(TorchDispatchMode):
    """Notices Python code that looks into tensors: what it does may depend on any of them."""

    OPS = (
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.equal.default,
        torch.ops.aten.nonzero.default,
    )

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen |= func in self.OPS
        return func(*args, **(kwargs or {}))


def split_by_replay(model: LogitsModel, name: str, images: Tensor) -> Halves:
    """The halves. Of the outputs recorded before the cut, the head returns those on which the
    logits depend when all of them are given; the others need not be kept.

    Raises:
        ArgumentError: the forward pass never calls ``name``.
        ModelError: what runs before the cut depends on the images.
    """
    head = ReplayBackbone(model, name)
    with torch.no_grad():
        (calls, two), (others, three) = (head.recorded(batch) for batch in two_batches(images))
    if calls != others or len(two) != len(three):
        raise ModelError(
            f"which of its modules run before {name!r} depends on the images",
            "Name a module as tail= before which the forward pass is always the same.",
        )
    slots = [_Slot(a, b) for a, b in zip(two, three, strict=True)]
    tail = ReplayTail(model, calls, slots)
    head.slots = slots
    with torch.enable_grad(), _ReadsValues() as reading:
        leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in two]
        logits = tail.replay([leaf.clone() for leaf in leaves])
    if reading.seen:
        return head, tail
    floating = [i for i, leaf in enumerate(leaves) if leaf.requires_grad]
    grads = torch.autograd.grad(
        logits.sum(), [leaves[i] for i in floating], allow_unused=True, materialize_grads=False
    )
    for i, grad in zip(floating, grads, strict=True):
        slots[i].used = slots[i].rule is not None and grad is not None
    with torch.no_grad():
        want, got = model(images), tail(*head(images))
    if not torch.allclose(got, want, rtol=1e-3, atol=1e-4 * (1 + float(want.abs().max()))):
        for slot in slots:  # values that reach the logits without a gradient
            slot.used = slot.rule is not None
    return head, tail
