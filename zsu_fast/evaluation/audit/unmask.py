"""The un-mask test: put the original's last-layer rows back and see whether the classes return.

The direct opposite of the mask. If the forgotten classes are answered again once their rows are
the original's, what was removed was the way out, not what the features hold.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import ModelError
from ...models.input_spec import InputSpec
from .audited_model import AuditedModel, variant


def unmasked(
    subject: AuditedModel,
    original: AuditedModel,
    rows: list[int] | None,
    classes: int,
    spec: InputSpec,
) -> AuditedModel:
    """``subject`` with rows of the original's last layer put back.

    Args:
        subject: any model with the original's last layer; it is not changed.
        original: where the rows come from.
        rows: the classes whose weights and biases are put back; None for all of them, which also
            undoes a head that was shuffled or whose *other* rows were raised.
        classes: number of logits.
        spec: the images they take.

    Raises:
        ModelError: the last layers differ in shape, or have no row for each class.
    """
    own = dict(subject.last.named_parameters())
    old = dict(original.last.named_parameters())
    shapes = {n: tuple(p.shape) for n, p in own.items()}
    if shapes != {n: tuple(p.shape) for n, p in old.items()}:
        raise ModelError(
            f"{subject.name}: its last layer {shapes} is not of the original's shape",
            "The un-mask test needs models of one architecture.",
        )
    if any(shape[0] != classes for shape in shapes.values()):
        raise ModelError(
            f"{subject.name}: its last layer {subject.layers[-1]!r} has no row for each of "
            f"{classes} classes: {shapes}",
            "The un-mask test needs a Linear or convolution with one output a class.",
        )
    what = "rows" if rows is not None else "last layer"
    made = variant(subject, f"{subject.name}, original {what} back", spec)
    index = torch.tensor(list(range(classes)) if rows is None else rows)
    with torch.no_grad():
        for name, parameter in made.last.named_parameters():
            parameter[index] = old[name][index]
    return made


def rows_of(subject: AuditedModel, classes: int) -> Tensor:
    """[C, D]: each class's weights and bias in the last layer, as one vector.

    Raises:
        ModelError: the last layer has no row for each class.
    """
    parts = [p.detach().float().cpu() for p in subject.last.parameters()]
    if any(len(p) != classes for p in parts):
        raise ModelError(
            f"{subject.name}: its last layer has no row for each class", "Nothing to compare."
        )
    return torch.cat([p.reshape(classes, -1) for p in parts], 1)
