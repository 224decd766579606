"""What labelled images tell: accuracies, features, membership, divergences."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import divergences, membership, probe, similarity
from .context import AuditContext, Labelled, confusion, evaluation_of, share
from .activations import ActivationCollector, Activations, batches_of
from .relearning import RELEARNED
from .result import GOLDEN, MASK, ORIGINAL

# Features are kept of so many images at most, divided among the classes.
_FEATURES = 20_000
# Images on which relearning is measured at most, divided among the forgotten classes.
_RELEARN_TEST = 600
# Values of the images that are kept for relearning: 1,783 of 3x224x224.
_KEPT_VALUES = 1 << 28


def look(context: AuditContext, data: Any, train_data: Any) -> tuple[Activations, Labelled]:
    """Runs all models on the images, and says which are for learning and which for measuring."""
    relearned = context.some(context.forget, RELEARNED)
    taught = [*relearned, *context.some(context.kept, RELEARNED)]
    per_test = max(10, _RELEARN_TEST // len(relearned))
    most = _KEPT_VALUES // max(1, math.prod(context.spec.shape)) // len(taught)
    shots = max(1, min(context.settings["shots"], most - per_test))
    variants = list(context.variants.values())
    each = max(2, _FEATURES // context.classes)
    images = {c: (per_test if context.gone[c] else 0) for c in taught}
    if train_data is None:
        images = {c: shots + (per_test if context.gone[c] else 0) for c in taught}
    batches = batches_of(data, context.spec, context.classes, "data")
    seen = ActivationCollector(context.subjects, variants, each, images).look(batches)
    context.counts["forget_images"] = int(context.gone[seen.labels].sum())
    context.counts["retain_images"] = len(seen.labels) - context.counts["forget_images"]
    everything = torch.ones(len(seen.kept), dtype=torch.bool)
    if train_data is None:
        half, other = probe.halves(seen.labels[seen.kept])
        return seen, Labelled(seen, half, seen, other)
    batches = batches_of(train_data, context.spec, context.classes, "train_data")
    per_class = max(2, _FEATURES // 2 // context.classes)
    train = ActivationCollector(context.subjects, [], per_class, dict.fromkeys(taught, shots)).look(
        batches
    )
    context.counts["train_images"] = len(train.labels)
    context.counts["probe_train_images"] = len(train.kept)
    rows = torch.ones(len(train.kept), dtype=torch.bool)
    return seen, Labelled(train, rows, seen, everything)


def on_images(context: AuditContext, seen: Activations) -> None:
    """Puts accuracies, un-mask accuracies, confusion and output distances on every row."""
    gone = context.gone[seen.labels]
    none = "no image of the forgotten classes is in the data"
    for subject in context.subjects:
        row, answers = context.rows[subject.name], seen.answers[subject.name]
        right = answers == seen.labels
        row.evaluation = evaluation_of(right, seen.labels, context.forget, context.classes)
        row.put("fa", row.evaluation.forget_accuracy, none)
        row.put("ra", row.evaluation.retain_accuracy, none.replace("forgotten", "other"))
        row.put("overall", row.evaluation.overall_accuracy)
        row.put("leak", share(context.gone[answers], gone), none)
        row.confusion = confusion(answers, seen.labels, context.forget)
        if (subject.name, "rows") in context.variants:
            back = seen.answers[context.variants[subject.name, "rows"].name] == seen.labels
            row.put("unmask_fa", share(back, gone), none)
            row.put("unmask_ra", share(back, ~gone), none)
        if (subject.name, "whole") in context.variants:
            back = seen.answers[context.variants[subject.name, "whole"].name] == seen.labels
            row.put("whole_head_fa", share(back, gone), none)
            row.put("whole_head_ra", share(back, ~gone), none)
        for other in (MASK, GOLDEN):
            for part, rows in (("forget", gone), ("retain", ~gone)):
                if other not in seen.logits or not bool(rows.any()):
                    continue
                pair = seen.logits[other][rows], seen.logits[subject.name][rows]
                row.put(f"kl_{other}_{part}", divergences.kl(*pair))
                row.put(f"js_{other}_{part}", divergences.js(*pair))
                row.put(f"activation_{other}_{part}", divergences.activation(*pair))


def separability(context: AuditContext, at: Labelled) -> None:
    """Puts linear probe, k-NN and CKA on every row."""
    train_labels = at.train.labels[at.train.kept][at.train_rows]
    test_labels = at.test.labels[at.test.kept][at.test_rows]
    gone = context.gone[test_labels]
    counts = torch.bincount(train_labels, minlength=context.classes)
    empty = [c for c in range(context.classes) if not counts[c]]
    why = ""
    if not bool(gone.any()):
        why = "no image of the forgotten classes is left to measure on"
    elif set(empty) & set(context.forget):
        why = f"no image of class {empty[0]} is there to learn from; give more, or train_data"
    context.counts["probe_test_images"] = len(test_labels)
    memo: dict[int, tuple[float | None, float | None]] = {}

    def fitted(name: str, layer: str) -> tuple[float | None, float | None]:
        x = at.train.features[name][layer]
        if id(x) not in memo:  # subjects of one backbone share their features
            answers = probe.probe_answers(
                x[at.train_rows],
                train_labels,
                at.test.features[name][layer][at.test_rows],
                context.classes,
            )
            right = answers == test_labels
            memo[id(x)] = share(right, gone), share(right, ~gone)
        return memo[id(x)]

    neighbours: dict[int, Tensor] = {}
    for subject in context.subjects:
        row, name = context.rows[subject.name], subject.name
        if why:
            for key in ("probe_forget", "probe_retain", "knn_forget", "knn_retain"):
                row.put(key, None, why)
        else:
            for entry in row.layers:
                if entry.layer in at.train.features[name]:
                    entry.probe_forget, entry.probe_retain = fitted(name, entry.layer)
            forget, retain = fitted(name, subject.layers[-1])
            row.put("probe_forget", forget)
            row.put("probe_retain", retain, "no image of the other classes is in the data")
            x = at.train.penultimate(name)
            if id(x) not in neighbours:
                neighbours[id(x)] = similarity.knn_answers(
                    x[at.train_rows],
                    train_labels,
                    at.test.penultimate(name)[at.test_rows],
                    context.classes,
                )
            right = neighbours[id(x)] == test_labels
            row.put("knn_forget", share(right, gone))
            row.put("knn_retain", share(right, ~gone))
        mine = at.test.penultimate(name)[at.test_rows]
        for other in (ORIGINAL, GOLDEN):
            if other not in at.test.features:
                continue
            theirs = at.test.penultimate(other)[at.test_rows]
            for part, rows in (("forget", gone), ("retain", ~gone)):
                row.put(
                    f"cka_{other}_{part}",
                    similarity.linear_cka(mine[rows], theirs[rows]),
                    "it takes at least 3 images whose features differ",
                )


def membership_of(context: AuditContext, train: Activations, test: Activations) -> None:
    """Puts the membership attacks on every row."""
    for subject in context.subjects:
        row, name = context.rows[subject.name], subject.name
        for part, wanted in (("forget", True), ("retain", False)):
            inside = context.gone[train.labels] == wanted
            outside = context.gone[test.labels] == wanted
            if not bool(inside.any()) or not bool(outside.any()):
                for score in membership.SCORES:
                    row.put(f"mia_{part}_{score}", None, f"no images of {part} classes in both")
                continue
            areas = membership.attack(
                train.logits[name][inside], train.labels[inside],
                test.logits[name][outside], test.labels[outside],
            )  # fmt: skip
            for score, area in areas.items():
                row.put(f"mia_{part}_{score}", area)
