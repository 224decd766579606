"""Gradient ascent with continuous batching: each point stops at its own target confidence.

The working batch has a number of slots. A point that has reached its target, or has used up its
attempts, leaves its slot to the next point of the queue. A point that missed its target goes back
to the front of the queue for another attempt, from other noise.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..models.multi_label import THRESHOLD
from ..runtime.inference import Inference
from ..runtime.progress import Reporter
from .active_batch import ActiveBatch
from .ascent_settings import AscentSettings
from .space import SearchSpace
from .step_graph import StepGraph

_CPU_ROWS = 64  # that run at once without gradients: of small models, their maps stay in the cache


@dataclass
class AscentResult:
    """The points, float32 [N, *shape], and how their ascent ended: see `ClassImpressions`."""

    points: Tensor
    labels: Tensor
    confidence: Tensor
    target: Tensor
    steps: Tensor
    hit: Tensor

    @classmethod
    def empty(cls, shape: Sequence[int]) -> AscentResult:
        """No points, of this shape."""
        none = torch.empty(0)
        return cls(none.view(0, *shape), none.long(), none, none, none.int(), none.bool())


class Ascent:
    """The ascent of a set of points.

    Args:
        space: where the points are.
        labels: int64 [N], a class for each point.
        number: int64 [N], distinguishes the points of one class.
        settings: see `AscentSettings`.
        width: at most this many slots.
        init: where the points start, [N, *shape]; None draws them by ``space.start``.
        graph: what takes the steps; None for one that the settings ask for.
    """

    def __init__(
        self,
        space: SearchSpace,
        labels: Tensor,
        number: Tensor,
        settings: AscentSettings,
        width: int,
        init: Tensor | None = None,
        graph: StepGraph | None = None,
    ) -> None:
        self.space, self.settings = space, settings
        self.model, self.device = space.fast_model, space.low.device
        self.graph = graph or StepGraph(settings.loop, self.device)
        self.rate = settings.step_size * space.step
        self.beta = torch.tensor(float(settings.beta), device=self.device)
        self.labels, self.number, self.init = labels, number, init
        count = len(labels)
        self.width = min(count, width)
        self.points = torch.empty(count, *space.shape)
        self.confidence = torch.zeros(count)
        self.target = torch.ones(count)
        self.steps = torch.zeros(count, dtype=torch.int32)
        self.hit = torch.zeros(count, dtype=torch.bool)
        self.attempt = [0] * count
        self.queue = deque(range(count))

    def run(self, report: Reporter, before: int, total: int) -> AscentResult:
        """Takes steps until no point is left.

        Args:
            report: called after every step, or after a few of them on a GPU.
            before, total: points finished before these, and points in all, for the report.

        Raises:
            Stopped: the callback asked to; `result` returns what is there.
        """
        finished = 0
        batch = self.fill()
        while batch.index:
            self.graph.run(self.step, batch)
            active = batch.active.tolist()
            points = enumerate(batch.index)
            done = [slot for slot, point in points if point is not None and not active[slot]]
            if done:
                finished += self._retire(batch, done)
                left = min(sum(active) + len(self.queue), self.width)
                shrinks = len(batch.index) > bucket_size(left, self.device)
                if shrinks or (self.queue and self.device.type != "cuda"):
                    batch = self._repack(batch, active)
                elif self.queue:
                    self._refill(batch)
            report("synthesise", before + finished, total, in_flight=float(sum(active)))
        self.graph.forget()
        return self.result(torch.arange(len(self.labels)))

    def result(self, keep: Tensor | None = None) -> AscentResult:
        """The points at ``keep``; None for those that have reached their target so far."""
        if keep is None:
            keep = self.hit.nonzero()[:, 0]
        if len(keep):  # the confidence that the model itself gives, in float32
            on_cpu = self.device.type == "cpu"
            exact = Inference(self.space.exact, self.points[keep[:1]].to(self.device))
            for chunk in keep.split(min(self.width, _CPU_ROWS) if on_cpu else self.width):
                logits = exact(self.points[chunk].to(self.device))
                own = self.probabilities(logits).cpu().gather(1, self.labels[chunk][:, None])[:, 0]
                self.confidence[chunk] = own
        columns = (self.points, self.labels, self.confidence, self.target, self.steps, self.hit)
        return AscentResult(*[column[keep] for column in columns])

    def probabilities(self, logits: Tensor) -> Tensor:
        """Probabilities of the classes, [N, C]."""
        return logits.sigmoid() if self.settings.multi_label else logits.softmax(1)

    def step(self, batch: ActiveBatch) -> None:
        """One ascent step of the active points, in place and on the device: it can be captured.

        A point that reached its target, that is not finite, or that took its last step becomes
        inactive and stays where it is.
        """
        x = batch.x.detach().requires_grad_(True)
        logits = self.model(x)
        own = logits.gather(1, batch.label[:, None])[:, 0]
        objective = own.sum()
        if batch.penalises and not self.settings.multi_label:
            others = logits.scatter(1, batch.label[:, None], -torch.inf).logsumexp(1)
            objective = (own - batch.penalise_others * others).sum()
        if self.space.regulariser is not None:  # times the rows: as strong at any batch size
            weight = self.settings.batch_norm * len(x)
            objective = objective - weight * self.space.regulariser()
        (grad,) = torch.autograd.grad(objective, x)
        probability = self.probabilities(logits.detach())
        batch.confidence.copy_(probability.gather(1, batch.label[:, None])[:, 0])
        if self.settings.multi_label:
            highest = batch.confidence >= THRESHOLD
        else:
            highest = probability.argmax(1) == batch.label
        last_step = batch.step >= self.settings.max_steps
        stop = last_step if self.settings.confidence is None else batch.confidence >= batch.target
        finite = grad.flatten(1).sum(1).isfinite() & batch.confidence.isfinite()
        batch.reached.logical_or_(stop & highest & finite & batch.active)
        batch.active.logical_and_(finite & ~batch.reached & ~last_step)
        ops.ascent_step_(
            batch.x, grad, batch.exp_avg, batch.exp_avg_sq, batch.step, batch.active,
            self.space.low, self.space.high, self.rate, self.beta,
        )  # fmt: skip

    def fill(self, batch: ActiveBatch | None = None, keep: Sequence[int] = ()) -> ActiveBatch:
        """A new batch: the slots ``keep`` of ``batch``, then points from the queue."""
        free = min(len(self.queue), self.width - len(keep))
        filled = self._start([self.queue.popleft() for _ in range(free)])
        if batch is not None:
            filled = batch.joined(keep, filled)
        filled.x = self.model.layout(filled.x)
        filled.exp_avg = self.model.layout(filled.exp_avg)
        filled.exp_avg_sq = self.model.layout(filled.exp_avg_sq)
        filled.penalises = self._any_retry(filled)
        return filled

    def _retire(self, batch: ActiveBatch, done: list[int]) -> int:
        """Frees the slots ``done``: stores their points, or queues them for another attempt.
        Returns how many were stored.
        """
        reached, steps = batch.reached.tolist(), batch.step.tolist()
        slots, points = [], []
        for slot in done:
            point = batch.index[slot]
            assert point is not None
            self.steps[point] += steps[slot]
            if reached[slot] or self.attempt[point] >= self.settings.restarts:
                self.hit[point] = reached[slot]
                slots.append(slot)
                points.append(point)
            else:
                self.attempt[point] += 1
                self.queue.appendleft(point)
            batch.index[slot] = None
        if points:
            where = torch.tensor(slots, device=self.device)
            self.points[points] = batch.x[where].cpu()
            self.target[points] = batch.target[where].cpu()
        return len(points)

    def _refill(self, batch: ActiveBatch) -> None:
        """Puts points of the queue into free slots, in place: a captured graph stays valid."""
        free = [slot for slot, point in enumerate(batch.index) if point is None]
        free = free[: len(self.queue)]
        batch.write(free, self._start([self.queue.popleft() for _ in free]))
        batch.penalises = self._any_retry(batch)

    def _repack(self, batch: ActiveBatch, active: list[bool]) -> ActiveBatch:
        """A smaller batch, or a full one: without free slots, but for some up to a bucket size."""
        keep = [slot for slot, going in enumerate(active) if going]
        if not self.queue and keep:
            free = [slot for slot, going in enumerate(active) if not going]
            keep += free[: bucket_size(len(keep), self.device) - len(keep)]
        return self.fill(batch, keep)

    def _any_retry(self, batch: ActiveBatch) -> bool:
        return any(self.attempt[point] > 0 for point in batch.index if point is not None)

    def _start(self, points: list[int]) -> ActiveBatch:
        """Points at their start, which depends on (seed, class, number, attempt) alone."""
        noise = torch.empty(len(points), *self.space.shape)
        target = torch.ones(len(points))
        for row, point in enumerate(points):
            key = (int(self.labels[point]), int(self.number[point]), self.attempt[point])
            generator = torch.Generator().manual_seed(hash_ints(self.settings.seed, *key))
            if self.settings.confidence is not None:
                target[row].uniform_(*self.settings.confidence, generator=generator)
            noise[row].normal_(generator=generator)
        x = self.space.start(noise.to(self.device))
        if self.init is not None:
            x.copy_(self.init[points])
        zero = torch.zeros(len(points), device=self.device)
        false = torch.zeros(len(points), dtype=torch.bool, device=self.device)
        # If raising its own logit was not enough (common after earlier unlearning), a retry also
        # pushes the other logits down.
        retried = [float(self.attempt[point] > 0) for point in points]
        return ActiveBatch(
            list(points), x, exp_avg=torch.zeros_like(x), exp_avg_sq=torch.zeros_like(x),
            step=zero.int(), label=self.labels[points].to(self.device),
            target=target.to(self.device), confidence=zero, active=~false, reached=false,
            penalise_others=torch.tensor(retried, device=self.device),
        )  # fmt: skip


def bucket_size(rows: int, device: torch.device) -> int:
    """The number of slots for ``rows`` active points, from a short list: few sizes are set up.

    On a GPU, where each size is captured once and small batches take the same time, at least 8.
    """
    size = 8 if device.type == "cuda" else 1
    while size < rows:
        size = size * 3 // 2 if size > 1 and size & (size - 1) == 0 else max(2, size * 4 // 3)
    return size if rows else 0


def hash_ints(*numbers: int) -> int:
    """A 63-bit hash of a few integers (splitmix64 steps), the same on every machine."""
    h = 0
    for n in numbers:
        h = (h ^ (n & 0xFFFFFFFFFFFFFFFF)) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        h = (h ^ h >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        h = (h ^ h >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        h ^= h >> 31
    return h >> 1
