"""Splits a model before one of its modules by recording and replaying its modules' outputs.

For models that torch.fx can't trace. The backbone runs the model up to the split and records what
the modules before it returned. The tail runs the model's own code once more, in which those modules
return the recorded outputs instead of computing them.
"""

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
from ..runtime.hooks import forward_hooks, forward_pre_hooks
from .batch_dim import BoundaryTensors, equal_constants, infer_batch_dim, two_batches


def split_by_replay(model: LogitsModel, name: str, images: Tensor) -> tuple[nn.Module, nn.Module]:
    """Splits ``model`` before its module ``name``; arguments as for `split.split_at`.

    Of the tensors recorded before the split, the backbone returns only those on which the logits
    depend when all of them are given.

    Returns:
        The backbone and the tail.

    Raises:
        ArgumentError: the forward pass never calls ``name``.
        ModelError: which modules run before the split depends on the images.
    """
    backbone = ReplayBackbone(model, name)
    with torch.no_grad():
        (calls, two), (others, three) = (backbone.record(batch) for batch in two_batches(images))
    if calls != others or len(two) != len(three):
        raise ModelError(
            f"which of its modules run before {name!r} depends on the images",
            "Name a module as tail= before which the forward pass is always the same.",
        )
    slots = [_Slot(a, b) for a, b in zip(two, three, strict=True)]
    tail = ReplayTail(model, calls, slots)
    backbone.slots = slots
    with torch.enable_grad(), _ValueReads() as reads:
        leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in two]
        logits = tail.replay([leaf.clone() for leaf in leaves])
    if reads.found:
        return backbone, tail
    floating = [i for i, leaf in enumerate(leaves) if leaf.requires_grad]
    grads = torch.autograd.grad(logits.sum(), [leaves[i] for i in floating], allow_unused=True)
    for i, grad in zip(floating, grads, strict=True):
        slots[i].used = slots[i].batch_dim is not None and grad is not None
    with torch.no_grad():
        want, got = model(images), tail(*backbone(images))
    if not torch.allclose(got, want, rtol=1e-3, atol=1e-4 * (1 + float(want.abs().max()))):
        for slot in slots:  # some value reaches the logits without a gradient
            slot.used = slot.batch_dim is not None
    return backbone, tail


class _SplitReached(Exception):
    """The module at the split is about to run."""


@dataclass(frozen=True)
class _Call:
    """A finished call of the module ``name``. Its output is the tree ``form``, whose leaves are
    tensors where ``filled`` is True, and None elsewhere.
    """

    name: str
    form: pytree.TreeSpec
    filled: tuple[bool, ...]

    def output(self, tensors: Iterator[Tensor]) -> Any:
        leaves = [next(tensors) if full else None for full in self.filled]
        return pytree.tree_unflatten(leaves, self.form)


class _Slot:
    """What a recorded tensor is to the tail: an input, a constant, or without influence."""

    def __init__(self, two: Tensor, three: Tensor) -> None:
        self.batch_dim = infer_batch_dim(two, three)
        self.used = self.batch_dim is not None
        constant = not self.used and equal_constants(two, three)
        self.constant = two.detach() if constant else None
        rows = two if self.batch_dim is None else self.batch_dim.pack(two)
        self.zeros = rows.detach().new_zeros(()).expand(rows.shape)  # takes no memory

    def read(self, inputs: Iterator[Tensor], batch: int) -> Tensor:
        """The tail's next input, the constant, or zeros for a tensor without influence."""
        if self.constant is not None:
            return self.constant
        if self.batch_dim is None:
            return self.zeros
        rows = next(inputs) if self.used else self.zeros[:1].expand(batch, *self.zeros.shape[1:])
        return self.batch_dim.unpack(rows)


class ReplayBackbone(nn.Module):
    """Runs the model up to the split and returns the recorded tensors that the tail reads."""

    def __init__(self, model: LogitsModel, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name
        self.slots: list[_Slot] = []

    def forward(self, x: Tensor) -> BoundaryTensors:
        _, tensors = self.record(x)
        return tuple(
            _full_precision(slot.batch_dim.pack(tensor))
            for slot, tensor in zip(self.slots, tensors, strict=True)
            if slot.used and slot.batch_dim is not None
        )

    def record(self, x: Tensor) -> tuple[list[_Call], list[Tensor]]:
        """Runs the model up to the split.

        Returns:
            The calls that finished, without those inside another one; and the tensors: ``x``
            itself, then those in the outputs of the calls.
        """
        names = {module: name for name, module in self.model.module.named_modules() if name}
        finished: list[tuple[_Call, list[Tensor]]] = []

        def record(module: nn.Module, _args: Any, output: Any) -> None:
            leaves, form = pytree.tree_flatten(output)
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            if tensors and all(leaf is None or isinstance(leaf, Tensor) for leaf in leaves):
                name = names[module]
                while finished and finished[-1][0].name.startswith(f"{name}."):
                    finished.pop()  # the call of a parent replaces those of its children
                filled = tuple(leaf is not None for leaf in leaves)
                finished.append((_Call(name, form, filled), tensors))

        def stop(_module: nn.Module, _args: Any, _kwargs: Any) -> None:
            raise _SplitReached

        start = [module for module, name in names.items() if name == self.name]
        with forward_hooks(names, record), forward_pre_hooks(start, stop):
            try:
                self.model(x)
            except _SplitReached:
                tensors = [t for _, of_call in finished for t in of_call]
                return [call for call, _ in finished], [x, *tensors]
        raise ArgumentError(
            "tail",
            f"got {self.name!r}, a module that the forward pass never calls",
            "Name a module that takes part in the forward pass.",
        )


def _full_precision(rows: Tensor) -> Tensor:
    """Rows that autocast inside ``forward`` made, in float32: they are mixed and trained on."""
    return rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows


class ReplayTail(nn.Module):
    """Runs the model with the modules before the split returning their recorded outputs."""

    def __init__(self, model: LogitsModel, calls: list[_Call], slots: list[_Slot]) -> None:
        super().__init__()
        self.model, self.calls, self.slots = model, calls, slots

    def forward(self, *features: Tensor) -> Tensor:
        inputs, batch = iter(features), len(features[0])
        return self.replay([slot.read(inputs, batch) for slot in self.slots])

    def replay(self, tensors: Sequence[Tensor]) -> Tensor:
        """The logits, from the images and every recorded tensor in the model's layout."""
        x, *recorded = tensors
        remaining = iter(recorded)
        outputs: dict[str, list[Any]] = {}
        for call in self.calls:
            outputs.setdefault(call.name, []).append(call.output(remaining))
        modules = dict(self.model.module.named_modules())
        originals = {}
        for name, recorded_outputs in outputs.items():
            module = modules[name]
            originals[name] = module.__dict__.get("forward")
            module.forward = _replaying(recorded_outputs, module.forward)
        try:
            logits: Tensor = self.model(x)
        finally:
            for name, own in originals.items():
                if own is None:
                    del modules[name].__dict__["forward"]
                else:
                    modules[name].forward = own
        return logits


def _replaying(outputs: list[Any], forward: Any) -> Any:
    """A ``forward`` that returns ``outputs`` one by one, and then computes again."""
    queue = iter(outputs)

    def replay(*args: Any, **kwargs: Any) -> Any:
        for output in queue:
            return output
        return forward(*args, **kwargs)

    return replay


class _ValueReads(TorchDispatchMode):
    """Notices Python code that reads tensors' values: its course may depend on any tensor."""

    OPS = (
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.equal.default,
        torch.ops.aten.nonzero.default,
    )

    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found |= func in self.OPS
        return func(*args, **(kwargs or {}))
