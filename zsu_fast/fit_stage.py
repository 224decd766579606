"""The third stage of `ZeroShotUnlearner`: fits the tail, after the layers ahead of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .errors import ModelError
from .models.multi_label import predicted
from .request import Request
from .splitting.split import Split, find_split
from .synthesis.gallery_sampling import WorkingGallery
from .synthesis.impressions import ClassImpressions
from .synthesis.space import tail_input_space
from .training.class_subset import ClassSubsetTail
from .training.deep.deep import DeepFailed, forget_deeply
from .training.deep.rows import RowSource
from .training.deep.settings import DeepSettings
from .training.features import held_out
from .training.fit_task import (
    FitTask,
    copied_values,
    load_values,
    make_fit_task,
    trained_parameters,
)
from .training.trainer import AGREEMENT_GOAL, Fit, ValidationResult, train_tail

# The last layer's fit after deep forgetting: the classes hardly reach it any more.
_LAST_MIXTURES, _LAST_STEPS = 4096, 400
_ENOUGH = 16  # impressions per class for a tail of several layers
_UNSEEN_DIRECTIONS = (
    "the classifier sees only the direction of the features, and normalises its own rows: images "
    "may lie in directions that the run's rows do not reach, and show a forgotten class although "
    "no held-out row does (9 % of them on a small model). Measure FA and RA on images, or pass "
    "depth='output'."
)


class _MayWork(Exception):
    """Ends training after its early check."""


def invert_rows(request: Request, rows: RowSource) -> ClassImpressions | None:
    """Inverted rows of the active classes, few if training's early check fails on those; None if
    there can't be any, so that the request goes on at the output level.
    """

    def is_hopeless(impressions: ClassImpressions) -> bool:
        def stop() -> None:
            raise _MayWork

        try:
            _train(request, rows, impressions, rows.settings, lambda *_, **__: None, stop)
        except DeepFailed as error:
            rows.failure = error
        except _MayWork:
            pass
        return rows.failure is not None

    check = is_hopeless if rows.settings.early_check else None
    try:
        return rows.invert(request.active_classes, request.report, check)
    except ModelError as error:
        request.fall_back(str(error))
        return None


def deepen(request: Request, rows: RowSource, impressions: ClassImpressions) -> Split:
    """Trains the layers ahead of the last; returns the split that is fitted afterwards.

    Where deep forgetting fails its checks, the request goes on at the output level.
    """
    options = request.options
    facts, failed = _forget_deeply(request, rows, impressions)
    if not failed:  # logits have collapsed by now: keep the margin computed from the original
        features, loop = options.features, options.loop
        mixtures = _LAST_MIXTURES if features.mixtures is None else features.mixtures
        margin = features.margin if rows.deep.last.directions else facts["margin"]
        options.features = replace(features, margin=margin, mixtures=mixtures)
        options.loop = replace(loop, steps=loop.steps or _LAST_STEPS)
        options.objective = replace(options.objective, constant=request.multi_label)
    return rows.deep.last


def deepen_encoder(
    request: Request, gallery: WorkingGallery, rows: RowSource, impressions: ClassImpressions
) -> Fit:
    """Trains the encoder's layers; the templates, its last layer, stay as they are.

    Raises:
        ModelError: deep forgetting failed its checks.
    """
    placed = replace(impressions, labels=gallery.places(impressions.labels))
    facts, _ = _forget_deeply(request, rows, placed)
    history = [ValidationResult(**result) for result in facts["history"]]
    after = {name: facts[name]["after"] for name in ("unmask_leak", "agreement")}
    leak, agreement = after["unmask_leak"], after["agreement"]
    best = replace(history[-1], leak=leak, forgotten_leak=leak, agreement=agreement)
    return Fit(history, best, facts["stopped"], facts["learning_rate"])


def _forget_deeply(
    request: Request, rows: RowSource, impressions: ClassImpressions
) -> tuple[dict[str, Any], bool]:
    """`forget_deeply` on rank 0's results: its facts, and whether it failed, which makes the
    request fall back.
    """
    ranks, failure = request.ranks, ""
    for settings in (rows.settings, rows.settings.without_null_space()):
        failure = ""
        try:
            if rows.failure is not None:
                raise rows.failure
            facts = _train(request, rows, impressions, settings, request.report)
            break
        except DeepFailed as error:
            failure, facts = str(error), error.facts
            if facts.get("null_space", "free") == "free":
                break  # without it, the same would be computed again
    ranks.exchange()  # a new stage: a stop request must not carry over into the fit
    failure, facts = ranks.broadcast_object((failure, facts))
    ranks.copy_from_main(trained_parameters(request.work, rows.deep.split))
    request.record.depth |= facts
    if failure:
        request.fall_back(failure)
    return facts, bool(failure)


def _train(
    request: Request,
    rows: RowSource,
    impressions: ClassImpressions,
    settings: DeepSettings,
    report: Callable[..., None],
    checked: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """`forget_deeply` with the options of the request."""
    options = request.options
    return forget_deeply(
        request.work, rows.deep, rows.scenes, impressions, request.forget_mask,
        options.features, options.loop, settings, options.seed, report, checked,
    )  # fmt: skip


def rows_to_change(
    request: Request, rows: RowSource, impressions: ClassImpressions
) -> Tensor | None:
    """In which held-out rows a multi-label original predicts a forgotten class, bool [N]; None for
    other models.
    """
    if not request.multi_label:
        return None
    points, images = impressions.images.to(request.device), impressions.space == "input"
    original = rows.deep.last_features(request.work, points, images)
    shown = rows_that_show(request, rows.deep.last, original)
    held = held_out(impressions.labels)
    return shown & held.to(request.device) if bool(held.any()) else shown


@torch.no_grad()
def rows_that_show(request: Request, split: Split, features: Tensor) -> Tensor:
    """In which of the rows at ``split``, of a multi-label model, a forgotten class is predicted.

    float [N, ...] -> bool [N].
    """
    parts = [(predicted(split.tail(part)) & request.forget_mask).any(1)
             for part in features.split(256)]  # fmt: skip
    return torch.cat(parts)


def features_of(
    request: Request, split: Split, impressions: ClassImpressions
) -> tuple[Tensor, ...]:
    """The backbone's output for the impressions, which may be such an output already."""
    points = impressions.images.to(request.device)
    if request.options.space == "tail-input":
        return tail_input_space(split, request.spec, request.device).parts(points)
    return split.features(points)


