"""`audit`: what was really forgotten, on evidence, beside the models it has to be held against."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ...errors import ArgumentError, ZsuFastError
from ...models.class_indices import check_forget
from ...models.infer_spec import resolve_spec
from ...models.parameters import weights_hash
from ...models.wrapper import count_classes, resolve_device
from ...runtime.flops import multiply_adds
from ...runtime.progress import Reporter
from ...runtime.threads import threads_for
from ...runtime.torch_defaults import torch_defaults
from ...synthesis.ascent import AscentSettings
from ...synthesis.impressions import ClassImpressions
from ...synthesis.space import input_space
from ...synthesis.synthesize import ascend
from . import baselines, data_metrics, data_free_metrics
from .context import AuditContext
from .metrics import METRICS
from .activations import ActivationCollector, Activations
from .relearning import GOAL, relearn_all
from .result import GOLDEN, MASK, ORIGINAL, RANDOM, UNLEARNED, Audit, Row
from .audited_model import make_audited_model
from .unmask import unmasked
from .verdict import Evidence, checks, findings, sentences

# Impressions of the audit come from other noise than those of a run, whose seeds are small.
_HELD_OUT_SEED = 1_000_003


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
    impressions_per_class: int = 16,
    shots: int = 500,
    relearn_steps: int | None = None,
    input_shape: Sequence[int] | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool | None = None,
) -> Audit:
    """Says what ``unlearned`` has forgotten, and what it only hides.

    The original, its mask, a model unlearned from random embeddings and, if given, the golden
    model go through the same tests. Without ``data``: un-mask test, agreement with the mask,
    drift, re-synthesis. With it: accuracies, confusion, linear probe, k-NN, CKA, relearn time,
    output distances; with ``train_data`` membership inference too. `audit.metrics.METRICS`
    defines each number; one that can't be computed says why in `Row.missing`.

    Args:
        original: the classifier before unlearning.
        unlearned: the classifier to judge, with the same logits; `zsu_fast.mask`'s result and
            -inf biases are understood.
        forget: the classes that were to be forgotten, as for `unlearn`.
        data: labelled images that no model was trained on: a (images, labels) pair of tensors or
            an iterable of such batches; uint8 [N, C, H, W] or float as the model wants them;
            labels int [N]. Without ``train_data``, every second image of each class is what
            probe and k-NN learn from, and the others are what they are measured on.
        golden: a model trained without the forgotten classes, with the same logits.
        train_data: labelled images that the models were trained on, of all classes.
        impressions: of the original, held out from the run; None makes them.
        impressions_per_class: how many to make, fewer with more than 50 classes.
        shots: images a class that relearning may use.
        relearn_steps: most steps; 0 leaves relearning out, None is 100, without all weights where
            that would take minutes on a CPU.
        input_shape, mean, std: see `synthesize`.
        seed: everything random depends on it alone.
        device: where to compute; None for the original's own.
        progress: True, False, or None for "if stderr is a terminal".

    Raises:
        ArgumentError: an argument can't be used.
    """
    for name, value, least in (
        ("impressions_per_class", impressions_per_class, 2),
        ("shots", shots, 1),
        ("relearn_steps", 100 if relearn_steps is None else relearn_steps, 0),
        ("seed", seed, 0),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ArgumentError(name, f"got {value!r}", f"Pass a whole number, {least} or more.")
    where = resolve_device(original, device)
    spec = resolve_spec(original, input_shape, mean, std)
    first = make_audited_model(ORIGINAL, original, spec, where)
    classes = count_classes(first.model, spec, where)
    wanted = check_forget(forget, classes)
    settings = {
        "impressions_per_class": impressions_per_class, "shots": shots,
        "relearn_steps": relearn_steps, "seed": seed, "device": str(where),
        "relearn_goal": GOAL, "input": {"shape": spec.shape, "mean": spec.mean, "std": spec.std},
    }  # fmt: skip
    work = multiply_adds(first.model, torch.zeros(1, *spec.shape, device=where))
    models = {ORIGINAL: original, UNLEARNED: unlearned, GOLDEN: golden}
    hashes = {n: weights_hash(m) for n, m in models.items() if m is not None}
    with Reporter(progress) as report, threads_for(work, where):
        context = AuditContext(first, wanted, classes, spec, seed, work, settings)
        _add(context, UNLEARNED, unlearned)
        if golden is not None:
            _add(context, GOLDEN, golden)
        return _measure(context, data, train_data, impressions, hashes, report)


def _measure(
    context: AuditContext,
    data: Any,
    train_data: Any,
    impressions: ClassImpressions | None,
    hashes: dict[str, str],
    report: Reporter,
) -> Audit:
    timings: dict[str, float] = {}

    @contextmanager
    def part(name: str) -> Iterator[None]:
        report("audit", len(timings), 8)
        started = time.perf_counter()
        yield
        timings[name] = time.perf_counter() - started

    started = time.perf_counter()
    with part("baselines"):
        _add_baselines(context)
    with part("impressions"):
        made = _held_out(context, impressions)
        everyone = ActivationCollector(context.subjects, list(context.variants.values()), len(made))
        held = everyone.look([(made.images, made.labels)])
    with part("agreement and drift"):
        last = data_free_metrics.on_impressions(context, held)
    with part("re-synthesis"):
        data_free_metrics.resynthesise(context)
    seen = held
    if data is not None:
        with part("images"):
            seen, labelled = data_metrics.look(context, data, train_data)
            data_metrics.on_images(context, seen)
        with part("probe"):
            data_metrics.separability(context, labelled)
        if train_data is not None:
            with part("membership"):
                data_metrics.membership_of(context, labelled.train, seen)
        with part("relearning"):
            relearn_all(context, labelled, one_set=train_data is None)
    elif train_data is not None:
        context.notes.append("train_data was given without data, so it was not used")
    top = _top_answers(context, seen)
    _fill_missing(context, data is not None, train_data is not None)
    timings["total"] = time.perf_counter() - started
    rows = [
        context.rows[n] for n in (ORIGINAL, MASK, RANDOM, UNLEARNED, GOLDEN) if n in context.rows
    ]
    evidence = Evidence(rows, last, top.get(UNLEARNED, -1), context.classes, context.forget)
    found, tests = findings(evidence), checks(evidence)
    return Audit(
        sentences(evidence, found, tests), found, tests, rows, context.forget, context.classes,
        context.settings, context.counts, hashes, context.notes, timings, context.pictures, made,
    )  # fmt: skip


def _add(context: AuditContext, name: str, model: nn.Module) -> None:
    """Takes a model in; it has to have the original's logits."""
    subject = make_audited_model(name, model, context.spec, context.device)
    with torch.no_grad():
        logits = subject.model(torch.zeros(2, *context.spec.shape, device=context.device))
    if logits.shape != (2, context.classes):
        raise ArgumentError(
            name,
            f"its logits are {tuple(logits.shape)} for two images",
            f"Pass a model with the original's {context.classes} logits.",
        )
    context.subjects.append(subject)
    context.rows[name] = Row(name)


