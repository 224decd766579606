"""Forget, retain and overall accuracy, and the baseline that every method has to be held against.

Setting the forgotten logits to -inf (`mask`) gives FA = 0 and never lowers RA, at no cost. So
FA and RA say whether outputs were forgotten without harm, and nothing about what is inside.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..models.class_indices import ANY_NUMBER, check_forget
from ..models.parameters import unwrap
from ..models.wrapper import pick_logits


@dataclass(frozen=True)
class Evaluation:
    """Top-1 accuracies in per cent; None where there is no image to measure on.

    Attributes:
        forget_accuracy: FA, over images of the forgotten classes. Lower is better.
        retain_accuracy: RA, over images of the other classes. Higher is better.
        overall_accuracy: over all images, forgotten classes *included*: it has to fall when
            classes are forgotten, so it can't be compared with RA.
        per_class: over the images of each class that occurs.
        forget_count, retain_count: numbers of images: the denominators of FA and RA; their sum is
            that of the overall accuracy.
        forget: the forgotten classes.
    """

    forget_accuracy: float | None
    retain_accuracy: float | None
    overall_accuracy: float | None
    per_class: dict[int, float]
    forget_count: int
    retain_count: int
    forget: list[int]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        def show(value: float | None) -> str:
            return "none" if value is None else f"{value:.2f} %"

        total = self.forget_count + self.retain_count
        return (
            f"FA {show(self.forget_accuracy)} of {self.forget_count} images of the forgotten "
            f"classes, RA {show(self.retain_accuracy)} of {self.retain_count} others, overall "
            f"{show(self.overall_accuracy)} of all {total}"
        )


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: tuple[Tensor, Tensor] | Iterable[tuple[Tensor, Tensor]],
    forget: Any,
    batch: int = 256,
) -> Evaluation:
    """Measures ``model`` on labelled images.

    Args:
        model: an image classifier; run in eval mode, then put back as it was.
        data: a (images, labels) pair of tensors, or a DataLoader or other iterable of such pairs;
            images float [N, ...] as the model wants them, labels int [N].
        forget: the forgotten classes, as for `unlearn`.
        batch: images at a time where ``data`` is a pair of tensors.

    Raises:
        ArgumentError: no images, labels that the model has no logit for, or a bad ``forget``.
    """
    batches: Iterable[Any] = data
    if isinstance(data, tuple | list) and len(data) == 2 and isinstance(data[1], Tensor):
        images, labels = data
        if len(images) != len(labels):
            raise ArgumentError(
                "data",
                f"there are {len(images)} images and {len(labels)} labels",
                "Pass a label for each image.",
            )
        batches = zip(images.split(batch), labels.split(batch), strict=True)
    first = next(unwrap(model).parameters(), None)
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    right = count = torch.zeros(0, dtype=torch.int64)
    try:
        for images, labels in batches:
            if first is not None:
                images = images.to(first.device, first.dtype)
            logits = pick_logits(model(images))
            classes = logits.shape[1]
            if not len(count):
                check_forget(forget, classes)
                right = count = torch.zeros(classes, dtype=torch.int64)
            labels = torch.as_tensor(labels).cpu()
            if labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
                raise ArgumentError(
                    "data",
                    f"its labels are {labels.dtype} of shape {tuple(labels.shape)}",
                    "Pass one class index, an int, for each image.",
                )
            labels = labels.long()
            if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
                raise ArgumentError(
                    "data",
                    f"labels run from {int(labels.min())} to {int(labels.max())}, the model has "
                    f"{classes} logits",
                    f"Number the classes from 0 to {classes - 1}, as the model was trained.",
                )
            hit = labels[logits.argmax(1).cpu() == labels]
            count = count + torch.bincount(labels, minlength=classes)
            right = right + torch.bincount(hit, minlength=classes)
    finally:
        for module, mode in modes:
            module.training = mode
    if int(count.sum()) == 0:
        raise ArgumentError("data", "there is no image in it", "Pass at least one labelled image.")
    wanted = check_forget(forget, len(count))
    gone = torch.zeros(len(count), dtype=torch.bool)
    gone[wanted] = True
    return Evaluation(
        forget_accuracy=_percent(right[gone], count[gone]),
        retain_accuracy=_percent(right[~gone], count[~gone]),
        overall_accuracy=_percent(right, count),
        per_class={
            c: 100 * int(right[c]) / int(count[c]) for c in range(len(count)) if int(count[c])
        },
        forget_count=int(count[gone].sum()),
        retain_count=int(count[~gone].sum()),
        forget=wanted,
    )


def _percent(right: Tensor, count: Tensor) -> float | None:
    total = int(count.sum())
    return 100 * int(right.sum()) / total if total else None


class MaskedClassifier(nn.Module):
    """A classifier whose forgotten logits are -inf; returns the logits tensor."""

    def __init__(self, model: nn.Module, forget: list[int]) -> None:
        super().__init__()
        self.model, self.forget = model, forget

    def forward(self, x: Tensor) -> Tensor:
        logits = pick_logits(self.model(x)).clone()
        check_forget(self.forget, logits.shape[1])
        logits[:, self.forget] = -torch.inf
        masked: Tensor = logits
        return masked


def mask(model: nn.Module, forget: Any) -> MaskedClassifier:
    """The baseline: ``model`` with the forgotten logits at -inf. Hides, does not forget.

    Wraps the model without copying it.

    Raises:
        ArgumentError: ``forget`` is no set of class indices (its range shows at the first image).
    """
    return MaskedClassifier(model, check_forget(forget, ANY_NUMBER))
