"""What can be measured without a single image: on impressions, weights and by ascent."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import ArgumentError, ZsuFastError
from . import divergences, drift, similarity
from .context import AuditContext, confusion, share
from .last_layer import LastLayer, examine
from .activations import Activations, looked_at
from .result import MASK, ORIGINAL, UNLEARNED, Layer, Row
from .resynthesis import reach
from .audited_model import AuditedModel
from .unmask import rows_of


def on_impressions(context: AuditContext, held: Activations) -> LastLayer:
    """Puts what held-out impressions and weights tell on every row; examines the last layer."""
    gone = context.gone[held.labels]
    base = held.features[ORIGINAL]
    masked = held.logits[MASK][~gone]
    for subject in context.subjects:
        row, name = context.rows[subject.name], subject.name
        row.put("impressions_fa", share(held.answers[name] == held.labels, gone))
        for key, kind in (("unmask_impressions_fa", "rows"),
                          ("whole_head_impressions_fa", "whole")):  # fmt: skip
            if (name, kind) in context.variants:
                answers = held.answers[context.variants[name, kind].name]
                row.put(key, share(answers == held.labels, gone))
                if kind == "whole":
                    right = share(answers == held.labels, ~gone)
                    row.put("whole_head_impressions_ra", right)
        row.put("agreement_kl", divergences.kl(masked, held.logits[name][~gone]))
        same = held.answers[name] == held.answers[MASK]
        row.put("agreement_top1", share(same, ~gone))
        new, old = held.penultimate(name), held.penultimate(ORIGINAL)
        other = "its last layer's input has another shape than the original's"
        row.put("drift_features_forget", drift.feature_drift(new[gone], old[gone]), other)
        row.put("drift_features_retain", drift.feature_drift(new[~gone], old[~gone]), other)
        row.put("cka_impressions", similarity.linear_cka(new[gone], old[gone]))
        _weight_drift(context, subject, row)
        for layer in looked_at(subject.layers):
            entry = Layer(layer, drift.weight_drift(subject, context.original, layer))
            mine = held.features[name].get(layer)
            if mine is not None and layer in base and mine.shape == base[layer].shape:
                entry.features_forget = drift.feature_drift(mine[gone], base[layer][gone])
                entry.features_retain = drift.feature_drift(mine[~gone], base[layer][~gone])
            row.layers.append(entry)
        row.confusion = confusion(held.answers[name], held.labels, context.forget)
    features = held.penultimate(ORIGINAL)
    present = held.labels.unique()
    means = torch.stack([features[held.labels == c].mean(0) for c in present])
    judged = next(s for s in context.subjects if s.name == UNLEARNED)
    try:
        new_rows, old_rows = (rows_of(s, context.classes) for s in (judged, context.original))
    except ZsuFastError:
        return examine(None, None, context.forget, bool(judged.hidden), means)
    width = next(context.original.last.parameters())[0].numel()
    if means.shape[1] > width and means.shape[1] % width == 0:  # a map: mean over positions
        means = means.reshape(len(means), width, -1).mean(2)
    return examine(new_rows, old_rows, context.forget, bool(judged.hidden), means)


def _weight_drift(context: AuditContext, subject: AuditedModel, row: Row) -> None:
    if subject.backbone == context.original.backbone:
        row.put("drift_backbone", 0.0)
    else:
        new, old = (_before_last(s) for s in (subject, context.original))
        alike = {n: p.shape for n, p in new.items()} == {n: p.shape for n, p in old.items()}
        value = None
        if alike:
            joined = [torch.cat([d[n].flatten().double() for n in old]) for d in (new, old)]
            value = drift.relative(*joined)
        row.put("drift_backbone", value, "its layers are not the original's")
    try:
        new_rows, old_rows = (rows_of(s, context.classes) for s in (subject, context.original))
        if new_rows.shape != old_rows.shape:
            raise ArgumentError("model", "its last layer has another shape", "Nothing to do.")
    except ZsuFastError as error:
        for key in ("drift_forget_rows", "drift_retain_rows"):
            row.put(key, None, str(error))
        return
    row.put("drift_forget_rows", drift.relative(new_rows[context.gone], old_rows[context.gone]))
    row.put("drift_retain_rows", drift.relative(new_rows[~context.gone], old_rows[~context.gone]))


def resynthesise(context: AuditContext) -> None:
    """Puts the ascent towards forgotten classes on every row, as it is and un-masked."""
    classes = context.some(context.forget, 16 if context.classes <= 50 else 8)
    per_class = 8 if context.classes <= 50 else 2
    for subject in context.subjects:
        row = context.rows[subject.name]
        done = reach(subject, classes, per_class, context.spec, context.seed)
        row.put("resynthesis_hit", done.hit)
        row.put("resynthesis_steps", done.steps)
        if done.made is not None:
            context.pictures[subject.name] = done.made
        if (subject.name, "rows") in context.variants:
            other = context.variants[subject.name, "rows"]
            if subject.name in (ORIGINAL, MASK):  # both are the original then
                steps = context.rows[ORIGINAL].values["resynthesis_steps"]
            else:
                steps = reach(other, classes, per_class, context.spec, context.seed).steps
            row.put("resynthesis_unmasked_steps", steps)


def _before_last(subject: AuditedModel) -> dict[str, Tensor]:
    prefix = f"{subject.layers[-1]}."
    named = subject.model.module.named_parameters()
    return {n: p.detach() for n, p in named if not n.startswith(prefix)}
