"""`audit`: measures what was really forgotten, and compares it with the baselines."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from ...errors import ArgumentError, ZsuFastError, check_int
from ...models.embedding_classifier import as_embedding_classifier
from ...models.infer_spec import resolve_spec
from ...models.input_spec import noise_images
from ...models.multi_label import find_multi_label
from ...models.outputs import OutputChoice, check_output
from ...models.parameters import weights_hash
from ...models.wrapper import resolve_device, working_copy
from ...runtime.progress import Reporter
from ...runtime.torch_settings import threads_for, torch_defaults
from ...synthesis.impressions import ClassImpressions
from ..baselines import train_on_noise
from ..encoder_evaluation import refuse_for_encoder
from . import data_free_metrics, data_metrics, multi_label as several_labels
from .activations import Activations, collect_activations
from .audited_model import audited_copy, unmasked, variant
from .checks import Evidence, checks
from .context import AuditContext
from .encoder import audit_encoder
from .metrics import METRICS
from .relearning import GOAL, relearn_all
from .result import GOLDEN, MASK, MODELS, ORIGINAL, RANDOM, UNLEARNED, UNMASK_PREFIXES, Audit, Row
from .verdict import findings, sentences


@torch_defaults()
def audit(
    original: nn.Module,
    unlearned: nn.Module,
    forget: Any,
    data: Any = None,
    golden: nn.Module | None = None,
    *,
    train_data: Any = None,
    impressions: ClassImpressions | None = None,
    class_names: Any = None,
    impressions_per_class: int = 16,
    shots: int = 500,
    relearn_steps: int | None = None,
    input_shape: Sequence[int] | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    output: OutputChoice | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool | None = None,
    multi_label: bool | None = None,
) -> Audit:
    """Measures what ``unlearned`` has forgotten and what it only hides.

    The original, its mask, random embeddings and the golden model, if given, take the same tests.
    `METRICS` defines each number; `Row.missing` says why one could not be computed.

    Args:
        original: the classifier before unlearning. Of an `EmbeddingClassifier`, the encoder is
            audited with the gallery as it was, see ``encoder.py``; the unlearned and the golden
            model may be encoders alone, or with a gallery.
        unlearned: the classifier to judge, with the same logits; also a `zsu_fast.mask`.
        forget: the classes that were to be forgotten, as for `unlearn`.
        data: labelled images that no model was trained on, as for `evaluate`; without
            ``train_data``, probe and k-NN learn from one half of them.
        golden: a model trained without the forgotten classes, with the same logits.
        train_data: labelled images that the models were trained on, of all classes.
        impressions: of the original, unseen by unlearning; None synthesises them.
        class_names: as for `unlearn`.
        impressions_per_class: number to synthesise; at most 4 with more than 50 classes.
        shots: images per class that relearning may use.
        relearn_steps: step limit; 0 leaves relearning out. None: 100, and all weights are left out
            on a CPU if that would take minutes.
        input_shape, mean, std, output: see `synthesize`.
        seed: determines everything random.
        device: where to compute; None for the original's device.
        progress: True, False, or None for "if stderr is a terminal".
        multi_label: whether each class has a sigmoid of its own, and labels are those that
            `evaluate` takes of such a model; None: see `find_multi_label`. Tests that a softmax or
            a single class per image defines can't tell then.

    Raises:
        ArgumentError: an argument can't be used.
    """
    check_int("impressions_per_class", impressions_per_class, 2)
    check_int("shots", shots, 1)
    check_int("relearn_steps", relearn_steps, 0, optional=True)
    check_int("seed", seed, 0)
    check_output(output)
    classifier = as_embedding_classifier(original)
    if classifier is not None:
        refuse_for_encoder(output, multi_label)
    stating = original if classifier is None else classifier.encoder
    where, spec = resolve_device(original, device), resolve_spec(stating, input_shape, mean, std)
    settings = {
        "impressions_per_class": impressions_per_class, "shots": shots,
        "relearn_steps": relearn_steps, "seed": seed, "device": str(where),
        "relearn_goal": GOAL, "input": {"shape": spec.shape, "mean": spec.mean, "std": spec.std},
    }  # fmt: skip
    if classifier is not None:
        given = {UNLEARNED: unlearned} | ({} if golden is None else {GOLDEN: golden})
        return audit_encoder(
            classifier, given, forget, data, train_data=train_data, impressions=impressions,
            class_names=class_names, spec=spec, device=where, settings=settings, progress=progress,
        )  # fmt: skip
    audited = audited_copy(ORIGINAL, original, spec, where, output)
    work, images = working_copy(original, where, output), noise_images(spec, 2).to(where)
    several, notes = find_multi_label(original, work, images, multi_label)
    if several:
        settings["multi_label"] = True
        audited = audited_copy(ORIGINAL, original, spec, where, output, several)
    context = AuditContext(audited, forget, settings, class_names, several)
    context.notes += notes
    return _run(context, {ORIGINAL: original, UNLEARNED: unlearned, GOLDEN: golden},
                data, train_data, impressions, progress)  # fmt: skip


def _run(
    context: AuditContext,
    models: dict[str, nn.Module | None],
    data: Any,
    train_data: Any,
    impressions: ClassImpressions | None,
    progress: bool | None,
) -> Audit:
    given = {name: model for name, model in models.items() if model is not None}
    hashes = {name: weights_hash(model) for name, model in given.items()}
    timings: dict[str, float] = {}
    with Reporter(progress) as report, threads_for(context.multiply_adds, context.device):

        @contextmanager
        def part(name: str) -> Iterator[None]:
            report("audit", len(timings), 8)
            started = time.perf_counter()
            yield
            timings[name] = time.perf_counter() - started

        for name in (UNLEARNED, GOLDEN):
            if name in given:
                _add_model(context, name, given[name])
        started = time.perf_counter()
        with part("baselines"):
            _add_baselines(context)
            _add_restored(context)
        with part("impressions"):
            held_out = data_free_metrics.held_out_impressions(context, impressions)
            seen = _see_impressions(context, held_out)
        with part("agreement and drift"):
            data_free_metrics.add_impression_metrics(context, seen)
            data_free_metrics.add_erasure_cost(context, seen)
            last_layer = data_free_metrics.inspect_last_layer(context, seen)
        with part("re-synthesis"):
            data_free_metrics.add_resynthesis(context)
        if data is not None and context.multi_label:
            with part("images"):
                several_labels.measure_images(context, data, train_data)
        elif data is not None:
            seen = _measure_images(context, data, train_data, part)
        elif train_data is not None:
            context.notes.append("train_data was ignored because data was not given")
        top_class = -1
        if context.multi_label:
            several_labels.explain_missing(context)
        else:
            top_class = _add_top_predictions(context, seen)
        _explain_missing(context, data is not None, train_data is not None)
        timings["total"] = time.perf_counter() - started
    rows = [context.rows[name] for name in MODELS if name in context.rows]
    forgotten = len(context.forget)
    evidence = Evidence(rows, last_layer, top_class, context.classes - forgotten, forgotten)
    found, tests = findings(evidence), checks(evidence)
    return Audit(
        sentences(evidence, found, tests), found, tests, rows, context.forget, context.classes,
        context.settings, context.counts, hashes, context.notes, timings, context.pictures,
        held_out,
    )  # fmt: skip


def _see_impressions(context: AuditContext, held_out: ClassImpressions) -> Activations:
    """The activations on impressions; of a multi-label model, with the logits of all variants."""
    batch, stored = (held_out.images, held_out.labels), context.models
    variants = list(context.restored.values())
    if context.multi_label:
        stored, variants = [*stored, *variants], []
    return collect_activations([batch], stored, variants, context.forget, len(held_out))


def _measure_images(
    context: AuditContext,
    data: Any,
    train_data: Any,
    part: Callable[[str], AbstractContextManager[None]],
) -> Activations:
    """Adds the metrics on labelled images; returns the activations on ``data``."""
    with part("images"):
        images, split = data_metrics.collect_images(context, data, train_data)
        data_metrics.add_accuracies(context, images)
        data_metrics.add_divergences(context, images)
    with part("probe"):
        data_metrics.add_separability(context, split)
        data_metrics.add_adapted_unmask(context, split)
        data_metrics.add_cka(context, split)
    if train_data is not None:
        with part("membership"):
            data_metrics.add_membership(context, split.train, images)
    with part("relearning"):
        relearn_all(context, split, one_set=train_data is None)
    return images


def _add_model(context: AuditContext, name: str, model: nn.Module) -> None:
    """Adds a model, which must have the original's logits."""
    output = context.original.model.output  # the item that was found in the original's
    several = context.multi_label
    audited = audited_copy(name, model, context.spec, context.device, output, several)
    with torch.no_grad():
        logits = audited.model(torch.zeros(2, *context.spec.shape, device=context.device))
    if logits.shape != (2, context.classes):
        raise ArgumentError(
            name,
            f"its logits are {tuple(logits.shape)} for two images",
            f"Pass a model with the original's {context.classes} logits.",
        )
    context.add(audited)


