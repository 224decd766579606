"""`synthesize` with limits for the working batch other than the defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from zsu_fast import ClassImpressions
from zsu_fast.models.infer_spec import resolve_spec
from zsu_fast.runtime.progress import Reporter
from zsu_fast.synthesis.ascent_settings import AscentSettings, BatchLimits
from zsu_fast.synthesis.synthesize import synthesize_images

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
    spec = resolve_spec(model, None, mean, std)
    return synthesize_images(
        model, classes, spec, torch.device("cpu"), AscentSettings(**settings, limits=limits),
        Reporter(False, callback), cache,
    )  # fmt: skip
