"""Class impressions: images that the model takes for a class, made from noise by gradient ascent.

Mopuri et al., "Ask, Acquire, and Attack" (2018); the paper's section 4.1, equation 3. Unlike
there, each impression stops at a confidence of its own: an image pushed until ``p = 1`` has a
cross-entropy gradient of exactly 0 and teaches the tail nothing.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models.class_indices import check_classes
from ..models.infer_spec import resolve_spec
from ..models.input_spec import InputSpec
from ..models.parameters import weights_hash
from ..models.wrapper import count_classes, resolve_device, working_copy
from ..runtime import memory
from ..runtime.distributed import Ranks, make_shards, ranks_here
from ..runtime.events import Callback, Stopped
from ..runtime.flops import multiply_adds
from ..runtime.precision import Precision
from ..runtime.progress import Reporter
from ..runtime.threads import threads_for
from ..runtime.torch_defaults import torch_defaults
from .ascent import Ascent, AscentResult, AscentSettings
from .batch_norm_prior import check_batch_norm, with_statistics
from .cache import Cache
from .impressions import ClassImpressions
from .space import SearchSpace, input_space

# A working batch holds at most this many values: 1,365 images of 3x32x32, 27 of 3x224x224.
_BATCH_VALUES = 4 * 1024 * 1024
# On a GPU, which is idle with less, so many times as many: 445 images of 3x224x224, if they fit.
_GPU_VALUES = 16
# And at most this many logits: of 100,000 classes 167 rows.
_BATCH_LOGITS = 16 * 1024 * 1024
# On a CPU what a working batch holds should fit in its cache, or be no more than the weights that
# are read for it; but so many rows at least.
_CACHE_BYTES, _FEWEST = 24 * 1024 * 1024, 8
# A shard, made without a look at any other, is at most this many working batches.
BATCHES_PER_SHARD = 4
_log = logging.getLogger(__name__)


@torch_defaults()
def synthesize(
    model: nn.Module,
    classes: Any = None,
    *,
    per_class: int = 32,
    confidence: tuple[float, float] | None = (0.55, 0.99),
    max_steps: int = 100,
    restarts: int = 2,
    step_size: float = 0.01,
    beta: float = 1e-4,
    input_shape: Sequence[int] | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    seed: int = 0,
    precision: Precision = "auto",
    device: str | torch.device | None = None,
    batch_norm: float = 0.0,
    cache: str | Path | None = None,
    progress: bool | None = None,
    callback: Callback | None = None,
) -> ClassImpressions:
    """Makes class impressions of ``model`` by gradient ascent on ``logit_c(x) - beta*||x||^2``.

    Args:
        model: any image classifier; it is not changed.
        classes: class indices (as for ``unlearn``'s forget); None for all.
        per_class: impressions of each class, 1 or more.
        confidence: each impression stops at a target drawn from this uniform range; None runs
            all ``max_steps`` steps (the published recipe).
        max_steps: most ascent steps of one attempt.
        restarts: further attempts, from new noise, of an impression that misses its target; they
            push the other classes' logits down too.
        step_size: Adam's learning rate, in units of the valid pixel range.
        beta: weight of the squared norm.
        input_shape, mean, std: see `resolve_spec`; inferred where None.
        seed: the noise and targets of impression i depend on (seed, class, i) alone.
        precision: of convolutions and products: "float32", "bfloat16", or "auto": bfloat16
            where the device computes in it.
        device: where to compute; None for the model's own.
        batch_norm: weight of the distance of the batch's feature statistics from those that the
            model's BatchNorm layers saw in training (`priors.BatchNormDistance`).
        cache: folder in which finished impressions are kept; a run that was cut off goes on
            there, and the same call finds them all. None keeps nothing.
        progress, callback: see `Reporter`.

    Returns:
        The impressions, sorted by class, on the CPU.

    Raises:
        ArgumentError: an argument can't be used (a `ValueError`).
    """
    settings = AscentSettings(
        per_class, confidence, max_steps, restarts, step_size, beta, seed, precision,
        batch_norm,
    )  # fmt: skip
    where = resolve_device(model, device)
    spec = resolve_spec(model, input_shape, mean, std)
    copied = working_copy(model, where)
    total = count_classes(copied, spec, where)
    chosen = list(range(total)) if classes is None else check_classes("classes", classes, total)
    with Reporter(progress, callback) as report:
        space = input_space(copied, spec, precision)
        return ascend(copied, space, spec, chosen, settings, report, cache)


def batch_rows(space: SearchSpace, processes: int = 1) -> tuple[int, int]:
    """Rows of a shard, by the space alone, and of a working batch, by cache and free memory too.

    Args:
        space: where they climb.
        processes: so many share a CPU's memory.
    """
    start = space.start(torch.zeros(1, *space.shape, device=space.low.device))
    with torch.no_grad():
        logits = space.exact(start).shape[1]
    values = _BATCH_VALUES * (_GPU_VALUES if start.device.type == "cuda" else 1)
    most = max(16, min(values // start.numel(), _BATCH_LOGITS // logits))
    row = memory.bytes_per_row(space.fast_model, start)
    fit = memory.rows_that_fit(row, space.low.device, processes)
    if start.device.type == "cpu":
        weights = sum(p.nbytes for p in space.fast_model.model.parameters())
        fit = min(fit, max(_FEWEST, max(_CACHE_BYTES, weights) // row))
    return BATCHES_PER_SHARD * most, min(most, fit)


def ascend(
    model: nn.Module,
    space: SearchSpace,
    spec: InputSpec,
    classes: Sequence[int],
    settings: AscentSettings,
    report: Reporter,
    cache: str | Path | None = None,
    starts: Tensor | None = None,
    ranks: Ranks | None = None,
) -> ClassImpressions:
    """`synthesize` in a `SearchSpace`, shard by shard; from ``starts`` [N, ...] instead of noise.

    All classes of a shard share one batch; rows that are done leave it. How many rows go at once
    is measured (`memory.rows_that_fit`), and halved where memory runs out all the same. The ranks
    of a ``ranks`` share the work, in smaller shards, and each gets all impressions.
    """
    check_batch_norm(space, settings.batch_norm)
    if settings.batch_norm:
        space = with_statistics(space)
    device = space.low.device
    labels = torch.tensor(list(classes)).repeat_interleave(settings.per_class)
    number = torch.arange(settings.per_class).repeat(len(classes))
    start = space.start(torch.zeros(1, *space.shape, device=device))
    ranks = ranks or Ranks()
    shard_rows, width = batch_rows(space, 1 if ranks.single else ranks_here())
    work = multiply_adds(space.exact, start)
    if ranks.single:
        layout = {"rows a shard": shard_rows}
        shards = list(torch.arange(len(labels)).split(shard_rows))
    else:
        shards = make_shards(len(labels), shard_rows, work, device)
        layout = {"make_shards": len(shards)}
    kept = None
    if cache is not None:
        facts = _facts(model, space, spec, labels, settings)
        kept = Cache(cache, facts | layout)
    parts, rows = [AscentResult.none(space.shape)], [torch.empty(0, dtype=torch.int64)]
    with threads_for(work, device):
        for at in ranks.claim_shards(len(shards)):
            shard, done = shards[at], sum(map(len, shards[:at]))
            found = kept.load(at) if kept else None
            if found is not None:
                parts.append(AscentResult(**found))
                rows.append(shard)
                continue
            while True:
                climb = Ascent(
                    space, labels[shard], number[shard], settings, width,
                    None if starts is None else starts[shard],
                )  # fmt: skip
                try:
                    parts.append(climb.run(report, done, len(labels)))
                    rows.append(shard)
                except Stopped:
                    parts.append(climb.result())
                    rows.append(shard[climb.hit])
                    return joined(parts, rows, spec, space, ranks)
                except (RuntimeError, MemoryError) as error:
                    if not memory.is_out_of_memory(error) or climb.width == 1:
                        raise
                    width = max(1, climb.width // 2)
                    _log.warning("out of memory: impressions go on with %d rows at a time", width)
                    continue
                break
            if kept:
                kept.save(at, vars(parts[-1]))
    return joined(parts, rows, spec, space, ranks)


def joined(
    parts: list[AscentResult], rows: list[Tensor], spec: InputSpec, space: SearchSpace, ranks: Ranks
) -> ClassImpressions:
    """All parts of all ranks, in the order of their ``rows``."""
    columns = {
        name: torch.cat([getattr(p, name) for p in parts])
        for name in AscentResult.__dataclass_fields__
    }
    if not ranks.single:
        columns = ranks.gather(columns | {"rows": torch.cat(rows)})
        order = columns.pop("rows").argsort()
        columns = {name: column[order] for name, column in columns.items()}
    return ClassImpressions(images=columns.pop("points"), **columns, spec=spec, space=space.name)


def _facts(
    model: nn.Module, space: SearchSpace, spec: InputSpec, labels: Tensor, settings: AscentSettings
) -> dict[str, Any]:
    """What impressions depend on, for the cache."""
    return {
        "format": 1,
        "weights": weights_hash(model),
        "layers": re.sub(r" at 0x[0-9a-f]+", "", repr(model)),  # less the addresses of functions
        "space": [space.name, list(space.shape), space.cut],
        "computed": [
            str(space.fast_model.dtype),
            space.fast_model.channels_last,
            space.fast_model.folded,
        ],
        "spec": [spec.shape, spec.mean, spec.std],
        "settings": asdict(settings),
        "classes": labels.unique().tolist(),
        "torch": torch.__version__,
        "device": space.low.device.type,
    }
