"""Metrics that need no images: from impressions, from weights, and from gradient ascent."""

from __future__ import annotations

import torch

from ...errors import ZsuFastError
from . import divergences, drift, similarity
from .activations import Activations, sample_layers
from .audited_model import AuditedModel
from .context import AuditContext, confusion, percent_true
from .last_layer import LastLayer, compare_last_layers
from .names import MASK, ORIGINAL, UNLEARNED
from .result import Layer, Row
from .resynthesis import resynthesise

# Forgotten classes and impressions of each, with up to 50 classes and with more.
_RESYNTHESIS, _RESYNTHESIS_MANY = (16, 8), (8, 2)


def add_impression_metrics(context: AuditContext, held_out: Activations) -> None:
    """Adds metrics on the original's held-out impressions and on weights to every row."""
    forget = context.forget_mask[held_out.labels]
    for audited in context.models:
        row, name = context.rows[audited.name], audited.name
        _add_outputs(context, row, held_out)
        new, old = held_out.penultimate(name), held_out.penultimate(ORIGINAL)
        reason = "its last layer's input differs in shape from the original's"
        row.put("drift_features_forget", drift.feature_drift(new[forget], old[forget]), reason)
        row.put("drift_features_retain", drift.feature_drift(new[~forget], old[~forget]), reason)
        row.put("cka_impressions", similarity.linear_cka(new[forget], old[forget]))
        _add_weight_drift(context, audited, row)
        _add_layers(context, audited, held_out)


def _add_outputs(context: AuditContext, row: Row, held_out: Activations) -> None:
    forget = context.forget_mask[held_out.labels]
    predictions = held_out.predictions[row.name]
    row.put("impressions_fa", percent_true(predictions == held_out.labels, forget))
    if (row.name, "rows") in context.restored:
        restored = held_out.predictions[context.restored[row.name, "rows"].name]
        row.put("unmask_impressions_fa", percent_true(restored == held_out.labels, forget))
    if (row.name, "last layer") in context.restored:
        restored = held_out.predictions[context.restored[row.name, "last layer"].name]
        correct = restored == held_out.labels
        row.put("unmask_last_layer_impressions_fa", percent_true(correct, forget))
        row.put("unmask_last_layer_impressions_ra", percent_true(correct, ~forget))
    masked = held_out.logits[MASK][~forget]
    row.put("agreement_kl", divergences.kl(masked, held_out.logits[row.name][~forget]))
    same = predictions == held_out.predictions[MASK]
    row.put("agreement_top1", percent_true(same, ~forget))
    row.confusion = confusion(predictions, held_out.labels, context.forget)


def _add_weight_drift(context: AuditContext, audited: AuditedModel, row: Row) -> None:
    moved = drift.backbone_drift(audited, context.original)
    row.put("drift_backbone", moved, "its layers differ from the original's")
    try:
        new, old = (m.last_layer_rows(context.classes) for m in (audited, context.original))
    except ZsuFastError as error:
        reason: str | None = str(error)
    else:
        reason = None if new.shape == old.shape else "its last layer has another shape"
    if reason is not None:
        row.put("drift_forget_rows", None, reason)
        row.put("drift_retain_rows", None, reason)
        return
    forget = context.forget_mask
    row.put("drift_forget_rows", drift.relative_change(new[forget], old[forget]))
    row.put("drift_retain_rows", drift.relative_change(new[~forget], old[~forget]))


def _add_layers(context: AuditContext, audited: AuditedModel, held_out: Activations) -> None:
    forget = context.forget_mask[held_out.labels]
    features, originals = held_out.features[audited.name], held_out.features[ORIGINAL]
    for layer in sample_layers(audited.layers):
        entry = Layer(layer, drift.layer_drift(audited, context.original, layer))
        new, old = features.get(layer), originals.get(layer)
        if new is not None and old is not None and new.shape == old.shape:
            entry.features_forget = drift.feature_drift(new[forget], old[forget])
            entry.features_retain = drift.feature_drift(new[~forget], old[~forget])
        context.rows[audited.name].layers.append(entry)


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
    width = next(context.original.last_layer.parameters())[0].numel()
    if means.shape[1] > width and means.shape[1] % width == 0:  # a map: mean over positions
        means = means.reshape(len(means), width, -1).mean(2)
    return compare_last_layers(new, old, context.forget, hidden, means)


def add_resynthesis(context: AuditContext) -> None:
    """Adds the results of ascent towards forgotten classes to every row, as is and un-masked."""
    limit, per_class = _RESYNTHESIS if context.classes <= 50 else _RESYNTHESIS_MANY
    classes = context.subset(context.forget, limit)
    for audited in context.models:
        row = context.rows[audited.name]
        result = resynthesise(audited, classes, per_class, context.seed)
        row.put("resynthesis_hit", result.hit_rate)
        row.put("resynthesis_steps", result.steps)
        if result.impressions is not None:
            context.pictures[audited.name] = result.impressions
        restored = context.restored.get((audited.name, "rows"))
        if restored is None:
            continue
        if audited.name in (ORIGINAL, MASK):  # both are the original then
            steps = context.rows[ORIGINAL].values["resynthesis_steps"]
        else:
            steps = resynthesise(restored, classes, per_class, context.seed).steps
        row.put("resynthesis_unmasked_steps", steps)
