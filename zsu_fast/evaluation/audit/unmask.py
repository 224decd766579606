"""The un-mask test: put the original's last-layer rows back and see whether the classes return.

It is the exact opposite of a mask. If the model recognises the forgotten classes once their rows
are the original's, unlearning removed the classifier's access to the features, not the features.
"""

from __future__ import annotations

import torch

from ...errors import ModelError
from .audited_model import AuditedModel, variant


def unmasked(
    audited: AuditedModel, original: AuditedModel, rows: list[int] | None, classes: int
) -> AuditedModel:
    """Returns a variant of ``audited`` with rows of the original's last layer put back.

    Args:
        audited: any model with a last layer like the original's; stays unchanged.
        original: where the rows come from.
        rows: the classes whose weights and biases are put back. None: all classes, which also
            undoes a shuffled last layer and raised rows of *other* classes.
        classes: the number of logits.

    Raises:
        ModelError: the last layers differ in shape, or do not have one row per class.
    """
    new = dict(audited.last_layer.named_parameters())
    old = dict(original.last_layer.named_parameters())
    shapes = {n: tuple(p.shape) for n, p in new.items()}
    if shapes != {n: tuple(p.shape) for n, p in old.items()}:
        raise ModelError(
            f"{audited.name}: its last layer {shapes} differs in shape from the original's",
            "The un-mask test needs models of one architecture.",
        )
    if any(shape[0] != classes for shape in shapes.values()):
        raise ModelError(
            f"{audited.name}: its last layer {audited.layers[-1]!r} does not have one row for each "
            f"of {classes} classes: {shapes}",
            "The un-mask test needs a Linear or convolution with one output per class.",
        )
    part = "rows" if rows is not None else "last layer"
    restored = variant(audited, f"{audited.name}, original {part} back")
    index = torch.tensor(list(range(classes)) if rows is None else rows)
    with torch.no_grad():
        for name, parameter in restored.last_layer.named_parameters():
            parameter[index] = old[name][index]
    return restored
