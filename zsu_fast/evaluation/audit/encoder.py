"""`audit` of an encoder with its gallery.

The original's templates stay in use for all models that share its embedding space: whoever holds a
template will compare with it, so removing it from a gallery proves nothing. A golden encoder has a
space of its own; with templates enrolled anew, all three are compared.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

from ...errors import ArgumentError
from ...models.class_indices import check_forget
from ...models.embedding_classifier import (
    EmbeddingClassifier,
    as_embedding_classifier,
    deliverable,
)
from ...models.input_spec import InputSpec
from ...models.labels import resolve_labels
from ...models.parameters import weights_hash
from ...models.wrapper import working_copy
from ...runtime.measuring import multiply_adds
from ...runtime.progress import Reporter
from ...runtime.torch_settings import threads_for
from ...synthesis.ascent_settings import AscentSettings
from ...synthesis.impressions import ClassImpressions
from ...synthesis.space import input_space
from ...synthesis.synthesize import ascend
from ..embed import embed
from . import encoder_data
from .checks import Evidence
from .encoder_checks import CHECKS, encoder_findings, encoder_verdict
from .encoder_context import EncoderContext
from .encoder_metrics import ENCODER_METRICS
from .result import GOLDEN, ORIGINAL, UNLEARNED, Audit
from .weights import LastLayer, parameter_drift

# Without images: impressions of at most this many forgotten identities and this many others, and
# their seed, apart from that of runs.
_IDENTITIES, _SEED = 16, 1_000_003


def audit_encoder(
    original: EmbeddingClassifier,
    given: dict[str, nn.Module],
    forget: Any,
    data: Any,
    *,
    train_data: Any,
    impressions: ClassImpressions | None,
    class_names: Any,
    spec: InputSpec,
    device: torch.device,
    settings: dict[str, Any],
    progress: bool | None,
) -> Audit:
    """The audit of an encoder; the arguments are those of `audit`.

    Args:
        given: "unlearned" and, if there is one, "golden": an encoder, alone or with templates. Of
            the unlearned one, only the encoder counts.

    Raises:
        ArgumentError: see `audit`.
    """
    started = time.perf_counter()
    context = _context(original, given, forget, class_names, spec, device, settings)
    image = torch.zeros(1, *spec.shape, device=device)
    context.multiply_adds = multiply_adds(context.models[ORIGINAL], image)
    pictures = None
    with Reporter(progress) as report, threads_for(context.multiply_adds, device):
        report("audit", 0, 2)
        if data is None:
            pictures = _add_impressions(context, impressions, report)
            if train_data is not None:
                context.notes.append("train_data was ignored because data was not given")
        else:
            encoder_data.measure(context, data, train_data)
        report("audit", 1, 2)
    everyone = {ORIGINAL: original, **given}
    hashes = {name: weights_hash(deliverable(model)) for name, model in everyone.items()}
    _add_drift(context)
    _explain_missing(context, data is not None)
    rows = list(context.rows.values())
    forgotten = len(context.forget)
    same = LastLayer("same", "the templates are the original's")
    evidence = Evidence(rows, same, -1, context.classes - forgotten, forgotten)
    tests = [check(evidence) for check in CHECKS]
    found = encoder_findings(evidence, hashes[UNLEARNED] == hashes[ORIGINAL])
    return Audit(
        encoder_verdict(evidence, found, tests), found, tests, rows, context.forget,
        context.classes, context.settings, context.counts, hashes, context.notes,
        {"total": time.perf_counter() - started}, {}, pictures,
    )  # fmt: skip


def _context(
    original: EmbeddingClassifier, given: dict[str, nn.Module], forget: Any, class_names: Any,
    spec: InputSpec, device: torch.device, settings: dict[str, Any],
) -> EncoderContext:  # fmt: skip
    """Copies the models, and checks what was given."""
    classes = len(original.gallery)
    labels = resolve_labels(class_names, original, classes)
    chosen = check_forget(forget, classes, labels)
    mask = torch.zeros(classes, dtype=torch.bool)
    mask[chosen] = True
    settings |= {"encoder": True, "metric": original.metric, "templates": len(original.templates)}
    if labels is not None:
        settings["labels"] = labels.named(chosen)
    context = EncoderContext(spec, device, chosen, mask, labels, settings)
    context.add(ORIGINAL, _copy(original, device))
    width = original.templates.shape[1]
    for name, model in given.items():
        own = as_embedding_classifier(model)
        space = own if name == GOLDEN and own is not None else original
        if len(space.gallery) != classes:
            raise ArgumentError(
                name, f"its gallery has {len(space.gallery)} identities",
                f"Pass one with the original's {classes}, in the same order.",
            )  # fmt: skip
        copied = _copy(space, device)
        copied.encoder = working_copy(deliverable(model), device).module
        context.add(name, copied)
        if name == GOLDEN and own is None:
            context.without_templates.add(name)
            continue
        found = embed(copied.encoder, torch.zeros(2, *spec.shape), name).shape[1]
        if found != space.templates.shape[1]:
            raise ArgumentError(
                name, f"it returns vectors of {found} values, the templates have {width}",
                "Pass an encoder of the original's architecture.",
            )  # fmt: skip
    return context


def _copy(classifier: EmbeddingClassifier, device: torch.device) -> EmbeddingClassifier:
    copied = working_copy(classifier, device).module
    assert isinstance(copied, EmbeddingClassifier)
    return copied


def _add_impressions(
    context: EncoderContext, given: ClassImpressions | None, report: Reporter
) -> ClassImpressions:
    """Adds rank-1 on impressions of the forgotten identities, for want of images."""
    impressions = given
    if impressions is None:
        work = working_copy(context.models[ORIGINAL], context.device)
        retained = [c for c in range(context.classes) if not context.forget_mask[c]]
        identities = context.subset(context.forget, _IDENTITIES)
        identities = sorted([*identities, *context.subset(retained, _IDENTITIES)])
        per = max(2, min(context.settings["impressions_per_class"], 128 // len(identities)))
        settings = AscentSettings(per_class=per, seed=_SEED + context.seed)
        space = input_space(work, context.spec, settings.precision)
        impressions = ascend(work, space, identities, settings, report)
    elif impressions.space != "input" or not bool(context.forget_mask[impressions.labels].any()):
        raise ArgumentError(
            "impressions", f"got some in the space {impressions.space!r}, of no forgotten identity",
            "Pass images, with forgotten identities among them.",
        )  # fmt: skip
    context.counts["impressions"] = len(impressions)
    rows = context.forget_mask[impressions.labels]
    for name in context.comparable:
        answers = context.best_identities(name, impressions.images)
        right = (answers == impressions.labels)[rows]
        context.rows[name].put("impressions_fa", 100 * float(right.float().mean()))
    return impressions


def _add_drift(context: EncoderContext) -> None:
    old = dict(context.models[ORIGINAL].encoder.named_parameters())
    for name, row in context.rows.items():
        new = dict(context.models[name].encoder.named_parameters())
        row.put("drift_backbone", parameter_drift(new, old), "its parameters have other shapes")


def _explain_missing(context: EncoderContext, data: bool) -> None:
    for row in context.rows.values():
        for metric in ENCODER_METRICS.values():
            if metric.key in row.values:
                continue
            reason = "the given images do not allow it"
            if not data and metric.needs:
                reason = "no images were given (data)"
            elif metric.key == "impressions_fa":
                reason = "there are images (data), which tell more"
            elif metric.needs == "golden" and GOLDEN not in context.rows:
                reason = "no golden model was given"
            row.missing.setdefault(metric.key, reason)
