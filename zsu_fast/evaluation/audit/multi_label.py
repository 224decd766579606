"""The audit's metrics of a multi-label model, on impressions and on labelled images.

What a softmax or a single top class defines has no counterpart here; `explain_missing` says so.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...errors import ZsuFastError
from ...models.multi_label import predicted
from ..multi_label import MultiLabelEvaluation
from .activations import Activations, collect_activations, normalised_batches
from .context import AuditContext, percent_true
from .data_metrics import matched_data, note_assumptions
from .features import adapted_logits, linear_cka, mean_over_positions, multi_label_probe
from .metrics import METRICS
from .relearning import DEFAULT_STEPS, GOAL, RelearnTask, relearn_task
from .result import GOLDEN, MASK, ORIGINAL, UNMASK_PREFIXES, Row

NOT_A_SOFTMAX = "it is defined for a softmax, and the model has one sigmoid per class"
_ONE_CLASS = "it needs one class per image, and the model is multi-label"
_NO_LABEL = "no image of the forgotten classes is in the data"
# Images whose features are stored, with and without a forgotten class; and those that the adapted
# last layer is fitted on.
_MAX_FEATURES, _MAX_ADAPTED = 10_000, 500
# Images that relearning is measured on, and the most numbers in the images that are stored for it.
_RELEARN_TEST, _MAX_STORED_VALUES = 600, 1 << 28
_REASONS = {
    "overall": _ONE_CLASS, "top_answer": _ONE_CLASS, "unmask_ff": _ONE_CLASS,
    "knn_forget": _ONE_CLASS, "knn_retain": _ONE_CLASS,
    "leak": "FA is the share that is predicted already", "agreement_kl": NOT_A_SOFTMAX,
}  # fmt: skip
_GROUPS = {"membership": NOT_A_SOFTMAX, "distances": NOT_A_SOFTMAX}


def explain_missing(context: AuditContext) -> None:
    """Gives the reason for each metric that such a model does not have."""
    for row in context.rows.values():
        for metric in METRICS:
            reason = _REASONS.get(metric.key) or _GROUPS.get(metric.group)
            if reason and metric.key not in row.values:
                row.missing[metric.key] = reason


def add_impression_outputs(context: AuditContext, row: Row, held_out: Activations) -> None:
    """Adds the metrics of outputs on the original's held-out impressions to one row."""
    labels, forget = held_out.labels, context.forget_mask[held_out.labels]

    def recognised(name: str) -> Tensor:
        return predicted(held_out.logits[name].gather(1, labels[:, None])[:, 0])

    row.put("impressions_fa", percent_true(recognised(row.name), forget))
    for part, prefix in UNMASK_PREFIXES.items():
        if (row.name, part) in context.restored:
            found = recognised(context.restored[row.name, part].name)
            row.put(f"{prefix}_impressions_fa", percent_true(found, forget))
            if part == "last layer":
                row.put(f"{prefix}_impressions_ra", percent_true(found, ~forget))
    now, before = (
        predicted(held_out.logits[name][~forget][:, ~context.forget_mask])
        for name in (row.name, MASK)
    )
    kept = [(now == before)[before == value].float() for value in (True, False)]
    shares = [float(part.mean()) for part in kept if len(part)]
    row.put("agreement_top1", 100 * sum(shares) / len(shares) if shares else None)


