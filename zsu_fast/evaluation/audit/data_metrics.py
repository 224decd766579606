"""Metrics on labelled images: accuracies, features, membership, divergences."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..accuracy import Evaluation, count_correct
from . import divergences, membership, probe, similarity
from .activations import ActivationCollector, Activations, normalised_batches
from .context import AuditContext, TrainTestSplit, confusion, percent_true
from .names import GOLDEN, MASK, ORIGINAL, UNMASK_PREFIXES
from .relearning import MAX_CLASSES
from .result import Row

# Features are stored for at most this many images, divided among the classes.
_MAX_FEATURES = 20_000
# Relearning is measured on at most this many images, divided among the forgotten classes.
_MAX_RELEARN_TEST = 600
# Most numbers in the images that are stored for relearning: 1,783 images of 3x224x224.
_MAX_STORED_VALUES = 1 << 28


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
    batches = normalised_batches(data, context.spec, context.classes, "data")
    test = ActivationCollector(context.models, restored, per_class, images).collect(batches)
    context.counts["forget_images"] = int(context.forget_mask[test.labels].sum())
    context.counts["retain_images"] = len(test.labels) - context.counts["forget_images"]
    if train_data is None:
        half, other = probe.split_in_half(test.labels[test.feature_index])
        return test, TrainTestSplit(test, half, test, other)
    per_class = max(2, _MAX_FEATURES // 2 // context.classes)
    images = dict.fromkeys(stored, shots)
    batches = normalised_batches(train_data, context.spec, context.classes, "train_data")
    train = ActivationCollector(context.models, [], per_class, images).collect(batches)
    context.counts["train_images"] = len(train.labels)
    context.counts["probe_train_images"] = len(train.feature_index)
    rows = [torch.ones(len(a.feature_index), dtype=torch.bool) for a in (train, test)]
    return test, TrainTestSplit(train, rows[0], test, rows[1])


def add_accuracies(context: AuditContext, images: Activations) -> None:
    """Adds accuracies, un-mask accuracies and confusion to every row."""
    labels, forget = images.labels, context.forget_mask[images.labels]
    no_forgotten = "no image of the forgotten classes is in the data"
    no_retained = "no image of the other classes is in the data"
    for audited in context.models:
        row, predictions = context.rows[audited.name], images.predictions[audited.name]
        counts = count_correct(predictions, labels, context.classes)
        row.evaluation = Evaluation.from_counts(*counts, context.forget)
        row.put("fa", row.evaluation.forget_accuracy, no_forgotten)
        row.put("ra", row.evaluation.retain_accuracy, no_retained)
        row.put("overall", row.evaluation.overall_accuracy)
        leak = percent_true(context.forget_mask[predictions], forget)
        row.put("leak", leak, no_forgotten)
        row.confusion = confusion(predictions, labels, context.forget)
        for part, prefix in UNMASK_PREFIXES.items():
            restored = context.restored.get((audited.name, part))
            if restored is not None:
                correct = images.predictions[restored.name] == labels
                row.put(f"{prefix}_fa", percent_true(correct, forget), no_forgotten)
                row.put(f"{prefix}_ra", percent_true(correct, ~forget), no_retained)


def add_divergences(context: AuditContext, images: Activations) -> None:
    """Adds the divergences of the outputs from the mask's and the golden model's to every row."""
    forget = context.forget_mask[images.labels]
    for other in (MASK, GOLDEN):
        if other not in images.logits:
            continue
        for part, rows in (("forget", forget), ("retain", ~forget)):
            if not bool(rows.any()):
                continue
            for audited in context.models:
                row = context.rows[audited.name]
                pair = images.logits[other][rows], images.logits[audited.name][rows]
                row.put(f"kl_{other}_{part}", divergences.kl(*pair))
                row.put(f"js_{other}_{part}", divergences.js(*pair))
                row.put(f"activation_{other}_{part}", divergences.activation(*pair))


class _Separability:
    """Probe and k-NN accuracies of one split, computed once for models of equal features."""

    def __init__(self, context: AuditContext, split: TrainTestSplit) -> None:
        self.split, self.classes = split, context.classes
        self.train_labels = split.train.labels[split.train.feature_index][split.train_rows]
        self.test_labels = split.test.labels[split.test.feature_index][split.test_rows]
        self.forget = context.forget_mask[self.test_labels]
        self.memo: dict[tuple[str, int], tuple[float | None, float | None]] = {}

    def probe(self, name: str, layer: str) -> tuple[float | None, float | None]:
        """(forget, retain) accuracy of a linear probe on the layer's input."""
        return self._measure("probe", name, layer)

    def knn(self, name: str) -> tuple[float | None, float | None]:
        """(forget, retain) accuracy of k-NN on the last layer's input."""
        return self._measure("knn", name, self.split.train.last_layer[name])

    def _measure(self, kind: str, name: str, layer: str) -> tuple[float | None, float | None]:
        train = self.split.train.features[name][layer]
        key = kind, id(train)  # models of one backbone share their features
        if key not in self.memo:
            test = self.split.test.features[name][layer][self.split.test_rows]
            train = train[self.split.train_rows]
            predict = probe.probe_predictions if kind == "probe" else similarity.knn_predictions
            correct = predict(train, self.train_labels, test, self.classes) == self.test_labels
            self.memo[key] = (
                percent_true(correct, self.forget),
                percent_true(correct, ~self.forget),
            )
        return self.memo[key]


