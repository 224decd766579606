"""Restricts a split before the last layer to the classifier, which may be no layer at all."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..models.wrapper import LogitsModel
from .batch_dim import BoundaryTensors
from .class_rows import ClassDims, class_dims, layer_of, requiring_gradients
from .layers import layer_names
from .operand_split import split_before_operand
from .parts import Split


def class_split(model: LogitsModel, split: Split, images: Tensor) -> Split:
    """Restricts a split before the last layer to the classifier: what holds one row per class.

    That may be less than the layer (a scale of all logits stays as it is), or something else: a
    matrix that `forward` multiplies by itself, or the last layers of an ensemble. Whatever else the
    tail uses is not trained then. A tail without such a matrix is returned as it is, with a warning
    if nothing in it is as long as there are classes.

    Args:
        model: from `working_copy`.
        split: its last layer, or less.
        images: two or more.

    Raises:
        ModelError: the classifier is frozen, and other parts of the model are not.
    """
    named = dict(model.module.named_parameters())
    used = {n: named[n] for n in [*split.parameters, *split.fixed] if n in named}
    with torch.no_grad():
        boundary = split.backbone(images)
    with requiring_gradients(used), torch.enable_grad():
        logits = split.tail(*boundary)
        dims = class_dims(logits, used)
    matrices = [n for n in dims if named[n].ndim > 1]
    trained = [n for n in split.parameters if n in dims]
    if matrices and not any(named[n].ndim > 1 for n in trained):
        raise frozen_classifier(matrices[0])
    if not matrices:
        wide = any(logits.shape[1] in p.shape for p in used.values())
        warning = "" if wide else (
            f"no tensor of the model holds one row per class: {', '.join(split.parameters)} was "
            f"trained as a whole, and the data-free checks may miss what images show. Measure FA "
            f"and RA on images."
        )  # fmt: skip
        return replace(split, warning=warning)
    return _restricted(split, used, trained, dims)


def _restricted(
    split: Split, used: Iterable[str], trained: list[str], dims: ClassDims, warning: str = ""
) -> Split:
    """``split`` with only the parameters ``trained``, which hold one row per class."""
    reason = split.reason
    if trained != split.parameters:
        reason = f"{reason}; only what holds one row per class is trained: {', '.join(trained)}"
    return replace(
        split, reason=reason, parameters=trained, output_level=True,
        fixed=[n for n in used if n not in trained], class_dims={n: dims[n] for n in trained},
        warning=warning,
    )  # fmt: skip


def classifier_split(model: LogitsModel, split: Split, images: Tensor) -> Split:
    """`class_split`, and if the classifier is no layer, the split moved on to right before it.

    Args:
        model: from `working_copy`.
        split: before the last layer.
        images: one or more; better three.
    """
    images = images[:3] if len(images) > 2 else images[:1].expand(3, *images.shape[1:])
    split = _before_classifier(model, class_split(model, split, images[:2]), images)
    with torch.no_grad():
        boundary = split.backbone(images)
        if split.class_dims and all(t.is_floating_point() for t in boundary):
            # a softmax that is saturated at one scale is not at the other
            near, far = (split.tail(*[t * factor for t in boundary]) for factor in (0.02, 2.0))
            spread = float((far - far[:1]).abs().max())  # exactly 0 where rows have no influence
            split.directions = float((near - far).abs().max()) < 1e-3 * spread
    return split


def _before_classifier(model: LogitsModel, split: Split, images: Tensor) -> Split:
    """Moves a split from `class_split` on to the classifier itself, if that is no layer."""
    named = dict(model.module.named_parameters())
    matrices = [n for n in split.class_dims if named[n].ndim > 1]
    if len(matrices) != 1 or layer_of(matrices[0]) == split.name:
        return split
    if layer_of(matrices[0]) in layer_names(model.module, images):
        return split
    with torch.no_grad():
        boundary = split.backbone(images)
    parts = split_before_operand(split.tail, named[matrices[0]], boundary)
    if parts is None:
        return split
    before, tail = parts
    reason = f"{split.reason}; before {matrices[0]}, which is no layer"
    return replace(split, backbone=_Chain(split.backbone, before), tail=tail, reason=reason)


def frozen_classifier(parameter: str) -> ModelError:
    layer = layer_of(parameter)
    return ModelError(
        f"its classifier {parameter} is frozen (requires_grad=False) and other parameters are not",
        f"Unfreeze it: model.get_parameter({parameter!r}).requires_grad_(True)"
        + (f", or model.get_submodule({layer!r}).requires_grad_(True)." if layer else "."),
    )


class _Chain(nn.Module):
    """Images -> boundary tensors -> those of a later split."""

    def __init__(self, backbone: nn.Module, then: nn.Module) -> None:
        super().__init__()
        self.backbone, self.then = backbone, then

    def forward(self, x: Tensor) -> BoundaryTensors:
        boundary: BoundaryTensors = self.then(*self.backbone(x))
        return boundary
