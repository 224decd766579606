"""Class impressions: images that the model assigns to a class, by gradient ascent from noise.

Mopuri et al., "Ask, Acquire, and Attack" (2018); the paper's section 4.1, equation 3. Unlike
there, each impression stops at a confidence of its own: an image that was pushed until ``p = 1``
has a cross-entropy gradient of exactly 0, from which the tail learns nothing.
"""

from __future__ import annotations

import logging
import platform
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models.class_indices import check_classes
from ..models.labels import known_labels
from ..models.outputs import OutputChoice
from ..models.parameters import weights_hash
from ..models.prepare import prepare_model
from ..runtime import memory
from ..runtime.allocator import keep_freed_memory
from ..runtime.cuda_graph import Loop
from ..runtime.distributed import Ranks, make_shards, ranks_here
from ..runtime.measuring import multiply_adds
from ..runtime.progress import Callback, Reporter, Stopped
from ..runtime.torch_settings import SMALL, Precision, threads_for, torch_defaults
from . import candidates
from .ascent import Ascent, AscentResult
from .ascent_settings import AscentSettings, BatchLimits
from .batch_norm_prior import with_batch_norm_prior
from .cache import Cache
from .impressions import ClassImpressions
from .space import SearchSpace, input_space
from .step_graph import StepGraph

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
    output: OutputChoice | None = None,
    seed: int = 0,
    precision: Precision = "auto",
    device: str | torch.device | None = None,
    batch_norm: float = 0.0,
    cache: str | Path | None = None,
    progress: bool | None = None,
    callback: Callback | None = None,
    multi_label: bool | None = None,
    loop: Loop = "auto",
) -> ClassImpressions:
    """Synthesises class impressions of ``model`` by ascent on ``logit_c(x) - beta * ||x||^2``.

    Args:
        model: any image classifier; it is not changed.
        classes: class indices (as ``unlearn``'s forget); None for all.
        per_class, confidence, max_steps, restarts, step_size, beta: see `AscentSettings`.
        seed, precision, batch_norm, loop: see `AscentSettings`.
        input_shape, mean, std: see `resolve_spec`; inferred if None.
        output: which item of the model's output holds the logits, see `pick_logits`.
        device: where to compute; None for the model's own.
        cache: folder for finished impressions: a run that was interrupted resumes there, and the
            same call finds all of them. None stores nothing.
        progress, callback: see `Reporter`.
        multi_label: whether each class has a sigmoid of its own; None: see `find_multi_label`.

    Returns:
        The impressions, sorted by class, on the CPU.

    Raises:
        ArgumentError: an argument can't be used (a `ValueError`).
    """
    settings = AscentSettings(
        per_class, confidence, max_steps, restarts, step_size, beta, seed, precision, batch_norm,
        loop=loop,
    )  # fmt: skip
    report = Reporter(progress, callback)
    prepared = prepare_model(model, device, input_shape, mean, std, output, multi_label)
    settings = replace(settings, multi_label=prepared.multi_label)
    chosen = list(range(prepared.classes))
    if classes is not None:
        chosen = check_classes(
            "classes", classes, prepared.classes, known_labels(model, prepared.classes)
        )
    with report:
        space = input_space(prepared.model, prepared.spec, precision)
        return ascend(prepared.model, space, chosen, settings, report, cache)


