"""`synthesize` with limits for the working batch other than the defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from zsu_fast import ClassImpressions
from zsu_fast.models.prepare import prepare_model
from zsu_fast.runtime.progress import Reporter
from zsu_fast.synthesis.ascent_settings import AscentSettings, BatchLimits
from zsu_fast.synthesis.space import input_space
from zsu_fast.synthesis.synthesize import ascend

# 16 rows per working batch, which is the least, and per shard
SMALL = BatchLimits(values=1, batches_per_shard=1)


def synthesize_limited(
    limits: BatchLimits,
    model: nn.Module,
    classes: Any = None,
    *,
    mean: Any = None,
    std: Any = None,
    cache: Path | str | None = None,
    callback: Any = None,
    **settings: Any,
) -> ClassImpressions:
    prepared = prepare_model(model, "cpu", None, mean, std)
    ascent = AscentSettings(**settings, limits=limits)
    report = Reporter(False, callback)
    with report:
        space = input_space(prepared.model, prepared.spec, ascent.precision)
        chosen = range(prepared.classes) if classes is None else classes
        return ascend(prepared.model, space, chosen, ascent, report, cache)
