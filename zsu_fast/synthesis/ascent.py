"""The ascent: a batch of points climbs until each has reached its confidence, or gives up."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import ops
from ..errors import ArgumentError, is_number
from ..runtime.precision import PRECISIONS, Precision
from ..runtime.progress import Reporter
from .batch_norm_prior import BatchNormStatistics
from .space import SearchSpace

# On a GPU, the host looks at which rows are done after so many steps.
STEPS_PER_GRAPH = 4


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
    batch_norm: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.precision, str) or self.precision not in PRECISIONS:
            raise ArgumentError(
                "precision", f"got {self.precision!r}", f"Pass one of {', '.join(PRECISIONS)}."
            )
        for name, least in (("per_class", 1), ("max_steps", 1), ("restarts", 0), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ArgumentError(
                    name, f"got {value!r}", f"Pass a whole number, {least} or more."
                )
        if self.seed >= 1 << 63:
            raise ArgumentError("seed", f"got {self.seed}", "Pass one below 2**63.")
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
        for name in ("beta", "batch_norm"):
            value = getattr(self, name)
            if not is_number(value) or value < 0:
                raise ArgumentError(name, f"got {value!r}", "Pass a number that is 0 or more.")


@dataclass
class AscentResult:
    """Points and how they came out; row i of every tensor is point i.

    Attributes:
        points: float32 [N, *shape].
        labels: int64 [N], the class that each was made for.
        confidence: float32 [N], the class's softmax probability at the end.
        target: float32 [N], the confidence at which the ascent was to stop (1 for "never").
        steps: int32 [N], ascent steps taken, restarts included.
        hit: bool [N], whether the target was reached (without a target: whether the class leads).
    """

    points: Tensor
    labels: Tensor
    confidence: Tensor
    target: Tensor
    steps: Tensor
    hit: Tensor

    @classmethod
    def none(cls, shape: Sequence[int]) -> AscentResult:
        """No points of this shape."""
        whole, number = torch.empty(0, dtype=torch.int64), torch.empty(0)
        return cls(number.view(0, *shape), whole, number, number, whole.int(), whole.bool())


class Ascent:
    """The working batch: rows in flight, refilled from the queue as rows finish.

    Args:
        space: where to climb.
        labels: int64 [N], a class for each point.
        number: int64 [N], tells points of one class apart.
        settings: see `synthesize`.
        width: most rows in flight.
        starts: where they start, [N, *shape]; None for the space's own starting points.
    """

    def __init__(
        self,
        space: SearchSpace,
        labels: Tensor,
        number: Tensor,
        settings: AscentSettings,
        width: int,
        starts: Tensor | None = None,
    ) -> None:
        self.space, self.settings = space, settings
        self.model, self.device = space.fast_model, space.low.device
        self.rate = settings.step_size * space.step
        self.beta = torch.tensor(float(settings.beta), device=self.device)
        self.labels, self.number, self.starts = labels, number, starts
        count = len(labels)
        self.width = min(count, width)
        self.points = torch.empty(count, *space.shape)
        self.reached = torch.zeros(count)
        self.target = torch.ones(count)
        self.steps = torch.zeros(count, dtype=torch.int32)
        self.hit = torch.zeros(count, dtype=torch.bool)
        self.attempt = [0] * count
        self.queue = list(range(count))[::-1]

    def run(self, report: Reporter, before: int, total: int) -> AscentResult:
        """Climbs until no row is left.

        Args:
            report: told after every step.
            before, total: points finished before this batch, and in all, for the report.

        Raises:
            Stopped: the callback asked to; `result` has what is there.
        """
        finished = 0
        rows = self._fill([])
        steps = _step_many(self._step, self.device)
        while rows.index:
            steps(rows)
            alive = rows.active.tolist()
            gone = [i >= 0 and not going for i, going in zip(rows.index, alive, strict=True)]
            if any(gone):
                finished += self._retire(rows, gone)
                left = min(sum(alive) + len(self.queue), self.width)
                shrinks = len(rows.index) > _bucket(left, self.device)
                if shrinks or (self.queue and self.device.type != "cuda"):
                    rows = self._compact(rows, alive)
                elif self.queue:  # in place: the captured graph stays good
                    self._refill(rows)
            report("synthesise", before + finished, total, in_flight=float(sum(alive)))
        return self.result(torch.arange(len(self.labels)))

    def time_steps(self, steps: int = 3) -> tuple[float, float]:
        """Seconds that setting a batch up takes, and a step of it; the fastest of ``steps``."""
        took = []
        rows: _Rows | None = None
        for _ in range(steps + 2):
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            started = time.perf_counter()
            if rows is None:
                rows = self._fill([])
            else:
                self._step(rows)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            took.append(time.perf_counter() - started)
        return took[0], min(took[2:])

    def result(self, keep: Tensor | None = None) -> AscentResult:
        """The points at ``keep``; None for those that have reached their target so far."""
        if keep is None:
            keep = self.hit.nonzero()[:, 0]
        with torch.no_grad():  # what was reached by the model itself, in float32
            for chunk in keep.split(self.width):
                probability = self.space.exact(self.points[chunk].to(self.device)).softmax(1)
                own = probability.cpu().gather(1, self.labels[chunk][:, None])[:, 0]
                self.reached[chunk] = own
        return AscentResult(
            self.points[keep],
            self.labels[keep],
            self.reached[keep],
            self.target[keep],
            self.steps[keep],
            self.hit[keep],
        )

    def _step(self, rows: _Rows) -> None:
        """One ascent step of the active rows, all on the device, in place: it can be captured.

        A row that reached its target, that is not finite, or that took its last step becomes
        inactive and keeps its point from then on.
        """
        x = rows.x.detach().requires_grad_(True)
        logits = self.model(x)
        own = logits.gather(1, rows.label[:, None])[:, 0]
        goal = own.sum()
        if rows.rivals:
            others = logits.scatter(1, rows.label[:, None], -torch.inf).logsumexp(1)
            goal = (own - rows.rivalry * others).sum()
        if isinstance(
            self.model.model, BatchNormStatistics
        ):  # times the rows: as hard a pull in any width
            goal = goal - self.settings.batch_norm * len(x) * self.model.model.distance()
        (grad,) = torch.autograd.grad(goal, x)
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
            self.space.low, self.space.high, self.rate, self.beta,
        )  # fmt: skip

    def _retire(self, rows: _Rows, gone: list[bool]) -> int:
        """Stores rows that are done and sends those that missed back to the queue."""
        reached, steps = rows.reached.tolist(), rows.step.tolist()
        places, done = [], []
        for at, i in enumerate(rows.index):
            if not gone[at]:
                continue
            self.steps[i] += steps[at]
            if reached[at] or self.attempt[i] >= self.settings.restarts:
                self.hit[i] = reached[at]
                places.append(at)
                done.append(i)
            else:
                self.attempt[i] += 1
                self.queue.append(i)
            rows.index[at] = -1
        if done:
            where = torch.tensor(places, device=self.device)
            self.points[done] = rows.x[where].cpu()
            self.target[done] = rows.target[where].cpu()
        return len(done)

    def _refill(self, rows: _Rows) -> None:
        """New rows from the queue where others are done, in the same memory."""
        free = [at for at, i in enumerate(rows.index) if i < 0][: len(self.queue)]
        fresh = self._noise([self.queue.pop() for _ in free])
        where = torch.tensor(free, device=self.device)
        for name in _Rows.TENSORS:
            getattr(rows, name)[where] = getattr(fresh, name)
        for place, i in zip(free, fresh.index, strict=True):
            rows.index[place] = i
        rows.rivals = self._has_rivals(rows)

    def _compact(self, rows: _Rows, alive: list[bool]) -> _Rows:
        """Drops rows that are done, but for as many as fill the batch up to a fixed size."""
        keep = [at for at, going in enumerate(alive) if going]
        if not self.queue and keep:
            spare = [at for at, going in enumerate(alive) if not going]
            keep += spare[: _bucket(len(keep), self.device) - len(keep)]
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
        fresh.rivals = self._has_rivals(fresh)
        return fresh

    def _has_rivals(self, rows: _Rows) -> bool:
        return any(self.attempt[i] > 0 for i in rows.index if i >= 0)

    def _noise(self, new: list[int]) -> _Rows:
        """Starting points: a function of (seed, class, number, attempt) alone."""
        noise = torch.empty(len(new), *self.space.shape)
        target = torch.ones(len(new))
        for at, i in enumerate(new):
            key = (int(self.labels[i]), int(self.number[i]), self.attempt[i])
            generator = torch.Generator().manual_seed(_mix(self.settings.seed, *key))
            if self.settings.confidence is not None:
                target[at].uniform_(*self.settings.confidence, generator=generator)
            noise[at].normal_(generator=generator)
        x = self.space.start(noise.to(self.device))
        if self.starts is not None:
            x.copy_(self.starts[new])
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
            # A class that its logit alone did not reach, as where others lead by far since classes
            # were forgotten: from the second attempt on, the others' logits are pushed down too.
            torch.tensor([float(self.attempt[i] > 0) for i in new], device=self.device),
        )


@dataclass
class _Rows:
    """Points in flight; ``index`` is their place in the result, -1 once they are done."""

    TENSORS = (
        "x", "moment", "variance", "step", "label", "target", "confidence", "active", "reached",
        "rivalry",
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
    rivalry: Tensor
    rivals: bool = field(default=True, init=False)  # whether any rivalry is not 0


def _bucket(rows: int, device: torch.device) -> int:
    """The batch size for so many rows in flight: few sizes, so that little is set up anew.

    On a GPU, where each size is captured once and small batches cost the same, none below 8.
    """
    size = 8 if device.type == "cuda" else 1
    while size < rows:
        size = size * 3 // 2 if size > 1 and size & (size - 1) == 0 else max(2, size * 4 // 3)
    return size if rows else 0


def _step_many(step: Callable[[_Rows], None], device: torch.device) -> Callable[[_Rows], None]:
    """``step`` as it is on a CPU; on a GPU, several of it captured in one CUDA graph."""
    if device.type != "cuda":
        return step
    graph: torch.cuda.CUDAGraph | None = None
    captured: _Rows | None = None
    rivals = False

    def replay(rows: _Rows) -> None:
        nonlocal graph, captured, rivals
        if captured is not rows or rivals != rows.rivals:  # its first steps run eagerly and warm up
            graph = captured = None  # its memory can be had again
            side = torch.cuda.Stream(device)
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                for _ in range(3):
                    step(rows)
            torch.cuda.current_stream(device).wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(STEPS_PER_GRAPH):
                    step(rows)
            captured, rivals = rows, rows.rivals
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
