"""Metrics on labelled images: accuracies, features, membership, divergences."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch

from ...errors import UnlearningWarning, ZsuFastError
from ..accuracy import Evaluation, count_correct
from ..class_order import check_order
from ..labelled_data import LabelledData
from . import outputs
from .activations import Activations, collect_activations, normalised_batches
from .context import AuditContext, TrainTestSplit, confusion, percent_true
from .features import (
    adapted_predictions,
    knn_predictions,
    linear_cka,
    mean_over_positions,
    probe_predictions,
    split_in_half,
)
from .relearning import MAX_CLASSES
from .result import GOLDEN, MASK, ORIGINAL, UNMASK_PREFIXES

# Features are stored for at most this many images, divided among the classes.
_MAX_FEATURES = 20_000
# The adapted last layer is fitted on at most this many images, divided among the classes.
_MAX_ADAPTED = 500
# Relearning is measured on at most this many images, divided among the forgotten classes.
_MAX_RELEARN_TEST = 600
# Most numbers in the images that are stored for relearning: 1,783 images of 3x224x224.
_MAX_STORED_VALUES = 1 << 28
_NO_RETAINED = "no image of the other classes is in the data"
_NONE_LEFT = "no image of the forgotten classes is left to measure on"


def collect_images(
    context: AuditContext, data: Any, train_data: Any
) -> tuple[Activations, TrainTestSplit]:
    """Runs all models on the images, and divides them into a training and a test part."""
    forgotten = context.subset(context.forget, MAX_CLASSES)
    stored = [*forgotten, *context.subset(context.retained, MAX_CLASSES)]
    per_test = max(10, _MAX_RELEARN_TEST // len(forgotten))
    limit = _MAX_STORED_VALUES // max(1, math.prod(context.spec.shape)) // len(stored)
    shots = max(1, min(context.settings["shots"], limit - per_test))
    tested = {c: (per_test if context.forget_mask[c] else 0) for c in stored}
    restored = list(context.restored.values())
    per_class = max(2, _MAX_FEATURES // context.classes)
    images = tested if train_data is not None else {c: shots + n for c, n in tested.items()}
    source = matched_data(context, data, "data")
    batches = normalised_batches(source, context.classes)
    test = collect_activations(batches, context.models, restored, context.forget, per_class, images)
    _check_classes(context, source, test)
    context.counts["forget_images"] = int(context.forget_mask[test.labels].sum())
    context.counts["retain_images"] = len(test.labels) - context.counts["forget_images"]
    if train_data is None:
        half, other = split_in_half(test.labels[test.feature_index])
        return test, TrainTestSplit(test, half, test, other)
    per_class = max(2, _MAX_FEATURES // 2 // context.classes)
    source = matched_data(context, train_data, "train_data")
    batches = normalised_batches(source, context.classes)
    images = dict.fromkeys(stored, shots)
    train = collect_activations(batches, context.models, [], context.forget, per_class, images)
    _check_classes(context, source, train)
    context.counts["train_images"] = len(train.labels)
    context.counts["probe_train_images"] = len(train.feature_index)
    rows = [torch.ones(len(a.feature_index), dtype=torch.bool) for a in (train, test)]
    return test, TrainTestSplit(train, rows[0], test, rows[1])


def matched_data(context: AuditContext, data: Any, argument: str) -> LabelledData:
    """The labelled images, matched with the original's classes."""
    source = LabelledData(data, argument, context.spec, context.labels, exact_size=True)
    source.match(context.original.model, context.classes)
    if source.found is not None:
        context.settings[f"{argument}_classes"] = source.found.classes
    return source


def _check_classes(context: AuditContext, source: LabelledData, seen: Activations) -> None:
    """Notes what was assumed of images and labels, and warns where that is doubtful."""
    pair = seen.predictions[ORIGINAL], seen.labels
    # the original has forgotten nothing, so that all its predictions count
    found = check_order(*pair, context.classes, [], source.found)
    note_assumptions(context, source, [f"{source.argument}: {found}"] if found else [])


