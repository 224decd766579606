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
from ...synthesis.ascent_settings import AscentSettings
from ...synthesis.impressions import ClassImpressions
from ...synthesis.space import input_space
from ...synthesis.synthesize import ascend
from . import baselines, with_data, without_data
from .case import Case
from .metrics import METRICS
from .observe import Observer, Seen
from .relearning import GOAL, relearn_all
from .result import GOLDEN, MASK, ORIGINAL, RANDOM, UNLEARNED, Audit, Row
from .subject import make_subject
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
    first = make_subject(ORIGINAL, original, spec, where)
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
        case = Case(first, wanted, classes, spec, seed, work, settings)
        _add(case, UNLEARNED, unlearned)
        if golden is not None:
            _add(case, GOLDEN, golden)
        return _measure(case, data, train_data, impressions, hashes, report)


def _measure(
    case: Case,
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
        _add_baselines(case)
    with part("impressions"):
        made = _held_out(case, impressions)
        everyone = Observer(case.subjects, list(case.variants.values()), len(made))
        held = everyone.look([(made.images, made.labels)])
    with part("agreement and drift"):
        last = without_data.on_impressions(case, held)
    with part("re-synthesis"):
        without_data.resynthesise(case)
    seen = held
    if data is not None:
        with part("images"):
            seen, labelled = with_data.look(case, data, train_data)
            with_data.on_images(case, seen)
        with part("probe"):
            with_data.separability(case, labelled)
        if train_data is not None:
            with part("membership"):
                with_data.membership_of(case, labelled.train, seen)
        with part("relearning"):
            relearn_all(case, labelled, one_set=train_data is None)
    elif train_data is not None:
        case.notes.append("train_data was given without data, so it was not used")
    top = _top_answers(case, seen)
    _fill_missing(case, data is not None, train_data is not None)
    timings["total"] = time.perf_counter() - started
    rows = [case.rows[n] for n in (ORIGINAL, MASK, RANDOM, UNLEARNED, GOLDEN) if n in case.rows]
    evidence = Evidence(rows, last, top.get(UNLEARNED, -1), case.classes, case.forget)
    found, tests = findings(evidence), checks(evidence)
    return Audit(
        sentences(evidence, found, tests), found, tests, rows, case.forget, case.classes,
        case.settings, case.counts, hashes, case.notes, timings, case.pictures, made,
    )  # fmt: skip


def _add(case: Case, name: str, model: nn.Module) -> None:
    """Takes a model in; it has to have the original's logits."""
    subject = make_subject(name, model, case.spec, case.device)
    with torch.no_grad():
        logits = subject.model(torch.zeros(2, *case.spec.shape, device=case.device))
    if logits.shape != (2, case.classes):
        raise ArgumentError(
            name,
            f"its logits are {tuple(logits.shape)} for two images",
            f"Pass a model with the original's {case.classes} logits.",
        )
    case.subjects.append(subject)
    case.rows[name] = Row(name)


def _add_baselines(case: Case) -> None:
    case.subjects.append(baselines.masked(case.original, case.forget, case.spec))
    case.rows[MASK] = Row(MASK)
    case.rows[RANDOM] = Row(RANDOM)
    try:
        case.subjects.append(
            baselines.random_embeddings(case.original, case.gone, case.spec, case.seed)
        )
    except ZsuFastError as error:
        for metric in METRICS:
            case.rows[RANDOM].missing[metric.key] = str(error)
    for subject in case.subjects:
        for kind, rows in (("rows", case.forget), ("whole", None)):
            try:
                case.variants[subject.name, kind] = unmasked(
                    subject, case.original, rows, case.classes, case.spec
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
                    case.rows[subject.name].missing[key] = str(error)


def _held_out(case: Case, given: ClassImpressions | None) -> ClassImpressions:
    if given is not None:
        if (
            given.space != "input"
            or given.spec.shape != case.spec.shape
            or not bool(case.gone[given.labels].any())
        ):
            raise ArgumentError(
                "impressions",
                f"got {len(given)} of shape {given.spec.shape} in the space {given.space!r}",
                f"Pass some of shape {case.spec.shape}, of forgotten classes among them.",
            )
        return given
    per_class, chosen = case.settings["impressions_per_class"], list(range(case.classes))
    if case.classes > 50:
        per_class = min(per_class, 4)
        chosen = [*case.some(case.forget, 16), *case.some(case.kept, 32)]
        case.notes.append(
            f"impressions of {len(chosen)} of {case.classes} classes, {per_class} each"
        )
    settings = AscentSettings(per_class=per_class, seed=_HELD_OUT_SEED + case.seed)
    space = input_space(case.original.model, case.spec, settings.precision)
    made = ascend(case.original.model, space, sorted(chosen), settings, Reporter(False))
    case.counts["impressions"] = len(made)
    if made.hit_rate < 0.5:
        case.notes.append(
            f"only {100 * made.hit_rate:.0f} % of the original's impressions reached their "
            f"confidence: what is measured on them says little"
        )
    return made


def _top_answers(case: Case, seen: Seen) -> dict[str, int]:
    """Puts each model's most frequent answer on retained classes; returns it by name."""
    found: dict[str, int] = {}
    retain = ~case.gone[seen.labels]
    if not bool(retain.any()):
        return found
    labels = seen.labels[retain]
    weight = 1 / torch.bincount(labels, minlength=case.classes)[labels].double()
    for subject in case.subjects:
        answers = seen.answers[subject.name][retain]
        total = torch.zeros(case.classes, dtype=torch.float64).index_add_(0, answers, weight)
        share = total / weight.sum()
        found[subject.name] = int(share.argmax())
        case.rows[subject.name].put("top_answer", 100 * float(share.max()))
    return found


def _fill_missing(case: Case, data: bool, train_data: bool) -> None:
    """Gives each metric without a value its reason."""
    for row in case.rows.values():
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
            elif metric.needs == "golden" and GOLDEN not in case.rows:
                reason = "no golden model was given"
            else:
                reason = "the images at hand do not allow it"
            row.missing[metric.key] = reason
