"""The audit of an encoder on labelled images: identification, re-enrolment, probe, relearning."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import UnlearningWarning
from ...models.embedding_classifier import EmbeddingClassifier, Metric
from ...models.parameters import UNCOPYABLE, deep_copy
from ..class_order import check_order
from ..embed import embed, scores_of
from ..encoder_evaluation import identification_rates
from ..enrolment import enroll_embeddings
from ..identification import FARS, Matches, distributions, match
from ..labelled_data import LabelledData
from .activations import normalised_batches
from .encoder_context import EncoderContext
from .features import linear_cka, probe_predictions, split_in_half
from .relearning import (
    DEFAULT_STEPS,
    GOAL,
    MAX_CLASSES,
    RelearnTask,
    add_anamnesis_index,
    too_costly,
    train_on_shots,
)
from .result import ORIGINAL

# Images per identity that the fresh galleries are enrolled from.
_ENROLLED = 5
# The probe learns from at most this many embeddings, divided among the identities.
_MAX_PROBED = 20_000
# Relearning is measured on at most this many images, and stores at most this many numbers.
_MAX_TESTED, _MAX_STORED_VALUES = 600, 1 << 28


@dataclass
class _Seen:
    """What one set of images gives: labels int64 [N], embeddings [N, D] by model's name, and the
    images of a few identities for relearning, with their labels.
    """

    labels: Tensor
    embeddings: dict[str, Tensor]
    images: Tensor
    image_labels: Tensor

    def part(self, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Labels and embeddings of some rows, bool [N]."""
        return self.labels[rows], {name: z[rows] for name, z in self.embeddings.items()}


def measure(context: EncoderContext, data: Any, train_data: Any) -> None:
    """Adds all metrics on images to every row."""
    seen = _collect(context, data, "data", train_data is None)
    counts = context.forget_mask[seen.labels]
    context.counts["forget_images"] = int(counts.sum())
    context.counts["retain_images"] = len(counts) - int(counts.sum())
    matches = {name: _match(context, seen, name) for name in context.comparable}
    _add_rates(context, matches)
    if train_data is None:
        first, second = split_in_half(seen.labels)
        learn, test, source = seen.part(first), seen.part(second), None
    else:
        source = _collect(context, train_data, "train_data", True)
        context.counts["train_images"] = len(source.labels)
        everything = torch.ones(len(source.labels), dtype=torch.bool)
        learn, test = source.part(everything), (seen.labels, seen.embeddings)
    _add_reenrolled(context, learn, test)
    _add_probe(context, learn, test)
    for name, row in context.rows.items():
        for kind, rows in (("forget", counts), ("retain", ~counts)):
            pair = seen.embeddings[name][rows], seen.embeddings[ORIGINAL][rows]
            row.put(f"cka_original_{kind}", linear_cka(*pair), "too few images")
    _relearn(context, _make_task(context, seen, source))


def _collect(context: EncoderContext, data: Any, argument: str, shots: bool) -> _Seen:
    """Runs all encoders on the images, once each."""
    source = LabelledData(data, argument, context.spec, context.labels, exact_size=True)
    source.match(context.models[ORIGINAL], context.classes)
    if source.found is not None:
        context.settings[f"{argument}_classes"] = source.found.classes
    retained = [c for c in range(context.classes) if not context.forget_mask[c]]
    chosen = [*context.subset(context.forget, MAX_CLASSES), *context.subset(retained, MAX_CLASSES)]
    most = _MAX_STORED_VALUES // max(1, math.prod(context.spec.shape)) // max(1, len(chosen))
    wanted = (context.settings["shots"] if shots else 0) + _MAX_TESTED // len(context.forget) + 1
    left = dict.fromkeys(chosen, min(wanted, most))
    labels: list[Tensor] = []
    found: dict[str, list[Tensor]] = {name: [] for name in context.models}
    images, image_labels = [], []
    for batch, own in normalised_batches(source, context.classes):
        for name, model in context.models.items():
            found[name].append(embed(model, batch, argument))
        labels.append(own)
        rows = []
        for index, c in enumerate(own.tolist()):
            if left.get(c, 0):
                left[c] -= 1
                rows.append(index)
        images.append(batch[rows])
        image_labels.append(own[rows])
    seen = _Seen(
        torch.cat(labels), {name: torch.cat(z) for name, z in found.items()},
        torch.cat(images), torch.cat(image_labels),
    )  # fmt: skip
    _note_assumptions(context, source, seen)
    return seen