def note_assumptions(context: AuditContext, source: LabelledData, more: list[str]) -> None:
    """Notes what was assumed of the data, and warns where that is doubtful, as ``more`` is."""
    facts, doubts = source.format.assumptions()
    doubts += more
    context.notes += facts + doubts
    for doubt in doubts:
        warnings.warn(doubt, UnlearningWarning, stacklevel=2)


def add_accuracies(context: AuditContext, images: Activations) -> None:
    """Adds accuracies, un-mask accuracies and confusion to every row."""
    labels, forget = images.labels, context.forget_mask[images.labels]
    no_forgotten = "no image of the forgotten classes is in the data"
    several = len(context.forget) > 1
    undefined = no_forgotten if several else "it needs at least two forgotten classes"
    for _, row in context.measured():
        predictions = images.predictions[row.name]
        counts = count_correct(predictions, labels, context.classes)
        row.evaluation = Evaluation.from_counts(*counts, context.forget)
        row.put("fa", row.evaluation.forget_accuracy, no_forgotten)
        row.put("ra", row.evaluation.retain_accuracy, _NO_RETAINED)
        row.put("overall", row.evaluation.overall_accuracy)
        leak = percent_true(context.forget_mask[predictions], forget)
        row.put("leak", leak, no_forgotten)
        row.confusion = confusion(predictions, labels, context.forget)
        for part, prefix in UNMASK_PREFIXES.items():
            if (row.name, part) in context.restored:
                correct = images.predictions[context.restored[row.name, part].name] == labels
                row.put(f"{prefix}_fa", percent_true(correct, forget), no_forgotten)
                row.put(f"{prefix}_ra", percent_true(correct, ~forget), _NO_RETAINED)
        if (row.name, "rows") in context.restored:
            correct = images.among_forgotten[context.restored[row.name, "rows"].name] == labels
            row.put("unmask_ff", percent_true(correct, forget) if several else None, undefined)


def add_divergences(context: AuditContext, images: Activations) -> None:
    """Adds the divergences of the outputs from the mask's and the golden model's to every row."""
    forget = context.forget_mask[images.labels]
    for other in (MASK, GOLDEN):
        for part, rows in (("forget", forget), ("retain", ~forget)):
            if other not in images.logits or not bool(rows.any()):
                continue
            for _, row in context.measured():
                pair = images.logits[other][rows], images.logits[row.name][rows]
                row.put(f"kl_{other}_{part}", outputs.kl(*pair))
                row.put(f"js_{other}_{part}", outputs.js(*pair))
                row.put(f"activation_{other}_{part}", outputs.activation_distance(*pair))


def add_separability(context: AuditContext, split: TrainTestSplit) -> None:
    """Adds linear probe and k-NN to every row."""
    train, test = split.train, split.test
    train_labels = train.labels[train.feature_index][split.train_rows]
    test_labels = test.labels[test.feature_index][split.test_rows]
    forget = context.forget_mask[test_labels]
    context.counts["probe_test_images"] = len(test_labels)
    missing = sorted({*context.forget} - {*train_labels.tolist()})
    reason = ""
    if not bool(forget.any()):
        reason = _NONE_LEFT
    elif missing:
        reason = f"there is no image of class {missing[0]} to learn from; pass more, or train_data"
    if reason:
        for _, row in context.measured():
            for key in ("probe_forget", "probe_retain", "knn_forget", "knn_retain"):
                row.put(key, None, reason)
        return
    memo: dict[tuple[str, int], tuple[float | None, float | None]] = {}

    def accuracies(kind: str, name: str, layer: str) -> tuple[float | None, float | None]:
        """(forget, retain) accuracy of the probe or of k-NN on the layer's input."""
        features = train.features[name][layer]
        key = kind, id(features)  # models of one backbone share their features
        if key not in memo:
            predict = probe_predictions if kind == "probe" else knn_predictions
            rows = features[split.train_rows], test.features[name][layer][split.test_rows]
            correct = predict(rows[0], train_labels, rows[1], context.classes) == test_labels
            memo[key] = percent_true(correct, forget), percent_true(correct, ~forget)
        return memo[key]

    for audited, row in context.measured():
        for entry in row.layers:
            if entry.layer in train.features[row.name]:
                found = accuracies("probe", row.name, entry.layer)
                entry.probe_forget, entry.probe_retain = found
        for kind in ("probe", "knn"):
            on_forgotten, on_retained = accuracies(kind, row.name, audited.layers[-1])
            row.put(f"{kind}_forget", on_forgotten)
            row.put(f"{kind}_retain", on_retained, _NO_RETAINED)