def measure_images(context: AuditContext, data: Any, train_data: Any) -> None:
    """Adds the metrics on labelled images to every row."""
    seen, labels = _collect(context, data, "data")
    has_forgotten = labels[:, context.forget].any(1)
    context.counts["forget_images"] = int(has_forgotten.sum())
    context.counts["retain_images"] = len(labels) - int(has_forgotten.sum())
    for _, row in context.measured():
        found = _evaluation(context, seen, labels, row.name)
        row.put("fa", found.forget_rate, _NO_LABEL)
        row.put("ra", found.retain_average_precision, "no image of the other classes is in it")
        for part, prefix in UNMASK_PREFIXES.items():
            if (row.name, part) in context.restored:
                name = context.restored[row.name, part].name
                found = _evaluation(context, seen, labels, name)
                row.put(f"{prefix}_fa", found.forget_rate, _NO_LABEL)
                row.put(f"{prefix}_ra", found.retain_average_precision)
    split, learned = _Split.of(seen, labels), None
    if train_data is not None:
        learned = learn, learn_labels = _collect(context, train_data, "train_data")
        context.counts["train_images"] = len(learn_labels)
        split = _Split(learn, learn_labels[learn.feature_index], None, seen, split.all_labels, None)
    _add_probe(context, split)
    _add_adapted_unmask(context, split)
    _add_cka(context, seen, labels)
    relearn_task(context, _make_task(context, seen, labels, learned))


def _collect(context: AuditContext, data: Any, argument: str) -> tuple[Activations, Tensor]:
    """The activations of all models, restored ones too, and the labels, bool [N, C]."""
    hot: list[Tensor] = []

    source = matched_data(context, data, argument)

    def batches() -> Any:
        for images, labels in normalised_batches(source, context.classes, multi_label=True):
            hot.append(labels)
            yield images, labels[:, context.forget].any(1).long()

    models = [*context.models, *context.restored.values()]
    shots = context.settings["shots"] * (len(context.forget) + 1) + _RELEARN_TEST
    most = _MAX_STORED_VALUES // max(1, math.prod(context.spec.shape)) // 2
    images = dict.fromkeys((0, 1), min(shots, most))  # without and with a forgotten class
    seen = collect_activations(batches(), models, [], context.forget, _MAX_FEATURES, images)
    note_assumptions(context, source, source.unconfirmed_order())
    return seen, torch.cat(hot)


def _make_task(
    context: AuditContext,
    seen: Activations,
    labels: Tensor,
    learned: tuple[Activations, Tensor] | None,
) -> RelearnTask | str:
    """What is relearned, from other images than it is measured on; or why nothing is."""
    steps, before = context.settings["relearn_steps"], context.rows[ORIGINAL].get("fa")
    if steps == 0:
        return "relearn_steps=0 leaves it out"
    if not before:
        return "the original's FA is 0, so there is nothing to relearn"
    images, hot = seen.images, labels[seen.image_index]
    with_forgotten = hot[:, context.forget].any(1)
    tested = with_forgotten.clone()
    if learned is None:  # every second image of each kind
        tested &= with_forgotten.cumsum(0) % 2 == 0
        shots, shot_labels = images[~tested], hot[~tested]
    else:
        shots, shot_labels = learned[0].images, learned[1][learned[0].image_index]
    if not bool(tested.any()) or not bool(shot_labels[:, context.forget].any(0).all()):
        return "too few images: it needs shots of each forgotten class and others to test on"
    context.settings["shots_used"] = int(shot_labels[:, context.forget].sum(0).min())
    return RelearnTask(
        images=shots, labels=shot_labels, test_images=images[tested], test_labels=hot[tested],
        forget=context.forget, goal=GOAL * before,
        max_steps=DEFAULT_STEPS if steps is None else steps, seed=context.seed,
    )  # fmt: skip


def _evaluation(
    context: AuditContext, seen: Activations, labels: Tensor, name: str
) -> MultiLabelEvaluation:
    return MultiLabelEvaluation.from_logits(seen.logits[name], labels, context.forget)


