"""Metrics that need no images: from impressions, from weights, and from gradient ascent."""

from __future__ import annotations

from typing import Any

import torch

from ...errors import ArgumentError, ZsuFastError
from ...runtime.progress import Reporter
from ...synthesis.ascent_settings import AscentSettings
from ...synthesis.impressions import ClassImpressions
from ...synthesis.space import input_space
from ...synthesis.synthesize import ascend
from . import outputs
from .activations import Activations, sample_layers
from .audited_model import AuditedModel
from .context import AuditContext, confusion, percent_true
from .features import feature_drift, linear_cka, mean_over_positions
from .multi_label import NOT_A_SOFTMAX, add_impression_outputs
from .result import MASK, ORIGINAL, UNLEARNED, UNMASK_PREFIXES, Layer, Row
from .weights import (
    LastLayer,
    backbone_drift,
    compare_last_layers,
    erasure_cost,
    layer_drift,
    relative_change,
)

# Keeps the noise of the audit's impressions apart from that of runs, whose seeds are small.
_HELD_OUT_SEED = 1_000_003
# With more classes than this, impressions are drawn for a subset: this many forgotten and retained
# classes, and at most this many impressions of each.
_MANY_CLASSES, _FORGOTTEN, _RETAINED, _PER_CLASS = 50, 16, 32, 4
# Steps per attempt of re-synthesis; the original needs 1 to 40.
_MAX_STEPS = 100
# Forgotten classes and impressions of each, with few classes and with many.
_RESYNTHESIS, _RESYNTHESIS_MANY = (16, 8), (8, 2)


def held_out_impressions(
    context: AuditContext, impressions: ClassImpressions | None
) -> ClassImpressions:
    """Checks the given impressions of the original, or synthesises some."""
    if impressions is not None:
        if (
            impressions.space == "input"
            and impressions.spec.shape == context.spec.shape
            and bool(context.forget_mask[impressions.labels].any())
        ):
            return impressions
        raise ArgumentError(
            "impressions",
            f"got {len(impressions)} of shape {impressions.spec.shape} in the space "
            f"{impressions.space!r}",
            f"Pass images of shape {context.spec.shape}, with forgotten classes among them.",
        )
    per_class, classes = context.settings["impressions_per_class"], list(range(context.classes))
    if context.classes > _MANY_CLASSES:
        per_class = min(per_class, _PER_CLASS)
        forgotten = context.subset(context.forget, _FORGOTTEN)
        classes = sorted([*forgotten, *context.subset(context.retained, _RETAINED)])
        context.notes.append(
            f"impressions of {len(classes)} of {context.classes} classes, {per_class} per class"
        )
    seed = _HELD_OUT_SEED + context.seed
    multi_label = context.multi_label
    found = _ascend(
        context.original, classes, per_class=per_class, seed=seed, multi_label=multi_label
    )
    context.counts["impressions"] = len(found)
    if found.hit_rate < 0.5:
        share = f"only {100 * found.hit_rate:.0f} % of the original's impressions"
        context.notes.append(
            f"{share} reached their target confidence, so the metrics on them say little"
        )
    return found


def _ascend(audited: AuditedModel, classes: list[int], **settings: Any) -> ClassImpressions:
    options = AscentSettings(**settings)
    space = input_space(audited.model, audited.spec, options.precision)
    return ascend(audited.model, space, classes, options, Reporter(False))


def add_impression_metrics(context: AuditContext, held_out: Activations) -> None:
    """Adds metrics on the original's held-out impressions and on weights to every row."""
    forget = context.forget_mask[held_out.labels]
    for audited, row in context.measured():
        if context.multi_label:
            add_impression_outputs(context, row, held_out)
        else:
            _add_outputs(context, row, held_out)
        new, old = held_out.penultimate(row.name), held_out.penultimate(ORIGINAL)
        reason = "its last layer's input differs in shape from the original's"
        row.put("drift_features_forget", feature_drift(new[forget], old[forget]), reason)
        row.put("drift_features_retain", feature_drift(new[~forget], old[~forget]), reason)
        row.put("cka_impressions", linear_cka(new[forget], old[forget]))
        _add_weight_drift(context, audited, row)
        _add_layers(context, audited, row, held_out)


def _add_outputs(context: AuditContext, row: Row, held_out: Activations) -> None:
    labels, predictions = held_out.labels, held_out.predictions[row.name]
    forget = context.forget_mask[labels]
    row.put("impressions_fa", percent_true(predictions == labels, forget))
    for part, prefix in UNMASK_PREFIXES.items():
        if (row.name, part) in context.restored:
            correct = held_out.predictions[context.restored[row.name, part].name] == labels
            row.put(f"{prefix}_impressions_fa", percent_true(correct, forget))
            if part == "last layer":
                row.put(f"{prefix}_impressions_ra", percent_true(correct, ~forget))
    masked = held_out.logits[MASK][~forget]
    row.put("agreement_kl", outputs.kl(masked, held_out.logits[row.name][~forget]))
    row.put("agreement_top1", percent_true(predictions == held_out.predictions[MASK], ~forget))
    row.confusion = confusion(predictions, labels, context.forget)


