"""Forget, retain and overall accuracy, and the mask: the baseline for every unlearning method.

`mask` sets the forgotten logits to -inf. That gives FA = 0 and never lowers RA, at no cost. So
FA and RA say whether the outputs forgot without harm; they say nothing about the features inside.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..models.class_indices import ANY_NUMBER, check_forget
from ..models.outputs import (
    OutputChoice,
    check_output,
    find_output,
    is_ambiguous,
    pick_logits,
)  # fmt: skip
from ..models.parameters import unwrap
from ..models.probe import refuse_embedding
from ..models.wrapper import working_copy
from .labelled_batches import check_label_range, labelled_batches


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
    *,
    output: OutputChoice | None = None,
) -> Evaluation:
    """Measures ``model`` on labelled images.

    Args:
        model: an image classifier; runs in eval mode and returns to its modes afterwards.
        data: a (images, labels) pair of tensors, or a DataLoader or another iterable of such
            pairs; images float [N, ...] as the model takes them, labels int [N].
        forget: the forgotten classes, as for `unlearn`.
        batch: the batch size if ``data`` is a pair of tensors.
        output: which item of the model's output holds the logits: an index, a key or attribute, or
            a callable; None: the item that the last layer makes (see `find_output`).

    Raises:
        ArgumentError: there are no images, the model has no logit for a label, or ``forget`` is
            not a set of class indices.
        ModelError: the model returns no logits, or an embedding instead.
    """
    check_output(output)
    correct: Tensor | None = None
    first = next(unwrap(model).parameters(), None)
    with _eval_mode(model):
        for images, labels in labelled_batches(data, "data", batch):
            if first is not None:
                images = images.to(first.device, first.dtype)
            scores = model(images)
            if correct is None:
                output = _checked_output(model, images, scores, output)
            logits = _logits(scores, output, len(images))
            classes = logits.shape[1]
            if correct is None:
                forget = check_forget(forget, classes)
                correct = total = torch.zeros(classes, dtype=torch.int64)
            check_label_range(labels, classes, "data")
            in_batch = count_correct(logits.argmax(1).cpu(), labels, classes)
            correct, total = correct + in_batch[0], total + in_batch[1]
    assert correct is not None  # labelled_batches yields a batch or raises
    return Evaluation.from_counts(correct, total, forget)


def _checked_output(
    model: nn.Module, images: Tensor, scores: Any, output: OutputChoice | None
) -> OutputChoice | None:
    """Which item of the output holds the logits, found if not given; refuses an embedding."""
    if output is None and is_ambiguous(scores):
        output = find_output(working_copy(model, images.device).module, images[:2].float())
    if not isinstance(unwrap(model), MaskedClassifier):
        refuse_embedding(model, images[:4], output)
    return output


def _logits(scores: Any, output: OutputChoice | None, images: int) -> Tensor:
    """The logits [N, C] in a model's output for so many images."""
    logits: Tensor = pick_logits(scores, output)
    if logits.ndim == 1 and images == 1:  # a squeeze() in forward() removed the batch dimension
        logits = logits[None]
    if logits.ndim != 2 or len(logits) != images:
        raise ModelError(
            f"for {images} images its output is {tuple(logits.shape)}, not [{images}, classes]",
            "Pass an image classifier: one image in, one row of logits out.",
        )
    return logits


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

    def __init__(
        self, model: nn.Module, forget: list[int], output: OutputChoice | None = None
    ) -> None:
        super().__init__()
        self.model, self.forget, self.output = model, forget, output

    def forward(self, x: Tensor) -> Tensor:
        scores = self.model(x)
        if self.output is None and is_ambiguous(scores):
            raise ModelError(
                f"its output is a {type(scores).__name__} of several tensors",
                "Say by output= of mask() which one holds the logits.",
            )
        logits: Tensor = pick_logits(scores, self.output)
        check_forget(self.forget, logits.shape[1])
        return logits.index_fill(1, torch.tensor(self.forget, device=logits.device), -torch.inf)


def mask(model: nn.Module, forget: Any, output: OutputChoice | None = None) -> MaskedClassifier:
    """The mask baseline: ``model`` with the forgotten logits at -inf. It hides without forgetting.

    Wraps the model without copying it. ``output`` says which item of its output holds the logits.

    Raises:
        ArgumentError: ``forget`` is not a set of class indices. Indices beyond the logits are
            found at the first forward pass.
    """
    check_output(output)
    return MaskedClassifier(model, check_forget(forget, ANY_NUMBER), output)