class _Split:
    """Images to learn from and images to measure on.

    Args:
        train, train_labels, train_rows: activations; bool [M, C], labels of their stored features;
            bool [M], those of them to learn from, or None for all.
        test, all_labels, test_rows: the same of the images to measure on.
    """

    def __init__(
        self, train: Activations, train_labels: Tensor, train_rows: Tensor | None,
        test: Activations, all_labels: Tensor, test_rows: Tensor | None,
    ) -> None:  # fmt: skip
        self.train, self.test = train, test
        every = [torch.ones(len(x), dtype=torch.bool) for x in (train_labels, all_labels)]
        self.train_rows = every[0] if train_rows is None else train_rows
        self.test_rows = every[1] if test_rows is None else test_rows
        self.train_labels, self.all_labels = train_labels[self.train_rows], all_labels
        self.test_labels = all_labels[self.test_rows]

    @classmethod
    def of(cls, seen: Activations, labels: Tensor) -> _Split:
        """Every second image to learn from, the others to measure on."""
        stored = labels[seen.feature_index]
        half = torch.arange(len(stored)) % 2 == 0
        return cls(seen, stored, half, seen, stored, ~half)

    def features(self, name: str) -> tuple[Tensor, Tensor]:
        """The input of the model's last layer: of the images to learn from, and of the others."""
        train, test = self.train.penultimate(name), self.test.penultimate(name)
        return train[self.train_rows], test[self.test_rows]


def _add_probe(context: AuditContext, split: _Split) -> None:
    """Adds the average precision of a logistic regression per class to every row."""
    context.counts["probe_test_images"] = len(split.test_labels)
    absent = [c for c in context.forget if not bool(split.train_labels[:, c].any())]
    memo: dict[int, MultiLabelEvaluation] = {}
    for _, row in context.measured():
        if absent:
            reason = f"there is no image of class {absent[0]} to learn from; pass more images"
            row.put("probe_forget", None, reason)
            row.put("probe_retain", None, reason)
            continue
        key = id(split.train.features[row.name])  # models of one backbone share their features
        if key not in memo:
            train, test = split.features(row.name)
            logits = multi_label_probe(train, split.train_labels, test)
            found = MultiLabelEvaluation.from_logits(logits, split.test_labels, context.forget)
            memo[key] = found
        row.put("probe_forget", memo[key].forget_average_precision, _NO_LABEL)
        row.put("probe_retain", memo[key].retain_average_precision)


def _add_adapted_unmask(context: AuditContext, split: _Split) -> None:
    """Adds FA and RA with the original's last layer re-fitted on each model's features."""
    keys = ("adapted_unmask_fa", "adapted_unmask_ra")
    reason, weight = "", torch.empty(0, 0)
    try:
        weight, bias = context.original.weights_and_biases(context.classes)
    except ZsuFastError as error:
        reason = str(error)
    for _, row in context.measured():
        if not reason:
            width = weight.shape[1]
            old = mean_over_positions(split.features(ORIGINAL)[0], width)[:_MAX_ADAPTED]
            new, rest = (mean_over_positions(x, width) for x in split.features(row.name))
        if reason or not old.shape[1] == new.shape[1] == width:
            says = reason or "its last layer's input differs in width from the original's weights"
            for key in keys:
                row.put(key, None, says)
            continue
        logits = adapted_logits(new[:_MAX_ADAPTED], old @ weight.T + bias, rest, weight)
        found = MultiLabelEvaluation.from_logits(logits, split.test_labels, context.forget)
        row.put(keys[0], found.forget_rate, _NO_LABEL)
        row.put(keys[1], found.retain_average_precision)


def _add_cka(context: AuditContext, seen: Activations, labels: Tensor) -> None:
    """Adds the CKA with the original's and the golden model's features to every row."""
    forget = labels[seen.feature_index][:, context.forget].any(1)
    for other in (ORIGINAL, GOLDEN):
        if other not in seen.features:
            continue
        theirs = seen.penultimate(other)
        for _, row in context.measured():
            own = seen.penultimate(row.name)
            for part, chosen in (("forget", forget), ("retain", ~forget)):
                reason = "it needs at least 3 images whose features differ"
                row.put(f"cka_{other}_{part}", linear_cka(own[chosen], theirs[chosen]), reason)
