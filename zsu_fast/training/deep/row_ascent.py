"""The ascent that inverts rows to classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...models.input_spec import InputSpec
from ...models.multi_label import log_probabilities
from ...runtime.hooks import forward_pre_hooks
from ...synthesis.batch_norm_prior import batch_norms
from .settings import DeepSettings
from .split import DeepSplit

_FEWEST_ROWS = 32  # that share the BatchNorm statistics, once the others have reached their targets


class RowAscent:
    """The ascent of inverted rows, a chunk at a time; see `RowSource.invert`."""

    def __init__(
        self, deep: DeepSplit, spec: InputSpec, starts: Tensor, settings: DeepSettings
    ) -> None:
        self.tail, self.settings = deep.flat, settings
        self.norms = batch_norms(deep.early.tail)
        sizes = self.tail.sizes
        parts = starts.split(sizes, 1)
        scale = [part.std().clamp(min=1e-12) for part in parts]
        self.scale = torch.cat([s.expand(n) for s, n in zip(scale, sizes, strict=True)])
        floor = [0.0 if bool((part >= 0).all()) else -torch.inf for part in parts]
        self.low = torch.cat([starts.new_full((n,), f) for f, n in zip(floor, sizes, strict=True)])
        self.high = torch.full_like(self.low, torch.inf)
        if self.tail.shapes == [deep.shape]:  # the boundary is the image itself
            shape = (-1, *[1] * (len(deep.shape) - 1))
            bounds = (b.to(starts.device).view(shape) for b in (spec.low, spec.high))
            self.low, self.high = (b.expand(deep.shape).flatten() for b in bounds)

    def run(self, points: Tensor, label: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Points [N, D] and classes -> where they end, their confidence, and steps taken.

        Rows that have reached their target leave the batch, until 32 are left.
        """
        s, target = self.settings, target.to(points.device)
        ends, points = points.clone(), points.clone()
        confidence, index = (
            torch.zeros_like(target),
            torch.arange(len(target), device=target.device),
        )
        taken = torch.zeros(len(points), dtype=torch.int32, device=points.device)
        momentum, second = torch.zeros_like(points), points.new_zeros(len(points), 1)
        for step in range(s.ascent_steps + 1):
            points.requires_grad_(True)
            with torch.enable_grad():
                logits, distance = self._logits_and_distance(points)
                own = log_probabilities(logits, s.multi_label).gather(1, label[:, None])[:, 0]
                moves = own.detach().exp() < target
                loss = s.statistics * len(points) * distance - (own * moves).sum()
            ends[index], confidence[index] = points.detach(), own.detach().exp()
            moving = int(moves.sum())
            if step == s.ascent_steps or not moving:
                break
            (gradient,) = torch.autograd.grad(loss, points)
            momentum.lerp_(gradient, 0.1)
            second.lerp_(gradient.square().mean(1, keepdim=True), 0.01)
            unbiased = momentum / (1 - 0.9 ** (step + 1))
            size = (second / (1 - 0.99 ** (step + 1))).sqrt().clamp(min=1e-12)
            length = s.ascent_step * (1 - step / s.ascent_steps) * self.scale
            with torch.no_grad():
                moved = points - length * unbiased / size * moves[:, None]
                points = torch.minimum(torch.maximum(moved, self.low), self.high)
            taken[index] += moves
            if moving <= len(index) // 2 and len(index) > _FEWEST_ROWS:
                keep = moves.float().argsort(descending=True, stable=True)
                keep = keep[: max(moving, _FEWEST_ROWS)]
                index, label, target = index[keep], label[keep], target[keep]
                points, momentum, second = points[keep], momentum[keep], second[keep]
        return ends, confidence, taken

    def _logits_and_distance(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and the mean squared distance of the channels' means and standard deviations
        from the recorded ones of the BatchNorm layers, in units of the latter; 0 without any.
        """
        terms: list[Tensor] = []

        def note(norm: Any, args: Any, _kwargs: Any) -> None:
            x = args[0]
            variance, mean = torch.var_mean(x, [0, *range(2, x.ndim)], correction=0)
            deviation = (norm.running_var + norm.eps).sqrt()
            terms.append(((mean - norm.running_mean) / deviation).square().mean())
            terms.append((((variance + norm.eps).sqrt() / deviation) - 1).square().mean())

        with forward_pre_hooks(self.norms, note):
            logits = self.tail(points)
        distance = 2 * torch.stack(terms).mean() if terms else logits.new_zeros(())
        return logits, distance