def _add_baselines(context: AuditContext) -> None:
    context.subjects.append(baselines.masked(context.original, context.forget, context.spec))
    context.rows[MASK] = Row(MASK)
    context.rows[RANDOM] = Row(RANDOM)
    try:
        context.subjects.append(
            baselines.random_embeddings(context.original, context.gone, context.spec, context.seed)
        )
    except ZsuFastError as error:
        for metric in METRICS:
            context.rows[RANDOM].missing[metric.key] = str(error)
    for subject in context.subjects:
        for kind, rows in (("rows", context.forget), ("whole", None)):
            try:
                context.variants[subject.name, kind] = unmasked(
                    subject, context.original, rows, context.classes, context.spec
                )
            except ZsuFastError as error:
                keys = (
                    ("unmask_fa", "unmask_ra", "unmask_impressions_fa",
                     "resynthesis_unmasked_steps")
                    if kind == "rows"
                    else ("whole_head_fa", "whole_head_ra", "whole_head_impressions_fa",
                          "whole_head_impressions_ra")
                )  # fmt: skip
                for key in keys:
                    context.rows[subject.name].missing[key] = str(error)


def _held_out(context: AuditContext, given: ClassImpressions | None) -> ClassImpressions:
    if given is not None:
        if (
            given.space != "input"
            or given.spec.shape != context.spec.shape
            or not bool(context.gone[given.labels].any())
        ):
            raise ArgumentError(
                "impressions",
                f"got {len(given)} of shape {given.spec.shape} in the space {given.space!r}",
                f"Pass some of shape {context.spec.shape}, of forgotten classes among them.",
            )
        return given
    per_class, chosen = context.settings["impressions_per_class"], list(range(context.classes))
    if context.classes > 50:
        per_class = min(per_class, 4)
        chosen = [*context.some(context.forget, 16), *context.some(context.kept, 32)]
        context.notes.append(
            f"impressions of {len(chosen)} of {context.classes} classes, {per_class} each"
        )
    settings = AscentSettings(per_class=per_class, seed=_HELD_OUT_SEED + context.seed)
    space = input_space(context.original.model, context.spec, settings.precision)
    made = ascend(
        context.original.model, space, context.spec, sorted(chosen), settings, Reporter(False)
    )
    context.counts["impressions"] = len(made)
    if made.hit_rate < 0.5:
        context.notes.append(
            f"only {100 * made.hit_rate:.0f} % of the original's impressions reached their "
            f"confidence: what is measured on them says little"
        )
    return made


def _top_answers(context: AuditContext, seen: Activations) -> dict[str, int]:
    """Puts each model's most frequent answer on retained classes; returns it by name."""
    found: dict[str, int] = {}
    retain = ~context.gone[seen.labels]
    if not bool(retain.any()):
        return found
    labels = seen.labels[retain]
    weight = 1 / torch.bincount(labels, minlength=context.classes)[labels].double()
    for subject in context.subjects:
        answers = seen.answers[subject.name][retain]
        total = torch.zeros(context.classes, dtype=torch.float64).index_add_(0, answers, weight)
        share = total / weight.sum()
        found[subject.name] = int(share.argmax())
        context.rows[subject.name].put("top_answer", 100 * float(share.max()))
    return found


def _fill_missing(context: AuditContext, data: bool, train_data: bool) -> None:
    """Gives each metric without a value its reason."""
    for row in context.rows.values():
        for metric in METRICS:
            if metric.key in row.values or metric.key in row.missing:
                continue
            if metric.needs and not data:
                reason = "no images were given (data)"
            elif metric.needs == "train_data" and not train_data:
                reason = (
                    "it compares training images with others, and only one set was given "
                    "(train_data is missing)"
                )
            elif metric.needs == "golden" and GOLDEN not in context.rows:
                reason = "no golden model was given"
            else:
                reason = "the images at hand do not allow it"
            row.missing[metric.key] = reason