def _add_baselines(context: AuditContext) -> None:
    """Adds the mask, and random embeddings: the last layer trained on noise."""
    masked = variant(context.original, MASK)
    masked.hidden = context.forget
    context.add(masked)
    context.rows[RANDOM] = Row(RANDOM)
    if context.multi_label:
        reason = "random embeddings are trained with the loss of a softmax"
        context.rows[RANDOM].missing = {metric.key: reason for metric in METRICS}
        return
    try:
        trained = variant(context.original, RANDOM)
        forget = context.forget_mask.to(context.device)
        train_on_noise(trained.model, trained.split, context.spec, forget, context.seed)
    except ZsuFastError as error:
        context.rows[RANDOM].missing = {metric.key: str(error) for metric in METRICS}
    else:
        context.add(trained)


def _add_restored(context: AuditContext) -> None:
    """Adds each model with parts of the original's last layer put back, or says why it can't."""
    for audited in context.models:
        for part, prefix in UNMASK_PREFIXES.items():
            rows = context.forget if part == "rows" else None
            try:
                restored = unmasked(audited, context.original, rows, context.classes)
            except ZsuFastError as error:
                keys = [f"{prefix}_{end}" for end in ("fa", "ra", "impressions_fa")]
                rows_only = ["resynthesis_unmasked_steps", "unmask_ff"]
                keys += rows_only if part == "rows" else [f"{prefix}_impressions_ra"]
                context.rows[audited.name].missing |= dict.fromkeys(keys, str(error))
            else:
                context.restored[audited.name, part] = restored