def ascend(
    model: nn.Module,
    space: SearchSpace,
    classes: Sequence[int],
    settings: AscentSettings,
    report: Reporter,
    cache: str | Path | None = None,
    init: Tensor | None = None,
    ranks: Ranks | None = None,
) -> ClassImpressions:
    """Synthesises impressions in ``space``, shard by shard.

    All classes of a shard share a working batch. Its size is measured (`batch_rows`), and halved
    if memory runs out all the same. The ranks share the work, in smaller shards, and each of them
    gets all impressions.

    Args:
        model: the whole model, for the key of the cache.
        space: where the impressions lie.
        classes: class indices, sorted.
        settings: how they ascend.
        report: if its callback stops the ascent, the points that have reached their target stay.
        cache: see `synthesize`.
        init: where the impressions start, [N, *space.shape] in the order of the classes; None for
            noise.
        ranks: the ranks that make this call; None for this process alone.

    Raises:
        ArgumentError: ``settings.batch_norm`` does not suit ``space``, or ``cache`` is no path.
    """
    ranks = ranks or Ranks()
    space = with_batch_norm_prior(space, settings.batch_norm)
    labels = torch.tensor(list(classes)).repeat_interleave(settings.per_class)
    number = torch.arange(settings.per_class).repeat(len(classes))
    shard_rows, width = batch_rows(space, settings.limits, 1 if ranks.single else ranks_here())
    work = multiply_adds(space.exact, space.one_point())
    choice = candidates.Choice(candidates.DEFAULT, width)
    timed = ranks.single and candidates.may_choose(space, work)
    if timed:
        choice = _choose(space, _facts(model, space, labels, settings), settings, width, cache)
        space = candidates.apply(choice, space, settings.precision)
    if ranks.single:
        shards = list(torch.arange(len(labels)).split(shard_rows))
    else:
        shards = make_shards(len(labels), shard_rows, work, space.low.device)
    store = None
    if cache is not None:
        # renaming a key would make existing caches unreadable
        layout = {"rows a shard": shard_rows} if ranks.single else {"pieces": len(shards)}
        store = Cache(cache, _facts(model, space, labels, settings) | layout | choice.facts())
    ascents = _ShardAscents(space, labels, number, settings, report, init, choice.rows)
    with threads_for(work, space.low.device), _allocation(work, space.low.device):
        finished = _run_shards(ascents, shards, ranks, store)
    impressions = _gather(finished, space, ranks)
    impressions.computed = str(choice) if timed else ""
    return impressions


def _run_shards(
    ascents: _ShardAscents, shards: Sequence[Tensor], ranks: Ranks, store: Cache | None
) -> list[_Shard]:
    """Runs the shards that this rank claims, or loads them, until the callback stops one."""
    finished = [_Shard(torch.empty(0, dtype=torch.int64), AscentResult.empty(ascents.space.shape))]
    for i in ranks.claim_shards(len(shards)):
        stored = store.load(i) if store else None
        if stored is not None:
            finished.append(_Shard(shards[i], AscentResult(**stored)))
            continue
        finished.append(ascents.run(shards[i], before=sum(map(len, shards[:i]))))
        if finished[-1].stopped:
            break
        if store:
            store.save(i, vars(finished[-1].result))
    return finished


def _choose(
    space: SearchSpace,
    facts: dict[str, Any],
    settings: AscentSettings,
    width: int,
    cache: str | Path | None,
) -> candidates.Choice:
    """The fastest way to compute the steps on this machine, or the one of the run before."""
    points = len(facts["classes"]) * settings.per_class
    width = min(width, points)
    row = space.bytes_per_row()
    most = min(points, memory.rows_that_fit(row, space.low.device))

    def timed() -> candidates.Choice:
        with keep_freed_memory():
            return candidates.choose(space, width, most, points, settings.precision)

    facts = facts | {"processor": platform.processor(), "threads": torch.get_num_threads()}
    choice = candidates.remembered(cache, facts, timed)
    _log.info("impressions are computed by: %s", choice)
    return replace(choice, rows=min(choice.rows, most))


def _allocation(work: int, device: torch.device) -> AbstractContextManager[None]:
    """Small models, whose activations fit in any heap, need nothing."""
    return keep_freed_memory() if device.type == "cpu" and work > SMALL else nullcontext()


