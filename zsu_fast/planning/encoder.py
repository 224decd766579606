"""What forgetting identities of an encoder will cost: single passes are timed, the rest is counted.

Only here, on the device at hand; the row counts and the steps are those that `unlearn` would take.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import ArgumentError
from ..models.input_spec import noise_images
from ..runtime.measuring import PeakMemory, Stopwatch, multiply_adds
from ..runtime.torch_settings import threads_for
from ..synthesis.space import flatten_boundary
from ..training.deep.rows import RowSource
from ..training.deep.split import find_deep_split
from ..training.deep.tail import FrozenClassifierTail
from ..unlearner import ZeroShotUnlearner

_IMAGES = 16  # that a pass is timed on


@dataclass
class EncoderPilot:
    """What was measured.

    Attributes:
        run: the unlearner that would do it.
        tail: the first layer that is trained.
        scenes, inverted: rows of each kind.
        ascent_steps: of an inverted row, at most.
        seconds: by stage.
        row_bytes: of all rows, and their logits.
    """

    run: ZeroShotUnlearner
    tail: str
    scenes: int
    inverted: int
    ascent_steps: int
    seconds: dict[str, float]
    row_bytes: int


def pilot_encoder(
    model: nn.Module, forget: Any, options: dict[str, Any], memory: PeakMemory
) -> EncoderPilot:
    """Times the passes of a run that is not made; the model is not changed.

    Args:
        model: an `EmbeddingClassifier`.
        forget, options: as for `unlearn`.
        memory: measures the peak.

    Raises:
        ArgumentError: an argument can't be used, or a space is given.
    """
    if options.get("space") == "input":
        raise ArgumentError(
            "space", "got 'input' for an encoder", "Leave it out: only the default can be planned."
        )
    quiet = {"progress": False, "callback": None, "inplace": False, "cache": None}
    watch, seconds = Stopwatch(memory.device), {}
    run = ZeroShotUnlearner(model, forget, **options | quiet | {"distributed": False})
    deep = find_deep_split(run.work, run.options.tail, run.spec)
    settings = run.options.deep_settings(
        run.work, run.classes, len(run.active_classes), len(run.forget)
    )
    rows = RowSource(run.work, deep, run.spec, run.forget_mask, settings, run.options.seed)
    seconds["prepare"] = watch.lap()
    counts = rows.counts()
    images = noise_images(run.spec, _IMAGES).to(run.device)
    with threads_for(run.multiply_adds, run.device):
        features = deep.image_features(images)
        with torch.no_grad():
            points = flatten_boundary(deep.early.backbone(images))
        watch.lap()
        deep.image_features(images)
        scene = watch.lap() / _IMAGES
        points.requires_grad_(True)
        torch.autograd.grad(deep.flat(points).sum(), points)
        ascent_step = watch.lap() / _IMAGES
        tail = FrozenClassifierTail(run.work, deep)
        tail(*features).logits.sum().backward()
        watch.lap()
        tail(*features).logits.sum().backward()
        fit_step = watch.lap() / _IMAGES
    work = multiply_adds(deep.split.tail, *[f[:1] for f in features])
    steps, batch = settings.schedule_for(work, run.device)
    steps = min(steps, run.options.loop.steps or steps)
    total = counts.scenes + counts.inverted
    seconds["synthesise"] = scene * counts.scenes
    seconds["synthesise"] += ascent_step * counts.inverted * (settings.ascent_steps + 1)
    seconds["fit"] = fit_step * (steps * (run.options.loop.batch or batch) + total)
    memory.end_stage("passes")
    values = sum(f[0].numel() for f in features) + run.classes
    return EncoderPilot(
        run, deep.split.name, counts.scenes, counts.inverted, settings.ascent_steps, seconds,
        2 * 4 * total * values + 4 * counts.scenes * points.shape[1],
    )  # fmt: skip
