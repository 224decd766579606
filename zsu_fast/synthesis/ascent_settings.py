"""The settings of the ascent: what impressions are, and how large its batches may be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import ArgumentError, check_choice, check_int, is_number
from ..runtime.cuda_graph import LOOPS, Loop
from ..runtime.torch_settings import PRECISIONS, Precision


@dataclass(frozen=True)
class BatchLimits:
    """Upper bounds for the working batch, the rows that ascend together, and for a shard.

    Attributes:
        values: input values: 1,365 images of 3x32x32, 27 of 3x224x224.
        gpu_factor: a GPU, which smaller batches leave idle, takes this many times ``values``.
        logits: 167 rows of 100,000 classes.
        cache_bytes: on a CPU, the batch should fit in the cache, or hold no more than the weights
            that are read for it.
        min_rows: rows that ``cache_bytes`` leaves at least.
        blocks: where images are computed in blocks of 16 (`blocked_conv`), the most of them.
        batches_per_shard: a shard is at most this many full batches.
    """

    values: int = 4 * 1024 * 1024
    gpu_factor: int = 16
    logits: int = 16 * 1024 * 1024
    cache_bytes: int = 24 * 1024 * 1024
    min_rows: int = 8
    blocks: int = 16
    batches_per_shard: int = 4


@dataclass(frozen=True)
class AscentSettings:
    """How class impressions are synthesised.

    The noise and the target confidence of impression i of a class depend on (seed, class, i)
    alone, so that they are the same whatever other classes or impressions are synthesised.

    Attributes:
        per_class: impressions per class, 1 or more.
        confidence: each impression stops at a target probability drawn from this uniform range;
            None takes all ``max_steps`` steps (the published recipe).
        max_steps: at most this many ascent steps per attempt.
        restarts: further attempts, from new noise, of an impression that missed its target; they
            also push the logits of the other classes down.
        step_size: Adam's learning rate, in units of the range of valid values, in (0, 1].
        beta: weight of the squared norm in ``logit_c(x) - beta * ||x||^2``.
        seed: everything random depends on it, 0 or more and below 2**63.
        precision: of convolutions and matrix products: "float32", "bfloat16", or "auto", which is
            bfloat16 where the device computes in it.
        batch_norm: weight of the distance of the batch's feature statistics from those that the
            model's BatchNorm layers have recorded (`batch_norm_prior`); 0 leaves it out.
        multi_label: whether the probability is that of the class's sigmoid; the logits of the
            others are left free then, by retries too.
        loop: "eager" captures no CUDA graphs, "graph" requires them; "auto" captures them on a GPU
            if possible, and so does "compiled", which concerns the tail.
        limits: of the working batch; not an option of `synthesize`.

    Raises:
        ArgumentError: a value is out of range.
    """

    per_class: int = 32
    confidence: tuple[float, float] | None = (0.55, 0.99)
    max_steps: int = 100
    restarts: int = 2
    step_size: float = 0.01
    beta: float = 1e-4
    seed: int = 0
    precision: Precision = "auto"
    batch_norm: float = 0.0
    multi_label: bool = False
    loop: Loop = "auto"
    limits: BatchLimits = field(default_factory=BatchLimits)

    def __post_init__(self) -> None:
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("loop", self.loop, LOOPS)
        for name, least in (("per_class", 1), ("max_steps", 1), ("restarts", 0), ("seed", 0)):
            check_int(name, getattr(self, name), least)
        if self.seed >= 1 << 63:
            raise ArgumentError("seed", f"got {self.seed}", "Pass one below 2**63.")
        if self.confidence is not None and not _is_range(self.confidence):
            remedy = "Pass (low, high) with 0 < low <= high < 1."
            raise ArgumentError("confidence", f"got {self.confidence!r}", remedy)
        if not is_number(self.step_size) or not 0 < self.step_size <= 1:
            raise ArgumentError("step_size", f"got {self.step_size!r}", "Pass a number in (0, 1].")
        for name in ("beta", "batch_norm"):
            value = getattr(self, name)
            if not is_number(value) or value < 0:
                raise ArgumentError(name, f"got {value!r}", "Pass a number that is 0 or more.")

    def facts(self) -> dict[str, Any]:
        """The settings that impressions depend on: all but the limits and the loop."""
        facts = asdict(self)
        del facts["limits"], facts["loop"]
        if not self.multi_label:  # keeps the keys of existing caches
            del facts["multi_label"]
        return facts


def _is_range(value: Any) -> bool:
    pair = isinstance(value, Sequence) and len(value) == 2 and all(map(is_number, value))
    return pair and 0 < value[0] <= value[1] < 1