def _note_assumptions(context: EncoderContext, source: LabelledData, seen: _Seen) -> None:
    answers = _match(context, seen, ORIGINAL).best
    facts, doubts = source.format.assumptions()
    if found := check_order(answers, seen.labels, context.classes, [], source.found):
        doubts.append(f"{source.argument}: {found}")
    context.notes += facts + doubts
    for doubt in doubts:
        warnings.warn(doubt, UnlearningWarning, stacklevel=2)


def _match(context: EncoderContext, seen: _Seen, name: str) -> Matches:
    scores = scores_of(context.models[name])
    return match(seen.embeddings[name], seen.labels, scores, context.forget_mask, context.seed)


def _add_rates(context: EncoderContext, matches: dict[str, Matches]) -> None:
    original = matches[ORIGINAL].threshold(FARS[0])
    for name, found in matches.items():
        row = context.rows[name]
        rates, missing = identification_rates(found)
        for key, value in rates.items():
            row.put(key, value)
        row.missing |= missing
        if original is not None and name != "golden":
            row.put("identified_forget_original", found.rank1(found.forgotten, original))
    for name in context.without_templates:
        reason = "it was given without templates, and the original's do not apply to it"
        row = context.rows[name]
        row.missing |= dict.fromkeys([*rates, *missing, "identified_forget_original"], reason)
    shown = distributions(list(matches.values()))
    for name, histogram in zip(matches, shown, strict=True):
        context.rows[name].distributions["original's templates"] = histogram


def _add_reenrolled(
    context: EncoderContext,
    learn: tuple[Tensor, dict[str, Tensor]],
    test: tuple[Tensor, dict[str, Tensor]],
) -> None:
    """Enrols everyone anew with each encoder, and identifies other images."""
    enrolled = learn[0].unique()
    rows = torch.isin(test[0], enrolled)
    number = torch.zeros(context.classes, dtype=torch.int64)
    number[enrolled] = torch.arange(len(enrolled))
    labels, forget = number[test[0][rows]], context.forget_mask[enrolled]
    metric: Metric = context.models[ORIGINAL].metric
    metric = "cosine" if metric == "dot" else metric  # a mean's length says nothing
    context.settings["reenrolled_images"] = int(
        torch.bincount(number[learn[0]]).clamp(max=_ENROLLED).min()
    )
    found: dict[str, Matches] = {}
    for name, model in context.models.items():
        z = learn[1][name]
        templates = enroll_embeddings(z, number[learn[0]], len(enrolled), metric, _ENROLLED)
        if templates is None or len(enrolled) < 2 or not len(labels):
            context.notes.append(f"{name}: no gallery could be enrolled anew")
            continue
        fresh = EmbeddingClassifier(model.encoder, templates.cpu(), scale=1.0, metric=metric)
        tested = test[1][name][rows]
        found[name] = match(tested, labels, scores_of(fresh), forget, context.seed)
    for (name, m), shown in zip(found.items(), distributions(list(found.values())), strict=True):
        row, threshold = context.rows[name], m.threshold(FARS[0])
        row.distributions["re-enrolled"] = shown
        for part, own in (("forget", m.forgotten), ("retain", ~m.forgotten)):
            row.put(f"reenrolled_rank1_{part}", m.rank1(own), "no images are left to measure on")
            accepts = None if threshold is None else m.true_accepts(own, threshold)
            row.put(f"reenrolled_tar_{part}", accepts, "there are too few impostor pairs")


