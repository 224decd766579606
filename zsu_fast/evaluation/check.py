"""`check`: whether a model has forgotten classes, without data and whatever method was used.

The rows are new ones, drawn and inverted through the original: scenes, and rows of each class, see
`training/deep/rows.py`. Both models answer them. Where the unlearned model differs from the
original ahead of the layer at which rows are inverted, rows are images: scenes and class
impressions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..errors import ArgumentError, ModelError, check_choice, shorten
from ..models.class_indices import check_forget
from ..models.embedding_classifier import as_embedding_classifier
from ..models.expand import expand_compact
from ..models.input_spec import noise_images
from ..models.labels import resolve_labels
from ..models.outputs import OutputChoice
from ..models.parameters import state
from ..models.prepare import PreparedModel, prepare_model
from ..models.wrapper import LogitsModel
from ..runtime.progress import Reporter
from ..runtime.torch_settings import threads_for, torch_defaults
from ..splitting.split import split_at
from ..synthesis.ascent_settings import AscentSettings
from ..synthesis.dead_leaves import sample_dead_leaves
from ..synthesis.space import FlatTail, input_space
from ..synthesis.synthesize import ascend
from ..training.deep.rows import RowSource, stretch_contrast
from ..training.deep.settings import DEPTHS, DeepSettings
from ..training.deep.split import DeepSplit, find_deep_split
from .accuracy import mask
from .audit.audited_model import AuditedModel, audited_copy
from .check_answers import FEWEST_KEPT, Answers, CheckRows, MultiLabelAnswers
from .encoder_evaluation import refuse_for_encoder, working_gallery
from .verdict import (
    LEAST_DEEP_AGREEMENT,
    LEAST_OUTPUT_AGREEMENT,
    MOST_UNMASK_LEAK,
    Level,
    Verdict,
    in_words,
    shortfalls,
)

_SEED = 0x5EED  # added to the seed: `unlearn` trains on the rows of the seed itself
_SETTINGS = DeepSettings(scenes=1024, large_scenes=512, inverted=512)
_IMAGES, _PER_CLASS, _RETAINED = 256, 8, 16  # impressions, if rows are images; of retained classes
_NOT_FORGOTTEN = 0.1  # classes with a larger share of their rows recognised were not forgotten


@torch_defaults()
def check(
    original: nn.Module,
    unlearned: nn.Module,
    forget: object,
    *,
    depth: str | None = None,
    class_names: Any = None,
    input_shape: Sequence[int] | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    output: OutputChoice | None = None,
    multi_label: bool | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool | None = None,
) -> Verdict:
    """Measures without data whether ``unlearned`` has forgotten classes that ``original`` knows.

    The unlearned model may come from any method. `audit` with labelled images tells more, such as
    what a linear probe finds. Neither model is changed.

    Args:
        original: the classifier before unlearning. Of an `EmbeddingClassifier`, both encoders are
            compared with the original's templates.
        unlearned: the result, of the same architecture; also a `zsu_fast.mask`, an encoder, or a
            compact model that has rows for all classes but ``forget``.
        forget: the classes that were to be forgotten, as for `unlearn`.
        depth: the level that the verdict requires, "deep" or "output"; None for either.
        class_names: the names of all classes, as for `unlearn`; None: what ``original`` states.
        input_shape, mean, std: see `synthesize`.
        output: which item of both models' output holds the logits, as for `unlearn`.
        multi_label: whether each class has a sigmoid of its own, as for `unlearn`. A row counts as
            recognised then if any forgotten class has a probability of at least one half.
        seed: of the rows.
        device: where to compute; None for the original's device.
        progress: True, False, or None for "if stderr is a terminal".

    Returns:
        A `Verdict`. Its level is "none" if more than 10 % of the rows of the forgotten classes are
        still recognised; "deep" if at most 40 % are with the original last layer put back, and that
        layer still works for the other classes; else "output". These are the limits of a run.

    Raises:
        ArgumentError: an argument can't be used.
        ModelError: the models are of different architectures, or there is no row of the classes to
            judge by.
    """
    if depth is not None:
        check_choice("depth", depth, DEPTHS)
    encoder = as_embedding_classifier(original)
    if encoder is not None:
        refuse_for_encoder(output, multi_label)
        count = len(encoder.gallery)
        known = resolve_labels(class_names, original, count)
        chosen = check_forget(forget, count, known)
        original, unlearned, places = working_gallery(encoder, unlearned, chosen, seed)
    prepared = prepare_model(original, device, input_shape, mean, std, output, multi_label)
    if encoder is None:
        known = resolve_labels(class_names, original, prepared.classes)
        chosen = places = check_forget(forget, prepared.classes, known)
        full = expand_compact(prepared, unlearned, sorted(chosen))
        unlearned = unlearned if full is None else mask(full, chosen)
    labels = {c: known.names[c] for c in chosen} if known is not None else {}
    found = None if encoder is not None else prepared.model.output  # as in the original's
    other = audited_copy("unlearned", unlearned, prepared.spec, prepared.device, found)
    _check_alike(prepared.model, other.model)
    with (
        threads_for(prepared.multiply_adds(), prepared.device),
        Reporter(progress, None) as report,
    ):
        rows = _make_rows(prepared, other, places, seed + _SEED, report)
        kind = MultiLabelAnswers if prepared.multi_label else Answers
        answers = kind.of(rows, prepared.model, other, places)
    return _verdict(answers, dict(zip(places, chosen, strict=True)), labels, depth)


def _check_alike(original: LogitsModel, unlearned: LogitsModel) -> None:
    """Raises unless both models have the same tensors, up to their values."""
    old, new = ({n: tuple(t.shape) for n, t in state(m.module).items()}
                for m in (original, unlearned))  # fmt: skip
    differ = sorted(n for n in old.keys() | new.keys() if old.get(n) != new.get(n))
    if differ:
        text = [f"{n}: {old.get(n, 'absent')} and {new.get(n, 'absent')}" for n in differ]
        raise ModelError(
            f"the original and the unlearned model differ in more than values: {shorten(text, 3)}",
            "Pass the model that was unlearned, and its result, with a logit for each class or for "
            "all but those in forget.",
        )


def _make_rows(
    prepared: PreparedModel, other: AuditedModel, forget: list[int], seed: int, report: Reporter
) -> CheckRows:
    """Points ahead of the last layers, or images if the models differ before."""
    try:
        rows = _inverted_rows(prepared, other, forget, seed, report)
    except (ArgumentError, ModelError):  # such as a single layer
        rows = None
    return rows or _image_rows(prepared, other, forget, seed, report)


def _inverted_rows(
    prepared: PreparedModel, other: AuditedModel, forget: list[int], seed: int, report: Reporter
) -> CheckRows | None:
    """Points ahead of the last layers; None if the models differ before."""
    deep = find_deep_split(prepared.model, "auto", prepared.spec)
    tail = _same_layers_ahead(prepared, deep, other)
    if tail is None:
        return None
    hidden = torch.zeros(prepared.classes, dtype=torch.bool, device=prepared.device)
    hidden[forget] = True
    settings = _SETTINGS.for_classes(prepared.classes)
    settings = replace(settings, multi_label=prepared.multi_label)
    source = RowSource(prepared.model, deep, prepared.spec, hidden, settings, seed)
    inverted = source.invert(range(prepared.classes), report)
    scenes = source.scenes.starts
    points = torch.cat([scenes, inverted.images.to(prepared.device)])
    words = f"rows inverted at {deep.early.name}"
    return CheckRows(points, inverted.labels, len(scenes), (deep.flat, tail), words)


def _same_layers_ahead(
    prepared: PreparedModel, deep: DeepSplit, other: AuditedModel
) -> nn.Module | None:
    """The unlearned model from the early split on; None if it differs from the original before."""
    spec = replace(prepared.spec, shape=deep.shape)
    bounds = (-1, *[1] * (len(deep.shape) - 1))
    low, high = spec.low.view(bounds), spec.high.view(bounds)
    images = torch.cat([
        noise_images(spec, 4), low + (high - low) * sample_dead_leaves(4, deep.shape, 0),
    ]).to(prepared.device)  # fmt: skip
    early = split_at(other.model, deep.early.name, images[:2], "as the original")
    with torch.no_grad():
        boundary, expected = early.backbone(images), deep.early.backbone(images)
    alike = len(boundary) == len(expected) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-6)
        for a, b in zip(boundary, expected, strict=True)
    )
    return FlatTail(early.tail, boundary) if alike else None


def _image_rows(
    prepared: PreparedModel, other: AuditedModel, forget: list[int], seed: int, report: Reporter
) -> CheckRows:
    """Scenes, and impressions of the forgotten classes and of a few others."""
    spec, generator = prepared.spec, torch.Generator().manual_seed(seed)
    scenes = sample_dead_leaves(_SETTINGS.large_scenes, spec.shape, seed)
    if len(spec.shape) == 3:
        scenes = stretch_contrast(scenes, generator)
    bounds = (-1, *[1] * (len(spec.shape) - 1))
    low, high = spec.low.view(bounds), spec.high.view(bounds)
    retained = sorted({*range(prepared.classes)} - {*forget})
    some = torch.randperm(len(retained), generator=generator)[:_RETAINED].tolist()
    classes = sorted([*forget, *(retained[i] for i in some)])
    settings = AscentSettings(
        max(1, min(_PER_CLASS, _IMAGES // len(classes))), seed=seed,
        multi_label=prepared.multi_label,
    )  # fmt: skip
    space = input_space(prepared.model, spec, settings.precision)
    impressions = ascend(prepared.model, space, classes, settings, report)
    points = torch.cat([low + scenes * (high - low), impressions.images.cpu()])
    return CheckRows(
        points.to(prepared.device), impressions.labels, len(scenes),
        (prepared.model, other.model), "class impressions",
    )  # fmt: skip


def _verdict(
    a: Answers, numbers: dict[int, int], labels: dict[int, str], depth: str | None
) -> Verdict:
    """Draws the conclusions from the answers.

    Args:
        a: the answers.
        numbers: place among the logits of each class to forget -> the user's number.
        labels: the user's number -> name, where known.
        depth: the level that is required, or None.
    """
    forget, encoder = list(numbers.values()), a.unmasked is a.unlearned
    count = int(a.belongs.sum())
    if not count:
        raise ModelError(
            f"no row could be made that the original assigns to {in_words(forget)}",
            "Check input_shape, mean and std, or use audit() with labelled images.",
        )
    leak, agreement = a.leak(a.unlearned), a.agreement(a.unlearned, False)
    unmask_leak, unmask_agreement = a.leak(a.unmasked), a.agreement(a.unmasked, True)
    left_out = []
    seen = {numbers[c] for c in a.seen()}
    if missing := [c for c in forget if c not in seen]:
        left_out.append(f"no row of {in_words(missing)}: the original does not recognise any")
    level: Level = "output"
    if leak > _NOT_FORGOTTEN:
        level = "none"
    elif unmask_leak <= _SETTINGS.most_leak and not a.features_unchanged:
        if unmask_agreement >= LEAST_DEEP_AGREEMENT:
            level = "deep"
        else:
            left_out.append(
                f"whether the features forgot: the original last layer keeps only "
                f"{unmask_agreement:.0%} of the other answers on them. Use audit() with data."
            )
    least = LEAST_OUTPUT_AGREEMENT if a.features_unchanged else LEAST_DEEP_AGREEMENT
    failures = shortfalls(level, leak, agreement, least, unmask_leak)
    if encoder:  # the templates are the original last layer
        failures = shortfalls(level, leak, agreement, least, None, MOST_UNMASK_LEAK)
    if (kept := a.kept()) < FEWEST_KEPT:
        failures.append(
            f"only {kept:.0%} of the rows made for other classes are still recognised: the model "
            f"is damaged, or no relative of the original, and the rows say nothing about it"
        )
    elif lost := a.lost():
        failures.append(f"most rows of {in_words(lost)}, to be kept, are no longer recognised")
    what = "identities" if encoder else "classes"
    words = f"{count} rows of the {what} ({a.rows.words}) and {int(a.retained.sum())} scenes"
    asked: Level | None = None if depth is None else "deep" if depth == "deep" else "output"
    return Verdict(
        level, asked, forget, leak, agreement, unmask_leak, unmask_agreement, words, labels,
        left_out, failures, list(failures), encoder,
    )  # fmt: skip