def _add_top_predictions(context: AuditContext, seen: Activations) -> int:
    """Adds the share of each model's most frequent prediction on retained classes.

    Returns the unlearned model's prediction, or -1 without an image of a retained class.
    """
    top = -1
    retained = ~context.forget_mask[seen.labels]
    if bool(retained.any()):
        labels = seen.labels[retained]
        weight = 1 / torch.bincount(labels, minlength=context.classes)[labels].double()
        for _, row in context.measured():
            total = torch.zeros(context.classes, dtype=torch.float64)
            total.index_add_(0, seen.predictions[row.name][retained], weight)
            share = total / weight.sum()
            top = int(share.argmax()) if row.name == UNLEARNED else top
            row.put("top_answer", 100 * float(share.max()))
    return top


def _explain_missing(context: AuditContext, data: bool, train_data: bool) -> None:
    """Gives a reason for each metric without a value."""
    reasons = {}  # what a metric needs -> why it is missing
    if not data:
        reasons = dict.fromkeys(("data", "train_data", "golden"), "no images were given (data)")
    else:
        if not train_data:
            reasons["train_data"] = (
                "it compares training images with others, and only one set was given "
                "(train_data is missing)"
            )
        if GOLDEN not in context.rows:
            reasons["golden"] = "no golden model was given"
    for row in context.rows.values():
        for metric in METRICS:
            if metric.key not in row.values:
                reason = reasons.get(metric.needs, "the given images do not allow it")
                row.missing.setdefault(metric.key, reason)
