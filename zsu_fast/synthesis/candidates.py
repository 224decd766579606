"""Chooses how the ascent computes its steps, by timing them on this machine.

`inference_copy` accepts a change if the function stays the same; whether it is faster depends on
processor, library and model. Here some variants of the copy and of the batch are timed on one step
each, in turn. The copy that is the default is left only for one that is faster by a clear margin.
"""

from __future__ import annotations

import copy
import json
import logging
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import ArgumentError
from ..models.wrapper import LogitsModel
from ..runtime.torch_settings import SMALL, Precision
from .cache import Cache
from .fuse_convs import fuse_convs
from .inference_copy import InferenceCopy, inference_copy, is_equivalent
from .space import SearchSpace

_log = logging.getLogger(__name__)

DEFAULT = "default"
# Relative to the default, below which another candidate is taken.
MARGIN = 0.9
_ROUNDS = 3
_STEPS = 20  # that a point takes, about
_LEAST_SECONDS, _SHARE = 1.0, 0.02  # that timing may take: the larger one
_FORMAT = 1  # of stored choices
_ROWS = (4, 16)  # batches that are timed besides the default one


@dataclass(frozen=True)
class Choice:
    """How the steps are computed.

    Attributes:
        variant: a name in `variants`.
        rows: of the working batch.
        ratio: time of an image-step, relative to the default; 1 for the default itself.
    """

    variant: str
    rows: int
    ratio: float = 1.0

    def facts(self) -> dict[str, str]:
        """For the cache's key; {} for the default, so that existing caches stay valid."""
        return {} if self.variant == DEFAULT else {"variant": self.variant}

    def __str__(self) -> str:
        if self.variant == DEFAULT and self.ratio == 1:
            return f"{DEFAULT}, batches of {self.rows}"
        return f"{self.variant}, batches of {self.rows}: {self.ratio:.2f} of the default's time"


def variants(precision: Precision) -> dict[str, Callable[[SearchSpace], InferenceCopy | None]]:
    """What is timed, by name: each makes its copy, or None where it is the default's."""
    found: dict[str, Callable[[SearchSpace], InferenceCopy | None]] = {
        DEFAULT: lambda space: space.fast_model,
        "fused convolutions": _fused,
        "without channels-last": _contiguous,
    }
    if precision == "auto":
        found["float32"] = _float32
    found["winograd convolutions"] = _winograd  # the last: stored choices name variants by number
    return found


def may_choose(space: SearchSpace, work: int) -> bool:
    """Whether candidates are timed: for images on a CPU, and a model of more than `SMALL`
    multiply-adds. This depends on the model alone.
    """
    on_cpu = space.low.device.type == "cpu"
    return on_cpu and work > SMALL and space.name == "input" and space.regulariser is None


def remembered(
    cache: str | Path | None, facts: dict[str, Any], make: Callable[[], Choice]
) -> Choice:
    """The choice of an earlier run with the same ``facts`` in folder ``cache``, or a new one that
    is stored there: a run that resumes computes as before it was interrupted.
    """
    store = None if cache is None else Cache(cache, facts | {"choice": _FORMAT})
    stored = store.load(0) if store else None
    if stored is not None:
        return _decoded(stored)
    choice = make()
    if store:
        number = list(variants("auto")).index(choice.variant)
        values = {"variant": number, "rows": choice.rows, "ratio": choice.ratio}
        store.save(0, {name: torch.tensor(value) for name, value in values.items()})
    return choice


def _decoded(stored: dict[str, Tensor]) -> Choice:
    names = list(variants("auto"))
    return Choice(names[int(stored["variant"])], int(stored["rows"]), float(stored["ratio"]))


def stored_choices(cache: str | Path) -> list[tuple[Choice, dict[str, Any]]]:
    """The choices in folder ``cache``, each with the facts that it was made for.

    Raises:
        ArgumentError: there is no such folder.
    """
    if not Path(cache).is_dir():
        raise ArgumentError(
            "cache", f"got {str(cache)!r}, which is no folder", "Pass the cache= of a run."
        )
    found = []
    for path in sorted(Path(cache).glob("*/00000.safetensors")):
        with (
            suppress(OSError, SafetensorError, LookupError, TypeError, ValueError),
            safe_open(path, "pt") as file,
        ):
            facts = json.loads(file.metadata()["facts"].rpartition(" ")[0])
            if facts.get("choice") == _FORMAT:
                stored = {name: file.get_tensor(name) for name in ("variant", "rows", "ratio")}
                found.append((_decoded(stored), facts))
    return found