def add_separability(context: AuditContext, split: TrainTestSplit) -> None:
    """Adds linear probe and k-NN to every row."""
    measured = _Separability(context, split)
    context.counts["probe_test_images"] = len(measured.test_labels)
    counts = torch.bincount(measured.train_labels, minlength=context.classes)
    missing = [c for c in context.forget if not counts[c]]
    reason = ""
    if not bool(measured.forget.any()):
        reason = "no image of the forgotten classes is left to measure on"
    elif missing:
        reason = f"there is no image of class {missing[0]} to learn from; pass more, or train_data"
    no_retained = "no image of the other classes is in the data"
    for audited in context.models:
        row = context.rows[audited.name]
        if reason:
            for key in ("probe_forget", "probe_retain", "knn_forget", "knn_retain"):
                row.put(key, None, reason)
            continue
        for entry in row.layers:
            if entry.layer in split.train.features[audited.name]:
                accuracies = measured.probe(audited.name, entry.layer)
                entry.probe_forget, entry.probe_retain = accuracies
        for kind, (forget, retain) in (
            ("probe", measured.probe(audited.name, audited.layers[-1])),
            ("knn", measured.knn(audited.name)),
        ):
            row.put(f"{kind}_forget", forget)
            row.put(f"{kind}_retain", retain, no_retained)


def add_cka(context: AuditContext, split: TrainTestSplit) -> None:
    """Adds the CKA with the original's and the golden model's features to every row."""
    test, rows = split.test, split.test_rows
    forget = context.forget_mask[test.labels[test.feature_index][rows]]
    for other in (ORIGINAL, GOLDEN):
        if other not in test.features:
            continue
        theirs = test.penultimate(other)[rows]
        for audited in context.models:
            own, row = test.penultimate(audited.name)[rows], context.rows[audited.name]
            for part, chosen in (("forget", forget), ("retain", ~forget)):
                row.put(
                    f"cka_{other}_{part}",
                    similarity.linear_cka(own[chosen], theirs[chosen]),
                    "it needs at least 3 images whose features differ",
                )


def add_membership(context: AuditContext, train: Activations, test: Activations) -> None:
    """Adds the membership attacks to every row."""
    for audited in context.models:
        row = context.rows[audited.name]
        for part, in_part in (("forget", True), ("retain", False)):
            members = context.forget_mask[train.labels] == in_part
            others = context.forget_mask[test.labels] == in_part
            if bool(members.any()) and bool(others.any()):
                _add_attack(row, part, (train, members), (test, others))
            else:
                for score in membership.SCORES:
                    reason = f"no images of {part} classes in both sets"
                    row.put(f"mia_{part}_{score}", None, reason)


def _add_attack(
    row: Row, part: str, members: tuple[Activations, Tensor], others: tuple[Activations, Tensor]
) -> None:
    (train, inside), (test, outside) = members, others
    areas = membership.attack(
        train.logits[row.name][inside],
        train.labels[inside],
        test.logits[row.name][outside],
        test.labels[outside],
    )
    for score, area in areas.items():
        row.put(f"mia_{part}_{score}", area)