def fit_task(
    request: Request, split: Split, features: tuple[Tensor, ...], impressions: ClassImpressions
) -> FitTask:
    """The data that the tail is trained on, and the loss."""
    return make_fit_task(
        request.work, split, features, impressions.labels.to(request.device),
        request.forget_mask, request.options.objective, request.options.features,
        request.options.seed,
    )  # fmt: skip


def fit_tail(
    request: Request,
    split: Split,
    impressions: ClassImpressions,
    features: tuple[Tensor, ...] | None = None,
) -> Fit:
    """Trains the tail of ``split``, in place.

    Args:
        features: the backbone's output for the impressions; None: computed.
    """
    if features is None:
        features = features_of(request, split, impressions)
    task = fit_task(request, split, features, impressions)
    if split.directions and not task.settled and request.options.depth == "deep":
        request.notes = [*request.notes, _UNSEEN_DIRECTIONS]
    per_class = len(impressions) / max(1, len(impressions.labels.unique()))
    deeper = request.options.depth == "output" and not split.output_level
    if deeper and not request.multi_label and per_class < _ENOUGH:
        request.notes = [*request.notes, (
            f"{per_class:.0f} impressions per class are few for more than the last layer (from "
            f"{split.name!r} on): images may show a forgotten class although no held-out row does "
            f"(up to 19 % of them on a small model). Pass impressions_per_class={_ENOUGH} or more, "
            f"or measure FA and RA on images."
        )]  # fmt: skip
    result = train_tail(task, request.options.loop, request.report)
    if isinstance(task.tail, ClassSubsetTail):
        task.tail.write_back()
    result = request.ranks.broadcast_object(result)
    request.ranks.copy_from_main(trained_parameters(request.work, split))
    return result


def fit_tail_or_last(
    request: Request, split: Split, impressions: ClassImpressions
) -> tuple[Split, Fit]:
    """Trains the tail of ``split``; if too few retained answers stayed, fits the last layer alone.

    Returns:
        The split and the fit that are better.
    """
    before = copied_values(trained_parameters(request.work, split))
    first = fit_tail(request, split, impressions)
    best = first.best
    if best is None or best.agreement >= AGREEMENT_GOAL or request.options.space != "input":
        return split, first
    parameters = trained_parameters(request.work, split)
    after = copied_values(parameters)
    load_values(parameters, before)
    images, labels = impressions.images[:4], impressions.labels[:4]
    last = find_split(request.work, "last", images.to(request.device), labels.to(request.device))
    untrained = copied_values(trained_parameters(request.work, last))
    second = fit_tail(request, last, impressions)
    if second.best is not None and second.best.better_than(best):
        kept = f"{best.agreement:.0%} of the retained answers stayed"
        last.reason = f"{last.reason}; trained from {split.name!r} on, {kept}"
        return last, second
    load_values(trained_parameters(request.work, last), untrained)
    load_values(parameters, after)
    return split, first