def _add_probe(
    context: EncoderContext,
    learn: tuple[Tensor, dict[str, Tensor]],
    test: tuple[Tensor, dict[str, Tensor]],
) -> None:
    per_identity = max(2, _MAX_PROBED // context.classes)
    order = torch.cat([
        (learn[0] == c).nonzero()[:per_identity, 0] for c in learn[0].unique().tolist()
    ])  # fmt: skip
    forgotten = context.forget_mask[test[0]]
    for name, row in context.rows.items():
        if not len(order) or not len(test[0]):
            continue
        answers = probe_predictions(
            learn[1][name][order], learn[0][order], test[1][name], context.classes
        )
        right = (answers == test[0]).float()
        for part, rows in (("forget", forgotten), ("retain", ~forgotten)):
            value = 100 * float(right[rows].mean()) if bool(rows.any()) else None
            row.put(f"probe_{part}", value, "no images are left to measure on")


def _make_task(context: EncoderContext, seen: _Seen, source: _Seen | None) -> RelearnTask | str:
    """The task, or the reason why there is none."""
    max_steps, shots = context.settings["relearn_steps"], context.settings["shots"]
    if max_steps == 0:
        return "relearn_steps=0 leaves it out"
    pool = seen if source is None else source
    learn, test = [], []
    for c in pool.image_labels.unique().tolist():
        rows, count = (pool.image_labels == c).nonzero()[:, 0], shots
        if source is None and context.forget_mask[c]:
            count = min(shots, len(rows) // 2)
            test.append(rows[count:])
        learn.append(rows[:count])
    if source is not None:
        test = [context.forget_mask[seen.image_labels].nonzero()[:, 0]]
    chosen = torch.cat([*learn, torch.zeros(0, dtype=torch.int64)])
    tested = torch.cat([*test, torch.zeros(0, dtype=torch.int64)])[:_MAX_TESTED]
    labels, test_labels = pool.image_labels[chosen], seen.image_labels[tested]
    known = torch.isin(test_labels, labels)
    if not bool(known.any()):
        return "too few images: it needs shots of the forgotten identities and others to test on"
    images = seen.images[tested][known]
    right = context.best_identities(ORIGINAL, images) == test_labels[known]
    if not bool(right.any()):
        return "the original recognises none of the forgotten identities' images"
    forgotten = labels[context.forget_mask[labels]]
    context.settings["shots_used"] = int(torch.bincount(forgotten).max())
    return RelearnTask(
        pool.images[chosen], labels, images, test_labels[known], context.forget,
        GOAL * 100 * float(right.float().mean()),
        DEFAULT_STEPS if max_steps is None else max_steps, context.seed,
    )  # fmt: skip


def _relearn(context: EncoderContext, task: RelearnTask | str) -> None:
    """Trains each encoder on shots, with its templates in place."""
    if not isinstance(task, str):
        given = context.settings["relearn_steps"] is not None
        reason = too_costly(context.multiply_adds, context.device, task, given)
        task = reason or task
    steps: dict[str, int | None] = {}
    for name, row in context.rows.items():
        if isinstance(task, str) or name in context.without_templates:
            reason = task if isinstance(task, str) else "it was given without templates"
            for key in ("relearn_full_steps", "relearn_full_fa", "ain_full"):
                row.put(key, None, reason)
            continue
        model = deep_copy(context.models[name], UNCOPYABLE)
        assert isinstance(model, EmbeddingClassifier)
        shots, test = task.images.to(context.device), task.test_images.to(context.device)
        with torch.enable_grad():
            result = train_on_shots(
                model, (shots,), (test,), list(model.encoder.parameters()), task
            )
        steps[name] = result.steps
        row.relearning["full"] = result.curve
        row.put("relearn_full_steps", result.steps or task.max_steps)
        row.put("relearn_full_fa", result.accuracy)
    if not isinstance(task, str):
        add_anamnesis_index(context, "full", steps, task.max_steps)
