"""Class impressions: images that the model takes for a class, made from noise by gradient ascent.

Mopuri et al., "Ask, Acquire, and Attack" (2018); the paper's section 4.1, equation 3. Unlike
there, each impression stops at a confidence of its own: an image pushed until ``p = 1`` has a
cross-entropy gradient of exactly 0 and teaches the tail nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint, ops
from .classifier import (
    InputSpec,
    LogitsModel,
    check_classes,
    count_classes,
    own_modes,
    resolve_device,
    resolve_spec,
    working_copy,
)
from .errors import ArgumentError, CheckpointError, is_number
from .fast_copy import PRECISIONS, Precision, fast_copy
from .progress import Callback, Reporter, Stopped
from .threads import multiply_adds, threads_for

# A working batch holds at most this many values: 1,365 images of 3x32x32, 27 of 3x224x224.
_BATCH_VALUES = 4 * 1024 * 1024
# On a GPU, the host looks at which rows are done after so many steps.
_STEPS_A_GRAPH = 4


@dataclass(frozen=True)
class AscentSettings:
    """How impressions are made; `synthesize` says what each field means.

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

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ArgumentError(
                "precision", f"got {self.precision!r}", f"Pass one of {', '.join(PRECISIONS)}."
            )
        for name, least in (("per_class", 1), ("max_steps", 1), ("restarts", 0), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ArgumentError(
                    name, f"got {value!r}", f"Pass a whole number, {least} or more."
                )
        if self.confidence is not None:
            given = self.confidence
            pair = isinstance(given, Sequence) and len(given) == 2 and all(map(is_number, given))
            if not pair or not 0 < given[0] <= given[1] < 1:
                raise ArgumentError(
                    "confidence",
                    f"got {self.confidence!r}",
                    "Pass (low, high) with 0 < low <= high < 1.",
                )
        if not is_number(self.step_size) or not 0 < self.step_size <= 1:
            raise ArgumentError("step_size", f"got {self.step_size!r}", "Pass a number in (0, 1].")
        if not is_number(self.beta) or self.beta < 0:
            raise ArgumentError("beta", f"got {self.beta!r}", "Pass a number that is 0 or more.")


@dataclass
class ClassImpressions:
    """Synthesised images and how they came out. Row i of every tensor is impression i.

    Attributes:
        images: float32 [N, channels, H, W], normalised as the model wants them, all valid pixels.
        labels: int64 [N], the class that each was made for.
        confidence: float32 [N], the softmax probability of that class that was reached.
        target: float32 [N], the confidence at which its ascent was to stop (1 for "never").
        steps: int32 [N], ascent steps taken, restarts included.
        hit: bool [N], whether the target was reached (without a target: whether the class leads).
        spec: the images' shape and normalisation.
    """

    images: Tensor
    labels: Tensor
    confidence: Tensor
    target: Tensor
    steps: Tensor
    hit: Tensor
    spec: InputSpec

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def hit_rate(self) -> float:
        """The share of impressions that reached their target, 0..1."""
        return float(self.hit.float().mean()) if len(self) else 0.0

    def hit_rate_of(self, label: int) -> float:
        """The same for one class."""
        rows = self.labels == label
        return float(self.hit[rows].float().mean()) if bool(rows.any()) else 0.0

    def save(self, path: str | Path, force: bool = False) -> None:
        """Writes a safetensors file, atomically; never over an existing one without ``force``."""
        tensors = {name: getattr(self, name) for name in _TENSORS}
        spec = {
            "shape": self.spec.shape,
            "mean": self.spec.mean,
            "std": self.spec.std,
            "source": self.spec.source,
        }
        metadata = {"format": "zsu_fast.impressions/1", "spec": json.dumps(spec)}
        checkpoint.save_tensors(path, tensors, metadata=metadata, force=force)

    @classmethod
    def load(cls, path: str | Path) -> ClassImpressions:
        """Reads what `save` wrote.

        Raises:
            CheckpointError: missing, damaged, or not a file of impressions.
        """
        tensors, metadata = checkpoint.load_tensors(path)
        if metadata.get("format") != "zsu_fast.impressions/1" or set(tensors) != set(_TENSORS):
            raise CheckpointError(f"{path} holds no class impressions. Make them by synthesize().")
        spec = json.loads(metadata["spec"])
        return cls(
            **tensors,
            spec=InputSpec(
                tuple(spec["shape"]), tuple(spec["mean"]), tuple(spec["std"]), spec["source"]
            ),
        )


_TENSORS = ("images", "labels", "confidence", "target", "steps", "hit")


@own_modes()
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
        restarts: further attempts, from new noise, of an impression that misses its target.
        step_size: Adam's learning rate, in units of the valid pixel range.
        beta: weight of the squared norm.
        input_shape, mean, std: see `resolve_spec`; inferred where None.
        seed: the noise and targets of impression i depend on (seed, class, i) alone.
        precision: of convolutions and products: "float32", "bfloat16", or "auto": bfloat16
            where the device computes in it.
        device: where to compute; None for the model's own.
        progress, callback: see `Reporter`.

    Returns:
        The impressions, sorted by class, on the CPU.

    Raises:
        ArgumentError: an argument can't be used (a `ValueError`).
    """
    settings = AscentSettings(
        per_class, confidence, max_steps, restarts, step_size, beta, seed, precision
    )
    where = resolve_device(model, device)
    spec = resolve_spec(model, input_shape, mean, std)
    copied = working_copy(model, where)
    total = count_classes(copied, spec, where)
    chosen = list(range(total)) if classes is None else check_classes("classes", classes, total)
    with Reporter(progress, callback) as report:
        return ascend(copied, spec, chosen, settings, report)


def ascend(
    model: LogitsModel,
    spec: InputSpec,
    classes: Sequence[int],
    settings: AscentSettings,
    report: Reporter,
    starts: Tensor | None = None,
) -> ClassImpressions:
    """`synthesize` on a working copy. All classes share one batch; finished rows leave it.

    ``starts``, in 0..1 [N, ...], are where the ascents begin instead of at grey noise.
    """
    device = next(model.parameters()).device
    work = multiply_adds(model, torch.zeros(1, *spec.shape, device=device))
    with threads_for(work, device):
        return _Ascent(model, spec, classes, settings, starts).run(report)


class _Ascent:
    """The working batch: rows in flight, refilled from the queue as rows finish."""

    def __init__(
        self,
        model: LogitsModel,
        spec: InputSpec,
        classes: Sequence[int],
        settings: AscentSettings,
        starts: Tensor | None = None,
    ) -> None:
        self.spec, self.settings, self.starts = spec, settings, starts
        self.device = next(model.parameters()).device
        bounds = (-1, 1, 1) if len(spec.shape) == 3 else (-1,)
        self.low = spec.low.view(bounds).to(self.device)
        self.high = spec.high.view(bounds).to(self.device)
        self.lr = settings.step_size * (self.high - self.low).mean()
        self.beta = torch.tensor(settings.beta, device=self.device)

        per_class = settings.per_class
        count = len(classes) * per_class
        self.labels = torch.tensor(list(classes)).repeat_interleave(per_class)
        self.number = torch.arange(per_class).repeat(len(classes))
        self.images = torch.empty(count, *spec.shape)
        self.reached = torch.zeros(count)
        self.target = torch.ones(count)
        self.steps = torch.zeros(count, dtype=torch.int32)
        self.hit = torch.zeros(count, dtype=torch.bool)
        self.attempt = [0] * count
        self.queue = list(range(count))[::-1]
        values = max(1, int(torch.tensor(spec.shape).prod()))
        self.width = min(count, max(16, _BATCH_VALUES // values))
        probe = self.low + (self.high - self.low) * torch.rand(
            2, *spec.shape, generator=torch.Generator().manual_seed(0)
        ).to(self.device)
        self.exact, self.model = model, fast_copy(model, probe, settings.precision)

    def run(self, report: Reporter) -> ClassImpressions:
        count, finished = len(self.labels), 0
        rows = self._fill([])
        steps = _step_many(self._step, self.device)
        try:
            while rows.index:
                steps(rows)
                alive = rows.active.tolist()
                gone = [i >= 0 and not going for i, going in zip(rows.index, alive, strict=True)]
                if any(gone):
                    finished += self._retire(rows, gone)
                    if len(rows.index) > _bucket(sum(alive)) or (self.queue and not all(alive)):
                        rows = self._compact(rows, alive)
                report("synthesise", finished, count, in_flight=float(sum(alive)))
        except Stopped:
            keep = [i for i in range(count) if bool(self.hit[i])]
            return self._result(torch.tensor(keep, dtype=torch.int64))
        return self._result(torch.arange(count))

    def _step(self, rows: _Rows) -> None:
        """One ascent step of the active rows, all on the device, in place: it can be captured.

        A row that reached its target, that is not finite, or that took its last step becomes
        inactive and keeps its image from then on.
        """
        x = rows.x.detach().requires_grad_(True)
        logits = self.model(x)
        own = logits.gather(1, rows.label[:, None])[:, 0]
        (grad,) = torch.autograd.grad(own.sum(), x)
        probability = logits.detach().softmax(1)
        rows.confidence.copy_(probability.gather(1, rows.label[:, None])[:, 0])
        leads = probability.argmax(1) == rows.label
        tired = rows.step >= self.settings.max_steps
        done = tired if self.settings.confidence is None else rows.confidence >= rows.target
        finite = grad.flatten(1).sum(1).isfinite() & rows.confidence.isfinite()
        rows.reached.logical_or_(done & leads & finite & rows.active)
        rows.active.logical_and_(finite & ~rows.reached & ~tired)
        ops.ascent_step_(
            rows.x, grad, rows.moment, rows.variance, rows.step, rows.active,
            self.low, self.high, self.lr, self.beta,
        )  # fmt: skip

    def _retire(self, rows: _Rows, gone: list[bool]) -> int:
        """Stores rows that are done and sends those that missed back to the queue."""
        finished = 0
        reached = rows.reached.tolist()
        steps = rows.step.tolist()
        for at, i in enumerate(rows.index):
            if not gone[at]:
                continue
            self.steps[i] += steps[at]
            if reached[at] or self.attempt[i] >= self.settings.restarts:
                self.images[i] = rows.x[at].cpu()
                self.hit[i] = reached[at]
                self.target[i] = float(rows.target[at])
                finished += 1
            else:
                self.attempt[i] += 1
                self.queue.append(i)
            rows.index[at] = -1
        return finished

    def _compact(self, rows: _Rows, alive: list[bool]) -> _Rows:
        """Drops rows that are done, but for as many as fill the batch up to a fixed size."""
        keep = [at for at, going in enumerate(alive) if going]
        if not self.queue and keep:
            spare = [at for at, going in enumerate(alive) if not going]
            keep += spare[: _bucket(len(keep)) - len(keep)]
        return self._fill(keep, rows)

    def _fill(self, keep: list[int], rows: _Rows | None = None) -> _Rows:
        """The rows at ``keep`` and, behind them, new ones from the queue."""
        index = [] if rows is None else [rows.index[at] for at in keep]
        new = [self.queue.pop() for _ in range(min(len(self.queue), self.width - len(index)))]
        fresh = self._noise(new)
        if rows is not None:
            at = torch.tensor(keep, dtype=torch.int64, device=self.device)
            joined = [
                torch.cat([getattr(rows, name)[at], getattr(fresh, name)]) for name in _Rows.TENSORS
            ]
            fresh = _Rows(index + new, *joined)
        for name in ("x", "moment", "variance"):
            setattr(fresh, name, self.model.layout(getattr(fresh, name)))
        return fresh

    def _noise(self, new: list[int]) -> _Rows:
        """Starting points: mid-grey with a little noise, a function of (seed, class, number)."""
        images = torch.empty(len(new), *self.spec.shape)
        target = torch.ones(len(new))
        for at, i in enumerate(new):
            key = (int(self.labels[i]), int(self.number[i]), self.attempt[i])
            generator = torch.Generator().manual_seed(_mix(self.settings.seed, *key))
            if self.settings.confidence is not None:
                target[at].uniform_(*self.settings.confidence, generator=generator)
            if self.starts is None:
                images[at].normal_(0.5, 0.1, generator=generator).clamp_(0, 1)
            else:
                images[at] = self.starts[i]
        x = self.low + images.to(self.device) * (self.high - self.low)
        zero = torch.zeros(len(new), device=self.device)
        false = torch.zeros(len(new), dtype=torch.bool, device=self.device)
        return _Rows(
            list(new),
            x,
            torch.zeros_like(x),
            torch.zeros_like(x),
            zero.int(),
            self.labels[new].to(self.device),
            target.to(self.device),
            zero.clone(),
            ~false,
            false,
        )

    def _result(self, keep: Tensor) -> ClassImpressions:
        with torch.no_grad():  # what was reached by the model itself, in float32
            for chunk in keep.split(self.width):
                probability = self.exact(self.images[chunk].to(self.device)).softmax(1)
                own = probability.cpu().gather(1, self.labels[chunk][:, None])[:, 0]
                self.reached[chunk] = own
        return ClassImpressions(
            self.images[keep],
            self.labels[keep],
            self.reached[keep],
            self.target[keep],
            self.steps[keep],
            self.hit[keep],
            self.spec,
        )


@dataclass
class _Rows:
    """Impressions in flight; ``index`` is their place in the result, -1 once they are done."""

    TENSORS = (
        "x", "moment", "variance", "step", "label", "target", "confidence", "active", "reached",
    )  # fmt: skip
    index: list[int]
    x: Tensor
    moment: Tensor
    variance: Tensor
    step: Tensor
    label: Tensor
    target: Tensor
    confidence: Tensor
    active: Tensor
    reached: Tensor


def _bucket(rows: int) -> int:
    """The batch size for so many rows in flight: few sizes, so that little is set up anew."""
    size = 8
    while size < rows:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size if rows else 0


def _step_many(step: Callable[[_Rows], None], device: torch.device) -> Callable[[_Rows], None]:
    """``step`` as it is on a CPU; on a GPU, several of it captured in one CUDA graph."""
    if device.type != "cuda":
        return step
    graph: torch.cuda.CUDAGraph | None = None
    captured: _Rows | None = None

    def replay(rows: _Rows) -> None:
        nonlocal graph, captured
        if captured is not rows:  # a new batch: its first steps run eagerly and warm up
            side = torch.cuda.Stream(device)
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                for _ in range(3):
                    step(rows)
            torch.cuda.current_stream(device).wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(_STEPS_A_GRAPH):
                    step(rows)
            captured = rows
        assert graph is not None
        graph.replay()

    return replay


def _mix(*numbers: int) -> int:
    """A 63-bit hash of a few whole numbers (splitmix64 steps), equal everywhere."""
    h = 0
    for n in numbers:
        h = (h ^ (n & 0xFFFFFFFFFFFFFFFF)) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        h = (h ^ h >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        h = (h ^ h >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        h ^= h >> 31
    return h >> 1