def batch_rows(
    space: SearchSpace, limits: BatchLimits | None = None, processes: int = 1
) -> tuple[int, int]:
    """Rows of a shard, which depend on the space alone, and of a working batch, which depend on
    cache and free memory too.

    Args:
        space: where the rows ascend.
        limits: None for the defaults.
        processes: how many share a CPU's memory.
    """
    limits = limits or BatchLimits()
    start = space.one_point()
    with torch.no_grad():
        logits = space.exact(start).shape[1]
    values = limits.values * (limits.gpu_factor if start.device.type == "cuda" else 1)
    most = max(16, min(values // start.numel(), limits.logits // logits))
    row = space.bytes_per_row()
    fit = memory.rows_that_fit(row, space.low.device, processes)
    if start.device.type == "cpu":
        weights = sum(p.nbytes for p in space.fast_model.module.parameters())
        fit = min(fit, max(limits.min_rows, max(limits.cache_bytes, weights) // row))
    if (block := space.fast_model.block) > 1:
        fit = block * max(1, min(fit // block, limits.blocks))
    return limits.batches_per_shard * most, min(most, fit)


@dataclass
class _Shard:
    """Impressions ``rows``, int64 [N], whose ascent has ended; ``stopped``: early, by the callback,
    and only impressions that had reached their target are here.
    """

    rows: Tensor
    result: AscentResult
    stopped: bool = False


@dataclass
class _ShardAscents:
    """Runs the ascents of shards, one after the other, with at most ``width`` rows at a time."""

    space: SearchSpace
    labels: Tensor
    number: Tensor
    settings: AscentSettings
    report: Reporter
    init: Tensor | None
    width: int

    def __post_init__(self) -> None:
        self.graph = StepGraph(self.settings.loop, self.space.low.device)

    def run(self, rows: Tensor, before: int) -> _Shard:
        """Runs the ascent of impressions ``rows``, which ``before`` others precede.

        Whenever memory runs out, it halves ``width``, for the shards to come too.
        """
        while True:
            init = None if self.init is None else self.init[rows]
            ascent = Ascent(
                self.space, self.labels[rows], self.number[rows], self.settings, self.width, init,
                self.graph,
            )  # fmt: skip
            try:
                return _Shard(rows, ascent.run(self.report, before, len(self.labels)))
            except Stopped:
                return _Shard(rows[ascent.hit], ascent.result(), stopped=True)
            except (RuntimeError, MemoryError) as error:
                if not memory.is_out_of_memory(error) or ascent.width == 1:
                    raise
                self.graph.forget()
                self.width = ascent.width // 2
                _log.warning("out of memory: impressions go on with %d rows at a time", self.width)


def _gather(shards: list[_Shard], space: SearchSpace, ranks: Ranks) -> ClassImpressions:
    """The impressions of all shards of all ranks, in the order of their numbers."""
    columns = {
        field.name: torch.cat([getattr(shard.result, field.name) for shard in shards])
        for field in fields(AscentResult)
    }
    if not ranks.single:
        columns = ranks.gather(columns | {"rows": torch.cat([shard.rows for shard in shards])})
        order = columns.pop("rows").argsort()
        columns = {name: column[order] for name, column in columns.items()}
    return to_impressions(AscentResult(**columns), space)


def to_impressions(result: AscentResult, space: SearchSpace) -> ClassImpressions:
    columns = dict(vars(result))
    return ClassImpressions(
        images=columns.pop("points"), **columns, spec=space.spec, space=space.name
    )


def _facts(
    model: nn.Module, space: SearchSpace, labels: Tensor, settings: AscentSettings
) -> dict[str, Any]:
    """Everything that the impressions depend on, for the cache."""
    copied, spec = space.fast_model, space.spec
    return {
        "format": 1,
        "weights": weights_hash(model),
        "layers": re.sub(r" at 0x[0-9a-f]+", "", repr(model)),  # without addresses of functions
        "space": [space.name, list(space.shape), space.split_name],
        # a longer list for those in blocks keeps the keys of the others
        "computed": [str(copied.dtype), copied.channels_last, copied.folded]
        + [copied.block] * (copied.block > 1),
        "spec": [spec.shape, spec.mean, spec.std],
        "settings": settings.facts(),
        "classes": labels.unique().tolist(),
        "torch": torch.__version__,
        "device": space.low.device.type,
    }