def add_adapted_unmask(context: AuditContext, split: TrainTestSplit) -> None:
    """Adds FA and RA with the original's last layer re-fitted on each model's features.

    It is fitted on at most 500 images of the training part, spread over the classes. With one set
    of images, all others are measured on. Feature maps are averaged over positions.
    """
    train, test = split.train, split.test
    fitted = split.train_rows.nonzero()[:, 0]
    fitted = fitted[train.labels[train.feature_index][fitted].argsort(stable=True)]
    if len(fitted) > _MAX_ADAPTED:
        fitted = fitted[torch.linspace(0, len(fitted) - 1, _MAX_ADAPTED).long()]
    measured = torch.ones(len(test.feature_index), dtype=torch.bool)
    if train is test:
        measured[fitted] = False
    labels = test.labels[test.feature_index][measured]
    forget = context.forget_mask[labels]
    try:
        weight, bias = context.original.weights_and_biases(context.classes)
    except ZsuFastError as error:
        for _, row in context.measured():
            row.put("adapted_unmask_fa", None, str(error))
            row.put("adapted_unmask_ra", None, str(error))
        return
    for _, row in context.measured():
        old, new, rest = (
            mean_over_positions(part.penultimate(name)[rows], weight.shape[1])
            for part, name, rows in (
                (train, ORIGINAL, fitted), (train, row.name, fitted), (test, row.name, measured)
            )
        )  # fmt: skip
        if not old.shape[1] == new.shape[1] == weight.shape[1]:
            reason = "its last layer's input differs in width from the original's weights"
            row.put("adapted_unmask_fa", None, reason)
            row.put("adapted_unmask_ra", None, reason)
            continue
        correct = adapted_predictions(new, old @ weight.T + bias, rest, weight) == labels
        row.put("adapted_unmask_fa", percent_true(correct, forget), _NONE_LEFT)
        row.put("adapted_unmask_ra", percent_true(correct, ~forget), _NO_RETAINED)


def add_cka(context: AuditContext, split: TrainTestSplit) -> None:
    """Adds the CKA with the original's and the golden model's features to every row."""
    test, rows = split.test, split.test_rows
    forget = context.forget_mask[test.labels[test.feature_index][rows]]
    reason = "it needs at least 3 images whose features differ"
    for other in (ORIGINAL, GOLDEN):
        if other not in test.features:
            continue
        theirs = test.penultimate(other)[rows]
        for _, row in context.measured():
            own = test.penultimate(row.name)[rows]
            for part, chosen in (("forget", forget), ("retain", ~forget)):
                row.put(f"cka_{other}_{part}", linear_cka(own[chosen], theirs[chosen]), reason)


def add_membership(context: AuditContext, train: Activations, test: Activations) -> None:
    """Adds the membership attacks to every row."""
    for _, row in context.measured():
        for part, in_part in (("forget", True), ("retain", False)):
            sides = []
            for seen in (train, test):
                rows = context.forget_mask[seen.labels] == in_part
                sides += [seen.logits[row.name][rows], seen.labels[rows]]
            areas: dict[str, float] = {}
            if all(len(side) for side in sides):
                areas = outputs.membership_attack(*sides)
            for score in outputs.MEMBERSHIP_SCORES:
                reason = f"no images of {part} classes in both sets"
                row.put(f"mia_{part}_{score}", areas.get(score), reason)
