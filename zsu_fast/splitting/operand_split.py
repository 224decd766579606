"""Splits a tail right before the operation that applies the classifier, if that is no module.

A CLIP-like classifier is an expression, such as ``scale * f @ text.T``: no hook sees it, so a split
by modules lies further ahead, at the layer that makes ``f``. Rows synthesised there are unlike real
features if ``f`` is normalised. Here the calls of torch functions are watched instead. The first
that takes both the classifier and something of the images' is the split: its operand is what passes
from the backbone to the tail.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from .batch_dim import BoundaryTensors


def split_before_operand(
    tail: nn.Module, classifier: Tensor, boundary: BoundaryTensors
) -> tuple[nn.Module, nn.Module] | None:
    """Splits ``tail`` before the operation that applies ``classifier``.

    Args:
        tail: boundary tensors, each [N, ...] -> logits [N, C].
        classifier: a parameter of ``tail``.
        boundary: of three or more images.

    Returns:
        The part before, boundary tensors -> a tuple of one tensor [N, ...], and the rest; None if
        there is no such operation, or if more than that operand reaches the logits.
    """
    place = next(
        (
            (module, name)
            for module in tail.modules()
            for name, parameter in module.named_parameters(recurse=False)
            if parameter is classifier
        ),
        None,
    )
    if place is None:
        return None
    first = OperandBefore(tail, *place)
    rest = OperandTail(tail, *place, tuple(b[:1].detach() for b in boundary))
    with torch.no_grad():
        want = tail(*boundary)
        operands = first(*boundary)
        if not operands:
            return None
        rest.norm = _constant_norm(first, boundary)
        got, flipped = rest(*operands), rest(operands[0].flip(0)).flip(0)
    tolerance = 1e-4 + 1e-3 * float(want.abs().max())
    if any(bool(((t - want).abs() > tolerance).any()) for t in (got, flipped)):
        return None
    return first, rest


def _constant_norm(first: nn.Module, boundary: BoundaryTensors) -> float | None:
    """The length of the operand's vectors if it does not depend on the images, else None."""
    factors = torch.linspace(0.5, 2, len(boundary[0]), device=boundary[0].device)
    scaled = [b * factors.view(-1, *[1] * (b.ndim - 1)) for b in boundary]
    norms = first(*scaled)[0].norm(dim=-1)
    mean = float(norms.mean())
    return mean if float((norms - mean).abs().max()) <= 1e-3 * mean and mean > 0 else None


class OperandBefore(nn.Module):
    """Boundary tensors -> the operand; an empty tuple if there is none."""

    def __init__(self, tail: nn.Module, owner: nn.Module, name: str) -> None:
        super().__init__()
        self.tail, self.owner, self.name = tail, owner, name

    def forward(self, *boundary: Tensor) -> BoundaryTensors:
        with _Watch(getattr(self.owner, self.name), len(boundary[0])) as watch:
            self.tail(*boundary)
        return () if watch.operand is None else (watch.operand,)


class OperandTail(nn.Module):
    """Runs a tail on some boundary tensors, with another operand in place of the one it computes.

    Args:
        tail: the tail.
        owner, name: where the classifier is.
        boundary: boundary tensors of one image, which have no influence.

    Attributes:
        norm: length of the operand's vectors if that is the same for all images, else None. Each
            operand is brought to it, so that what is synthesised or mixed is like real features.
    """

    def __init__(
        self, tail: nn.Module, owner: nn.Module, name: str, boundary: BoundaryTensors
    ) -> None:
        super().__init__()
        self.tail, self.owner, self.name, self.boundary = tail, owner, name, boundary
        self.norm: float | None = None

    def forward(self, operand: Tensor) -> Tensor:
        if self.norm is not None:
            operand = self.norm * nn.functional.normalize(operand, dim=-1)
        rows = [b.expand(len(operand), *b.shape[1:]) for b in self.boundary]
        with _Watch(getattr(self.owner, self.name), len(operand), operand):
            logits: Tensor = self.tail(*rows)
        return logits


class _Watch(TorchFunctionMode):
    """Notes, or replaces, the operand of the first operation on the classifier and the images.

    What is computed from the classifier alone, such as its transpose, counts as the classifier.
    """

    def __init__(self, classifier: Tensor, batch: int, replacement: Tensor | None = None) -> None:
        super().__init__()
        self.derived = {id(classifier): classifier}  # held, so that no other tensor gets its id
        self.batch, self.replacement = batch, replacement
        self.operand: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.operand is not None:
            return func(*args, **kwargs)
        leaves, form = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not any(id(t) in self.derived for t in tensors):
            return func(*args, **kwargs)
        for place, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and id(leaf) not in self.derived and self._of_images(leaf):
                self.operand = leaf
                if self.replacement is not None:
                    leaves[place] = self.replacement
                args, kwargs = pytree.tree_unflatten(leaves, form)
                return func(*args, **kwargs)
        output = func(*args, **kwargs)
        for leaf in pytree.tree_leaves(output):
            if isinstance(leaf, Tensor):
                self.derived[id(leaf)] = leaf
        return output

    def _of_images(self, tensor: Tensor) -> bool:
        return tensor.ndim > 1 and tensor.shape[0] == self.batch
