"""Relearn time of every model, and its ratio to the golden model's."""

from __future__ import annotations

import torch
from torch import Tensor

from .context import AuditContext, Labelled
from .relearn import BATCH, Relearned, RelearnTask, relearn, start_of
from .result import GOLDEN, ORIGINAL

# Relearning all weights is left out on a CPU above so many multiply-adds a model.
_RELEARN_WORK = 2e12
# FA that counts as relearned, as a share of the original's: alpha = 20 % in 2201.05629's terms.
# At 0.5 to 0.7 the first steps, which all models need, hide the difference between a model that
# saw the classes and one that did not; at 0.9 the original itself needs luck (on CIFAR-10).
GOAL = 0.8
# Relearning at least this share of the golden model's steps passes.
AIN = 0.5
# Forgotten and other classes that take part at most, drawn by the seed.
RELEARNED = 20


def relearn_all(context: AuditContext, at: Labelled, one_set: bool) -> None:
    """Puts relearn times and Anamnesis Indices on every row."""
    most = context.settings["relearn_steps"]
    keys = [f"{a}_{b}" for a in ("relearn_head", "relearn_full") for b in ("steps", "fa")]
    keys += ["ain_head", "ain_full"]
    lesson: RelearnTask | str = "relearn_steps=0 leaves it out"
    if most != 0:
        lesson = _lesson(context, at, 100 if most is None else most, one_set)
    if isinstance(lesson, str):
        for subject in context.subjects:
            for key in keys:
                context.rows[subject.name].put(key, None, lesson)
        return
    work = 3 * context.work * BATCH * lesson.most
    costly = most is None and context.device.type == "cpu" and work > _RELEARN_WORK
    for kind in ("head", "full"):
        counted: dict[str, int | None] = {}
        memo: dict[str, Relearned] = {}
        for subject in context.subjects:
            row = context.rows[subject.name]
            if kind == "full" and costly:
                for key in ("relearn_full_steps", "relearn_full_fa", "ain_full"):
                    row.put(
                        key, None,
                        f"it would take {work:.1e} multiply-adds a model on a CPU; ask for it "
                        f"by relearn_steps=100",
                    )  # fmt: skip
                continue
            key = start_of(subject, context.forget)  # a mask starts where the original does
            if key not in memo:
                memo[key] = relearn(subject, lesson, everything=kind == "full")
            done = memo[key]
            counted[subject.name] = done.steps
            row.relearning[kind] = done.curve
            row.put(f"relearn_{kind}_steps", done.steps or lesson.most)
            row.put(f"relearn_{kind}_fa", done.accuracy)
        _anamnesis(context, kind, counted, lesson.most)


def _anamnesis(context: AuditContext, kind: str, counted: dict[str, int | None], most: int) -> None:
    golden = counted.get(GOLDEN)
    for name, steps in counted.items():
        row = context.rows[name]
        if GOLDEN not in counted:
            continue
        if name == GOLDEN:
            row.put(f"ain_{kind}", 1.0)
        elif steps is None and golden is None:
            row.put(
                f"ain_{kind}",
                None,
                f"neither it nor the golden model relearned in {most} steps",
            )
        elif golden is None and (steps or most) >= AIN * most:
            row.put(
                f"ain_{kind}",
                None,
                f"the golden model did not relearn in {most} steps, so the index may lie on either "
                f"side of {AIN}; raise relearn_steps, and shots (of few images it may never learn)",
            )
        else:
            row.put(f"ain_{kind}", (steps or most) / (golden or most))
    if golden is None and GOLDEN in counted:
        context.notes.append(
            f"the golden model did not relearn within {most} steps ({kind}): indices are at "
            f"most what is shown"
        )


def _lesson(context: AuditContext, at: Labelled, most: int, one_set: bool) -> RelearnTask | str:
    """What relearning is taught and tested on, or why there is nothing."""
    shots, wanted = context.settings["shots"], context.some(context.forget, RELEARNED)
    source, target = at.train, at.test
    source_labels, target_labels = (
        source.labels[source.pictured],
        target.labels[target.pictured],
    )
    teach: list[Tensor] = []
    test: list[Tensor] = []
    for c in source_labels.unique().tolist():
        rows = (source_labels == c).nonzero()[:, 0]
        if one_set and context.gone[c]:
            count = min(shots, len(rows) // 2)
            teach.append(rows[:count])
            test.append(rows[count:])
        else:
            teach.append(rows[:shots])
    if not one_set:
        test = [context.gone[target_labels].nonzero()[:, 0]]
    taught = source_labels[torch.cat(teach)] if teach else torch.zeros(0, dtype=torch.int64)
    if not set(wanted) <= set(taught.tolist()) or not test or not len(torch.cat(test)):
        return "too few images: it takes shots of each forgotten class and others to test on"
    evaluation = context.rows[ORIGINAL].evaluation
    assert evaluation is not None  # there are images
    before = sum(evaluation.per_class.get(c, 0.0) for c in wanted) / len(wanted)
    if not before:
        return "the original has no FA to get back to"
    context.settings["shots_used"] = min(
        int(n) for n in torch.bincount(taught)[torch.tensor(wanted)]
    )
    tested = torch.cat(test)
    return RelearnTask(
        source.images[torch.cat(teach)], taught, target.images[tested], target_labels[tested],
        context.forget, GOAL * before, most, context.seed, context.spec,
    )  # fmt: skip
