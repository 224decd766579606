"""Forget, retain and overall accuracy, and the mask: the baseline for every unlearning method.

`mask` sets the forgotten logits to -inf. That gives FA = 0 and never lowers RA, at no cost. So
FA and RA say whether the outputs forgot without harm; they say nothing about the features inside.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..models.class_indices import ANY_NUMBER, check_forget
from ..models.multi_label import check_multi_label, stated_multi_label
from ..models.parameters import unwrap
from ..models.wrapper import pick_logits
from .labelled_batches import check_label_range, has_several, labelled_batches
from .multi_label import evaluate_multi_label, is_multi_label


@dataclass(frozen=True)
class Evaluation:
    """Top-1 accuracies in per cent; None where there is no image to measure on.

    Attributes:
        forget_accuracy: FA, over images of the forgotten classes. Lower is better.
        retain_accuracy: RA, over images of the retained classes. Higher is better.
        overall_accuracy: over all images, *including* those of forgotten classes. Forgetting
            lowers it, so it can't be compared with RA.
        per_class: class -> accuracy over its images, for each class with images.
        forget_count, retain_count: numbers of images behind FA and RA; their sum is the number
            behind the overall accuracy.
        forget: the forgotten classes.
    """

    forget_accuracy: float | None
    retain_accuracy: float | None
    overall_accuracy: float | None
    per_class: dict[int, float]
    forget_count: int
    retain_count: int
    forget: list[int]

    @classmethod
    def from_counts(cls, correct: Tensor, total: Tensor, forget: list[int]) -> Evaluation:
        """Builds the accuracies from the counts of `count_correct`."""
        forget_correct, forget_count = int(correct[forget].sum()), int(total[forget].sum())
        all_correct, count = int(correct.sum()), int(total.sum())
        return cls(
            percentage(forget_correct, forget_count),
            percentage(all_correct - forget_correct, count - forget_count),
            percentage(all_correct, count),
            {c: 100 * int(correct[c]) / int(total[c]) for c in range(len(total)) if int(total[c])},
            forget_count,
            count - forget_count,
            list(forget),
        )

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
    multi_label: bool | None = None,
) -> Evaluation | Any:  # a union would make every caller narrow it
    """Measures ``model`` on labelled images.

    Args:
        model: an image classifier; runs in eval mode and returns to its modes afterwards.
        data: a (images, labels) pair of tensors, or a DataLoader or another iterable of such
            pairs; images float [N, ...] as the model takes them, labels int [N];
            of a multi-label model, [N, C] of 0 and 1, or a list of the classes of each image.
        forget: the forgotten classes, as for `unlearn`.
        batch: the batch size if ``data`` is a pair of tensors.
        multi_label: whether each class has a sigmoid of its own; None: if the labels hold several
            classes per image.

    Returns:
        An `Evaluation`, or a `MultiLabelEvaluation`.

    Raises:
        ArgumentError: there are no images, the model has no logit for a label, or ``forget`` is
            not a set of class indices.
    """
    correct: Tensor | None = None
    first = next(unwrap(model).parameters(), None)
    check_multi_label(multi_label)
    several = multi_label is not False

    def run() -> Iterator[tuple[Tensor, Any]]:
        for images, labels in labelled_batches(data, "data", batch, several):
            if first is not None:
                images = images.to(first.device, first.dtype)
            yield pick_logits(model(images)), labels

    with _eval_mode(model):
        outputs = run()
        head = next(outputs)
        if several and is_multi_label(model, head[1], multi_label):
            stated = multi_label is True or stated_multi_label(model)
            return evaluate_multi_label(chain([head], outputs), forget, stated)
        for logits, labels in chain([head], outputs):
            if several and has_several(labels):
                raise ArgumentError("data", "only some of its labels are [N, C]", "Pass one kind.")
            classes = logits.shape[1]
            if correct is None:
                forget = check_forget(forget, classes)
                correct = total = torch.zeros(classes, dtype=torch.int64)
            check_label_range(labels, classes, "data")
            in_batch = count_correct(logits.argmax(1).cpu(), labels, classes)
            correct, total = correct + in_batch[0], total + in_batch[1]
    assert correct is not None  # labelled_batches yields a batch or raises
    return Evaluation.from_counts(correct, total, forget)


def count_correct(predictions: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Counts the correct predictions and the images of each class: int64 [C] each.

    Predictions and labels are int64 [N] on the CPU, and C is the number of ``classes``.
    """
    correct = torch.bincount(labels[predictions == labels], minlength=classes)
    return correct, torch.bincount(labels, minlength=classes)


def percentage(part: int, whole: int) -> float | None:
    """``part`` of ``whole`` in per cent; None if ``whole`` is 0."""
    return 100 * part / whole if whole else None


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Runs the block in eval mode, then restores each module's own mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class MaskedClassifier(nn.Module):
    """A classifier whose forgotten logits are -inf; returns the logits tensor."""

    def __init__(self, model: nn.Module, forget: list[int]) -> None:
        super().__init__()
        self.model, self.forget = model, forget

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = pick_logits(self.model(x))
        check_forget(self.forget, logits.shape[1])
        return logits.index_fill(1, torch.tensor(self.forget, device=logits.device), -torch.inf)


def mask(model: nn.Module, forget: Any) -> MaskedClassifier:
    """The mask baseline: ``model`` with the forgotten logits at -inf. It hides without forgetting.

    Wraps the model without copying it.

    Raises:
        ArgumentError: ``forget`` is not a set of class indices. Indices beyond the logits are
            found at the first forward pass.
    """
    return MaskedClassifier(model, check_forget(forget, ANY_NUMBER))