def _add_weight_drift(context: AuditContext, audited: AuditedModel, row: Row) -> None:
    moved = backbone_drift(audited, context.original)
    row.put("drift_backbone", moved, "its layers differ from the original's")
    try:
        new, old = (m.last_layer_rows(context.classes) for m in (audited, context.original))
    except ZsuFastError as error:
        reason = str(error)
    else:
        reason = "" if new.shape == old.shape else "its last layer has another shape"
    for part, rows in (("forget", context.forget_mask), ("retain", ~context.forget_mask)):
        if reason:
            row.put(f"drift_{part}_rows", None, reason)
        else:
            row.put(f"drift_{part}_rows", relative_change(new[rows], old[rows]))


def _add_layers(
    context: AuditContext, audited: AuditedModel, row: Row, held_out: Activations
) -> None:
    forget = context.forget_mask[held_out.labels]
    features, originals = held_out.features[row.name], held_out.features[ORIGINAL]
    for layer in sample_layers(audited.layers):
        entry = Layer(layer, layer_drift(audited, context.original, layer))
        if layer in features and layer in originals:
            new, old = features[layer], originals[layer]
            entry.features_forget = feature_drift(new[forget], old[forget])
            entry.features_retain = feature_drift(new[~forget], old[~forget])
        row.layers.append(entry)


def inspect_last_layer(context: AuditContext, held_out: Activations) -> LastLayer:
    """Compares the unlearned model's last layer with the original's."""
    features = held_out.penultimate(ORIGINAL)
    present = held_out.labels.unique()
    means = torch.stack([features[held_out.labels == c].mean(0) for c in present])
    unlearned = next(m for m in context.models if m.name == UNLEARNED)
    hidden = bool(unlearned.hidden)
    try:
        new, old = (m.last_layer_rows(context.classes) for m in (unlearned, context.original))
    except ZsuFastError:
        return compare_last_layers(None, None, context.forget, hidden, means)
    means = mean_over_positions(means, next(context.original.last_layer.parameters())[0].numel())
    return compare_last_layers(new, old, context.forget, hidden, means)


def add_erasure_cost(context: AuditContext, held_out: Activations) -> None:
    """Adds the erasure cost to the original's row."""
    for _, row in context.measured():
        row.put("erasure_cost", None, "it describes the original and the forgotten classes alone")
    row = context.rows[ORIGINAL]
    if context.multi_label:
        row.put("erasure_cost", None, NOT_A_SOFTMAX)
        return
    try:
        weight, _ = context.original.weights_and_biases(context.classes)
    except ZsuFastError as error:
        row.put("erasure_cost", None, str(error))
        return
    features = mean_over_positions(held_out.penultimate(ORIGINAL), weight.shape[1])
    known = features if features.shape[1] == weight.shape[1] else None
    row.put("erasure_cost", erasure_cost(weight, context.forget_mask, known))


def add_resynthesis(context: AuditContext) -> None:
    """Adds the results of ascent towards forgotten classes to every row, as is and un-masked."""
    limit, per_class = _RESYNTHESIS if context.classes <= _MANY_CLASSES else _RESYNTHESIS_MANY
    classes = context.subset(context.forget, limit)
    for audited, row in context.measured():
        steps, found = _resynthesise(context, audited, classes, per_class)
        row.put("resynthesis_hit", 0.0 if found is None else 100 * found.hit_rate)
        row.put("resynthesis_steps", steps)
        if found is not None:
            context.pictures[row.name] = found
        restored = context.restored.get((row.name, "rows"))
        if restored is None:
            continue
        if row.name in (ORIGINAL, MASK):  # both are the original then
            steps = context.rows[ORIGINAL].values["resynthesis_steps"]
        else:
            steps, _ = _resynthesise(context, restored, classes, per_class)
        row.put("resynthesis_unmasked_steps", steps)


def _resynthesise(
    context: AuditContext, audited: AuditedModel, classes: list[int], per_class: int
) -> tuple[float, ClassImpressions | None]:
    """Synthesises impressions of ``classes`` from this model, one attempt each.

    Noise and target confidences depend on the seed alone, so they are the same for every model.
    Returns the mean steps per attempt, `_MAX_STEPS` for a failed one, and the impressions: None if
    `zsu_fast.mask` hides the classes, so that they can't be reached.
    """
    if set(classes) <= set(audited.hidden):
        return float(_MAX_STEPS), None
    found = _ascend(
        audited, classes, per_class=per_class, max_steps=_MAX_STEPS, restarts=0,
        seed=context.seed, multi_label=context.multi_label,
    )  # fmt: skip
    steps = found.steps.float().masked_fill(~found.hit, _MAX_STEPS)
    return float(steps.mean()), found
