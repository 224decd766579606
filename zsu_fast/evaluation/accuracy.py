"""Forget, retain and overall accuracy, and the mask: the baseline for every unlearning method.

`mask` sets the forgotten logits to -inf. That gives FA = 0 and never lowers RA, at no cost. So
FA and RA say whether the outputs forgot without harm; they say nothing about the features inside.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError, UnlearningWarning
from ..models.class_indices import ANY_NUMBER, check_forget
from ..models.embedding_classifier import as_embedding_classifier
from ..models.labels import known_labels
from ..models.multi_label import check_multi_label, stated_multi_label
from ..models.outputs import OutputChoice, check_output, is_ambiguous, pick_logits
from ..models.parameters import unwrap
from .class_order import check_order
from .encoder_evaluation import evaluate_encoder, refuse_for_encoder
from .labelled_data import LabelledData
from .multi_label import is_multi_label, measure_multi_label
from .run_model import check_logits, choose_output, eval_mode, image_spec, run_model


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
        labels: class index, as text, -> name, for the forgotten classes; {} if not known.
        data_classes: class of the data -> class of the model, where the data names its classes.
    """

    forget_accuracy: float | None
    retain_accuracy: float | None
    overall_accuracy: float | None
    per_class: dict[int, float]
    forget_count: int
    retain_count: int
    forget: list[int]
    labels: dict[str, str] = field(default_factory=dict)
    data_classes: dict[str, int] = field(default_factory=dict)

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
    data: Any,
    forget: Any,
    batch: int = 256,
    multi_label: bool | None = None,
    *,
    output: OutputChoice | None = None,
    class_names: Any = None,
    input_shape: Sequence[int] | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
) -> Evaluation | Any:  # a union would make every caller narrow it
    """Measures ``model`` on labelled images.

    Where the data names its classes (folders, data sets), they are matched with the model's by name
    or number, so that their order does not count; see `map_classes`.

    Args:
        model: an image classifier; runs in eval mode and returns to its modes afterwards.
        data: a (images, labels) pair of tensors or arrays; a DataLoader, a data set, or another
            iterable of such pairs, of (image, label) rows, or of dicts with keys such as
            ``pixel_values`` and ``labels``. Images are float [N, ...] as the model takes them, or
            uint8 or pictures where mean and std are known; labels int [N], and of a multi-label
            model [N, C] of 0 and 1, or a list of the classes of each image.
        forget: the forgotten classes, as for `unlearn`.
        batch: the batch size if ``data`` is a pair or has rows.
        multi_label: whether each class has a sigmoid of its own; None: if the labels hold several
            classes per image.
        output: which item of the model's output holds the logits: an index, a key or attribute, or
            a callable; None: the item that the last layer makes (see `find_output`).
        class_names: the names of the model's classes, as for `unlearn`.
        input_shape, mean, std: the images that the model takes; None: what the model states.

    Returns:
        An `Evaluation`, a `MultiLabelEvaluation`, or, of an `EmbeddingClassifier`, an
        `EncoderEvaluation`.

    Raises:
        ArgumentError: there are no images, the model has no logit for a label, the classes of the
            data can't be matched with the model's, or ``forget`` is not a set of classes.
        ModelError: the model returns no logits, an embedding instead, or logits that are not
            finite.

    Warns:
        UnlearningWarning: what is assumed of the images and labels.
    """
    check_output(output)
    check_multi_label(multi_label)
    if (classifier := as_embedding_classifier(model)) is not None:
        refuse_for_encoder(output, multi_label)
        return evaluate_encoder(
            classifier, data, forget, batch, class_names, input_shape, mean, std
        )
    source = LabelledData(data, "data", image_spec(model, input_shape, mean, std), class_names)
    outputs: list[Tensor] = []  # predictions, or all outputs of a multi-label model
    targets: list[Tensor] = []
    labels, classes, several = None, 0, False
    with eval_mode(model):
        for images, given in source.batches(batch):
            if not outputs and not isinstance(unwrap(model), MaskedClassifier):
                output = choose_output(model, images, output)
            logits = run_model(model, images, output)
            if not outputs:
                classes = logits.shape[1]
                labels = source.match(model, classes)
                forget = check_forget(forget, classes, labels)
                several = is_multi_label(model, given, classes, multi_label)
            check_logits(logits)
            read = source.multi_hot_targets if several else source.targets
            targets.append(read(given, classes))
            outputs.append(logits.float().cpu() if several else logits.argmax(1).cpu())
    pair = torch.cat(outputs), torch.cat(targets)
    facts, doubts = source.format.assumptions()
    result: Any
    if several:
        stated = multi_label is True or stated_multi_label(model)
        result = measure_multi_label(*pair, forget, stated)
        doubts += source.unconfirmed_order()
    else:
        if found := check_order(*pair, classes, forget, source.found):
            doubts.append(f"data: {found}")
        result = Evaluation.from_counts(*count_correct(*pair, classes), forget)
    for note in [*facts, *doubts]:
        warnings.warn(note, UnlearningWarning, stacklevel=2)
    return replace(
        result,
        labels={} if labels is None else labels.named(forget),
        data_classes={} if source.found is None else source.found.classes,
    )


def count_correct(predictions: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Counts the correct predictions and the images of each class: int64 [C] each.

    Predictions and labels are int64 [N] on the CPU, and C is the number of ``classes``.
    """
    correct = torch.bincount(labels[predictions == labels], minlength=classes)
    return correct, torch.bincount(labels, minlength=classes)


def percentage(part: int, whole: int) -> float | None:
    """``part`` of ``whole`` in per cent; None if ``whole`` is 0."""
    return 100 * part / whole if whole else None


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
    labels = known_labels(model)
    classes = ANY_NUMBER if labels is None else len(labels)
    return MaskedClassifier(model, check_forget(forget, classes, labels), output)