def choose(
    space: SearchSpace,
    rows: int,
    most: int,
    points: int,
    precision: Precision,
    clock: Callable[[], float] | None = None,
) -> Choice:
    """Times the candidates, as many as may be, and returns the fastest.

    Args:
        space: the ascent's, on a CPU.
        rows: the default's batch.
        most: rows that fit into memory.
        points: of the whole run, which bound the time that this may take.
        precision: as requested: other precisions are not tried.
        clock: seconds; None for the processor's time on one thread, and the time that passes on
            more.
    """
    if clock is None:
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    time_of = _Timing(space, clock)
    default = Choice(DEFAULT, rows)
    models = {DEFAULT: space.fast_model}
    once = min(time_of(models[DEFAULT], rows) for _ in range(2))
    left = max(_LEAST_SECONDS, _SHARE * points * _STEPS * once)
    best = default
    for name, make in variants(precision).items():
        if name == DEFAULT:
            continue
        if left < (2 * _ROUNDS + 2) * once * rows:
            return best
        started = clock()
        model = make(space)
        if model is not None:
            models[name] = model
            ratio = _ratio(time_of, (models[DEFAULT], rows), (model, rows))
            _log.info("%s: %.2f of the default's time per image-step", name, ratio)
            if ratio < min(MARGIN, best.ratio):
                best = Choice(name, rows, ratio)
        left -= clock() - started
    for other in _ROWS:
        if other == rows or other > most or left < (_ROUNDS + 1) * once * (rows + other):
            continue
        started = clock()
        ratio = _ratio(time_of, (models[DEFAULT], rows), (models[best.variant], other))
        _log.info("batches of %d: %.2f of the default's time per image-step", other, ratio)
        if ratio < MARGIN * best.ratio:
            best = Choice(best.variant, other, ratio)
        left -= clock() - started
    return best


def apply(choice: Choice, space: SearchSpace, precision: Precision) -> SearchSpace:
    """``space`` with the copy of ``choice``."""
    model = variants(precision)[choice.variant](space)
    return space if model is None else replace(space, fast_model=model)


class _Timing:
    """Seconds per image of one step: logits and input gradient."""

    def __init__(self, space: SearchSpace, clock: Callable[[], float]) -> None:
        self.space, self.clock = space, clock

    def __call__(self, model: InferenceCopy, rows: int) -> float:
        x = model.layout(self.space.one_point().expand(rows, *self.space.shape))
        started = self.clock()
        with torch.enable_grad():
            x.requires_grad_(True)
            torch.autograd.grad(model(x)[:, 0].sum(), x)
        return (self.clock() - started) / rows


def _ratio(
    time_of: _Timing, default: tuple[InferenceCopy, int], other: tuple[InferenceCopy, int]
) -> float:
    """Median time of ``other`` over that of ``default``, timed in turn after one warm-up."""
    time_of(*other)
    pairs = [(time_of(*default), time_of(*other)) for _ in range(_ROUNDS)]
    return statistics.median(b for _, b in pairs) / statistics.median(a for a, _ in pairs)


def _variant(space: SearchSpace, module: nn.Module | None, **changes: Any) -> InferenceCopy | None:
    if module is None:
        return None
    new = replace(space.fast_model, module=module, **changes)
    return new if is_equivalent(new, space.fast_model, _probe(space)) else None


def _probe(space: SearchSpace) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return space.start(torch.randn(2, *space.shape, generator=generator))


def _fused(space: SearchSpace) -> InferenceCopy | None:
    return _variant(space, fuse_convs(space.fast_model.module), channels_last=True)


def _winograd(space: SearchSpace) -> InferenceCopy | None:
    module = fuse_convs(space.fast_model.module, winograd=True)
    return _variant(space, module, channels_last=True)


def _contiguous(space: SearchSpace) -> InferenceCopy | None:
    if not space.fast_model.channels_last:
        return None
    module = copy.deepcopy(space.fast_model.module).to(memory_format=torch.contiguous_format)
    return _variant(space, module, channels_last=False)


def _float32(space: SearchSpace) -> InferenceCopy | None:
    if space.fast_model.dtype == torch.float32:
        return None
    assert isinstance(space.exact, LogitsModel)
    return inference_copy(space.exact, _probe(space), "float32")
